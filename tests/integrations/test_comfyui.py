"""The node for ComfyUI without ComfyUI: its wrappers and its override are called as ComfyUI calls them."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import attention, residual_attention, skip_attention
from lite_attention.integrations.comfyui.options import NodeOptions, exact_ranges
from lite_attention.integrations.comfyui.patch import Patch
from lite_attention.integrations.comfyui.schedule import Schedule
from lite_attention.ops import ResidualState, SkipState, step_plan
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.presets import preset_of

HEADS, HEAD_DIM, TOKENS = 2, 16, 256
STEPS = 12
SIGMAS = torch.linspace(1.0, 0.0, STEPS + 1)

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def options(**changed: Any) -> NodeOptions:
    return NodeOptions(**{"min_tokens": 1, **changed})


def inputs(sigma: float, seed: int, tokens: int = TOKENS, batch: int = 1) -> Qkv:
    """Return q, k and v (batch, tokens, heads, head_dim) that move with the noise level."""
    still, moving = (
        torch.randn(3, batch, tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed + 1000 * part))
        for part in range(2)
    )
    q, k, v = 3 * still + sigma * moving
    return q, k, v


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2)


def host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
    """Attend as a host's function does: on (batch, tokens, heads * head_dim)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = kwargs.get("mask")
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale")).transpose(1, 2).flatten(2)


class Host:
    """Samples as ComfyUI does: calls the wrappers of the patch, and the override where there is one.

    Args:
        model: called with transformer_options and an attention function.
        options: of the node.
        before: an override that another node has set.
    """

    def __init__(self, model: Callable[..., Any], options: NodeOptions, before: Any = None) -> None:
        self.patch, self.model, self.before = Patch(options), model, before
        # The noise level is what is left of the steps.
        self.class_obj = SimpleNamespace(model_sampling=SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent))

    def sample(self, body: Callable[[], Any]) -> Any:
        return self.patch._sample(body)

    def forward(self, sigma: float, branches: Sequence[int] = (0,), sigmas: torch.Tensor = SIGMAS, **told: Any) -> Any:
        given = {
            "sigmas": torch.tensor([sigma]), "sample_sigmas": sigmas, "cond_or_uncond": [*branches],
            "uuids": [f"uuid {branch}" for branch in branches], **told,
        }  # fmt: skip
        if self.before is not None:
            given["optimized_attention_override"] = self.before
        return self.patch._apply_model(self, None, None, transformer_options=given)

    def __call__(self, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, told: dict[str, Any]) -> Any:
        def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs = {"transformer_options": told, "_inside_attn_wrapper": True, **kwargs}
            override = told.get("optimized_attention_override")
            func = kwargs.pop("func", host_attention)
            return func(*args, **kwargs) if override is None else override(func, *args, **kwargs)

        return self.model(attend, told)


def one_block(attend: Any, told: dict[str, Any]) -> torch.Tensor:
    """Return what a model of one block makes of each branch's input at the noise level."""
    sigma = float(told["sigmas"][0])
    qkv = [inputs(sigma, branch) for branch in told["cond_or_uncond"]]
    return attend(*(flat(torch.cat(each)) for each in zip(*qkv, strict=True)), HEADS)


def by_hand(branch: int, seen: Sequence[int] = range(STEPS), **kwargs: Any) -> dict[int, torch.Tensor]:
    """Return what a state of its own gives a branch, in the steps that it sees."""
    outs, choice = {}, preset_of("balanced", STEPS)
    state = ResidualState.for_inputs(
        *inputs(1.0, branch), plan=step_plan(STEPS, full_every=choice.full_every), keep=choice.keep, slots=1,
        residual_dtype="bf16", auto_step=False,
    )  # fmt: skip
    for step in seen:
        sigma = float(SIGMAS[step])
        state.set_step(step)
        state.set_time(sigma)
        outs[step] = flat(residual_attention(*inputs(sigma, branch), state, **kwargs))
    return outs


def dense(branch: int, sigma: float) -> torch.Tensor:
    return flat(attention(*inputs(sigma, branch)))


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Full steps and dense attention are sums of the same numbers in another order."""
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_each_conditioning_of_a_batch_has_a_state_of_its_own() -> None:
    host = Host(one_block, options())
    outs = host.sample(lambda: [host.forward(sigma, (1, 0)) for sigma in SIGMAS[:-1].tolist()])
    for chunk, branch in enumerate((1, 0)):
        for out, expected in zip(outs, by_hand(branch).values(), strict=True):
            assert torch.equal(out[chunk : chunk + 1], expected)
    exact = [torch.allclose(out[:1], dense(1, s), atol=1e-4) for out, s in zip(outs, SIGMAS.tolist(), strict=False)]
    assert exact.count(False) > STEPS // 3


def test_conditionings_may_come_together_and_apart() -> None:
    """A host with little memory left splits a batch in the middle of a run."""
    host = Host(one_block, options())

    def body() -> list[torch.Tensor]:
        outs = []
        for step, sigma in enumerate(SIGMAS[:-1].tolist()):
            if step % 3 == 0:
                outs.append(host.forward(sigma, (0, 1)))
            elif step % 3 == 1:
                outs.append(torch.cat([host.forward(sigma, (0,)), host.forward(sigma, (1,))]))
            else:
                outs.append(host.forward(sigma, (1, 0)).flip(0))
        return outs

    for step, out in enumerate(host.sample(body)):
        assert torch.equal(out, torch.cat([by_hand(0)[step], by_hand(1)[step]]))


def test_each_sampling_starts_fresh() -> None:
    host = Host(one_block, options())
    runs = [host.sample(lambda: [host.forward(s) for s in SIGMAS[:-1].tolist()]) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    stopped = RuntimeError("interrupted")

    def interrupted() -> None:
        host.forward(1.0)
        raise stopped

    with pytest.raises(RuntimeError, match="interrupted"):
        host.sample(interrupted)
    assert host.patch._run is None
    assert host.forward(0.5) is not None  # outside of a sampling it is dense
    assert_close(host.forward(0.5), dense(0, 0.5))


def test_noise_levels_may_be_copied_from_step_to_step() -> None:
    host = Host(one_block, options())
    outs = host.sample(lambda: [host.forward(sigma, sigmas=SIGMAS.clone()) for sigma in SIGMAS[:-1].tolist()])
    assert all(torch.equal(*each) for each in zip(outs, by_hand(0).values(), strict=True))
    other = torch.linspace(1.0, 0.0, 5)  # a second stage in the same run

    def stages() -> torch.Tensor:
        host.forward(1.0)
        host.forward(float(SIGMAS[1]))
        return host.forward(float(other[1]), sigmas=other)

    assert_close(host.sample(stages), dense(0, float(other[1])))


def test_votes() -> None:
    """A method without residuals, by the same steps and conditionings."""

    def with_a_sink(sigma: float, branch: int) -> Qkv:
        q, k, v = inputs(sigma, branch)
        k[:, :64] *= 4
        return q, k, v

    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        qkv = [with_a_sink(float(told["sigmas"][0]), branch) for branch in told["cond_or_uncond"]]
        return attend(*(flat(torch.cat(each)) for each in zip(*qkv, strict=True)), HEADS)

    host = Host(model, options(preset="votes", threshold=-3.0, exact_tokens="128:192"))
    outs = host.sample(lambda: [host.forward(sigma, (1, 0)) for sigma in SIGMAS[:-1].tolist()])
    for chunk, branch in enumerate((1, 0)):
        state = SkipState.for_inputs(*inputs(1.0, branch)[:2], threshold=-3.0, slots=1, auto_step=False)
        for step, (sigma, out) in enumerate(zip(SIGMAS.tolist(), outs, strict=False)):
            state.set_step(step)
            expected = flat(skip_attention(*with_a_sink(sigma, branch), state, must_do=[128, 192]))
            assert torch.equal(out[chunk : chunk + 1, :128], expected[:, :128])
        assert float(state.sparsity()) > 0.1


def test_memory_is_given_back_after_each_sampling() -> None:
    host = Host(one_block, options())

    def body() -> weakref.ref[Any]:
        host.forward(1.0)
        assert host.patch._run is not None
        (memory,) = host.patch._run.memories.values()
        assert not isinstance(memory, str)
        return weakref.ref(memory.state)

    state = host.sample(body)
    gc.collect()
    assert state() is None


def test_start_and_end_percent() -> None:
    host = Host(one_block, options(start_percent=0.25, end_percent=0.8))
    outs = host.sample(lambda: [host.forward(sigma) for sigma in SIGMAS[:-1].tolist()])
    inside = [step for step, sigma in enumerate(SIGMAS[:-1].tolist()) if 0.2 <= sigma <= 0.75]
    choice = preset_of("balanced", STEPS)  # by the steps of the whole run
    state = ResidualState.for_inputs(
        *inputs(1.0, 0), plan=step_plan(len(inside), full_every=choice.full_every), keep=choice.keep, slots=1,
        residual_dtype="bf16", auto_step=False,
    )  # fmt: skip
    for step, sigma in enumerate(SIGMAS[:-1].tolist()):
        if step not in inside:
            assert_close(outs[step], dense(0, sigma))
            continue
        state.set_step(step - inside[0])
        state.set_time(sigma)
        assert torch.equal(outs[step], flat(residual_attention(*inputs(sigma, 0), state)))
    assert inside == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("told", [{"block_index": True}, {}], ids=["numbered", "counted"])
def test_blocks(told: dict[str, bool]) -> None:
    """Blocks have states of their own, also where a model does not number them; some are dense."""
    blocks = 3

    def model(attend: Any, given: dict[str, Any]) -> list[torch.Tensor]:
        sigma, outs = float(given["sigmas"][0]), []
        for block in range(blocks):
            if told:
                given |= {"block_type": "double", "block_index": block}
            outs.append(attend(*map(flat, inputs(sigma, block)), HEADS))
            attend(flat(inputs(sigma, 9)[0]), *map(flat, inputs(sigma, 9, tokens=64)[1:]), HEADS)  # cross-attention
        return outs

    host = Host(model, options(dense_blocks="1"))
    outs = host.sample(lambda: [host.forward(sigma) for sigma in SIGMAS[:-1].tolist()])
    for step, sigma in enumerate(SIGMAS[:-1].tolist()):
        for block in (0, 2):
            assert torch.equal(outs[step][block], by_hand(block)[step])
        assert_close(outs[step][1], dense(1, sigma))


def test_a_block_that_is_left_out_does_not_move_the_others() -> None:
    """A step cache leaves blocks out; where blocks are numbered, the others keep their states."""

    def model(attend: Any, given: dict[str, Any]) -> torch.Tensor:
        sigma = float(given["sigmas"][0])
        for block in (0, 1) if sigma > 0.7 else (1,):
            given |= {"block_type": "double", "block_index": block}
            out = attend(*map(flat, inputs(sigma, block)), HEADS)
        return out

    host = Host(model, options())
    outs = host.sample(lambda: [host.forward(sigma) for sigma in SIGMAS[:-1].tolist()])
    assert all(torch.equal(*each) for each in zip(outs, by_hand(1).values(), strict=True))


def peaked(sigma: float) -> Qkv:
    """Return inputs of which all attend to the first 64 tokens, so that votes skip others."""
    q, k, v = inputs(sigma, 0)
    k[:, :64] *= 4
    return q, k, v


def exact_by_hand(state: Any) -> list[torch.Tensor]:
    """Return what a state gives whose tiles of the tokens 128 to 192 are taken out of its masks."""
    outs = []
    m, n = state.tile_m, state.tile_n
    for step, sigma in enumerate(SIGMAS[:-1].tolist()):
        state.set_step(step)
        if isinstance(state, ResidualState):
            state.set_time(sigma)
        attend = residual_attention if isinstance(state, ResidualState) else skip_attention
        outs.append(flat(attend(*peaked(sigma), state)))
        bits = unpack_bits(state.skip_mask, state.tiles[1])
        bits[..., 128 // m : -(-192 // m), :] = False
        bits[..., 128 // n : -(-192 // n)] = False
        state.skip_mask.copy_(pack_bits(bits))
    return outs


@pytest.mark.parametrize("preset", ["balanced", "votes"])
def test_exact_tokens(preset: str) -> None:
    """They stay as keys, and their own rows are dense."""

    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        return attend(*map(flat, peaked(float(told["sigmas"][0]))), HEADS)

    host = Host(model, options(preset=preset, threshold=-1.0, exact_tokens="128:168, 176:192"))
    outs = host.sample(lambda: [host.forward(sigma) for sigma in SIGMAS[:-1].tolist()])
    choice = preset_of("balanced", STEPS)
    state: Any = ResidualState.for_inputs(
        *inputs(1.0, 0), plan=step_plan(STEPS, full_every=choice.full_every), keep=choice.keep, slots=1,
        residual_dtype="bf16", auto_step=False,
    )  # fmt: skip
    if preset == "votes":
        state = SkipState.for_inputs(*inputs(1.0, 0)[:2], threshold=-1.0, slots=1, auto_step=False)
    for sigma, out, expected in zip(SIGMAS.tolist(), outs, exact_by_hand(state), strict=False):
        assert torch.equal(out, expected)
        rows = flat(attention(*peaked(sigma)))
        assert_close(out[:, 128:192], rows[:, 128:192])
    assert 0.1 < float(state.sparsity()) < 0.5


SEGMENTS = [(0, 10, "text"), (10, 30, "audio"), (30, 90, "video"), (90, 100, "cond")]
LAYOUT = SimpleNamespace(seq_len=100, segments=SEGMENTS)


@pytest.mark.parametrize(
    ("text", "told", "expected"),
    [
        ("", {}, []),
        ("auto", {}, []),
        ("auto", {"minimax_h3_layout": LAYOUT}, [(0, 30), (90, 100)]),
        ("auto", {"minimax_h3_layout": SimpleNamespace(seq_len=99, segments=SEGMENTS)}, []),
        ("auto", {"img_slice": [20, 100]}, [(0, 20)]),
        ("auto", {"img_slice": [0, 70]}, [(70, 100)]),
        ("auto", {"img_slice": [20, 200]}, []),  # of another sequence
        ("auto", {"img_slice": [slice(20, None)]}, []),
        ("", {"img_slice": [20, 100]}, []),
        ("auto, 15:40", {"img_slice": [20, 100]}, [(0, 40)]),
        (":8", {}, [(0, 8)]),
        ("-8:", {}, [(92, 100)]),
        ("50:60, 10:20", {}, [(10, 20), (50, 60)]),
        ("90:300", {}, [(90, 100)]),
        ("200:300", {}, []),
        (":", {}, [(0, 100)]),
    ],
)
def test_exact_ranges(text: str, told: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert exact_ranges(text, told, 100) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "fastest"}, r"preset: expected one of \[.*, 'fast', 'votes'\], got 'fastest'"),
        ({"threshold": 0.5}, "threshold: .*got 0.5"),
        ({"start_percent": -0.1}, "start_percent: expected a number from 0 to 1, got -0.1"),
        ({"end_percent": 1.5}, "end_percent: expected a number from 0 to 1, got 1.5"),
        ({"end_percent": "1"}, "end_percent: expected a number from 0 to 1, got '1'"),
        ({"end_percent": True}, "end_percent: expected a number from 0 to 1, got True"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent: expected less than end_percent, got 0.5"),
        ({"dense_blocks": "first"}, "dense_blocks: expected numbers and ranges, .*, got 'first'"),
        ({"dense_blocks": "5-3"}, "dense_blocks: expected a range whose end is not before its start, got '5-3'"),
        ({"dense_blocks": "-1"}, "dense_blocks: expected numbers and ranges, .*, got '-1'"),
        ({"exact_tokens": "256"}, "exact_tokens: expected 'auto', or slices .*, got '256'"),
        ({"exact_tokens": "auto, 50:40"}, "exact_tokens: expected a start before its end, got '50:40'"),
        ({"exact_tokens": "0:9:2"}, "exact_tokens: expected 'auto', or slices .*, got '0:9:2'"),
        ({"min_tokens": -1}, "min_tokens: expected at least 0, got -1"),
        ({"memory": "disk"}, "memory: expected 'device' or 'host', got 'disk'"),
        ({"verbose": 1}, "verbose: expected True or False, got 1"),
    ],
)
def test_a_wrong_input_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**changed)


def test_an_input_that_may_be_left_out_is_right() -> None:
    NodeOptions()


def _call(given: dict[str, Any], **changed: Any) -> dict[str, Any]:
    q, k, v = map(flat, inputs(0.5, 0))
    return {"q": q, "k": k, "v": v, "heads": HEADS, **changed, "given": given}


DECLINED = {
    "a mask": lambda call: call.update(mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool)),
    "cross-attention": lambda call: call.update({name: call[name][:, :64] for name in ("k", "v")}),
    "an argument that is not known: is_causal": lambda call: call.update(is_causal=True),
    "q, k and v of torch.float32, torch.float32 and torch.bfloat16": lambda call: call.update(v=call["v"].bfloat16()),
    "a gradient is required": lambda call: call.update(q=call["q"].requires_grad_()),
    "256 tokens, fewer than min_tokens 257": lambda call: call.update(min_tokens=257),
    "block 3 is in dense_blocks": lambda call: call.update(block_index=3),
    "outside of start_percent to end_percent": lambda call: call.update(sigma=0.99),
    "the sampler does not tell its steps (sample_sigmas, sigmas)": lambda call: call.update(sample_sigmas=None),
}


@pytest.mark.parametrize("reason", DECLINED)
@pytest.mark.parametrize("has_before", [False, True], ids=["alone", "after another node"])
def test_where_it_does_not_apply_the_given_function_runs(
    reason: str, has_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets the arguments as they are, or what stood there before the node does; the reason is said."""
    q, k, v = map(flat, inputs(0.5, 0))
    call: dict[str, Any] = {"q": q, "k": k, "v": v}
    DECLINED[reason](call)
    told = {name: call.pop(name) for name in ("block_index", "sample_sigmas") if name in call}
    sigma, min_tokens = call.pop("sigma", 0.5), call.pop("min_tokens", 1)
    seen: list[tuple[Any, ...]] = []

    def func(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "dense"

    def before(given: Any, *args: Any, **kwargs: Any) -> Any:
        assert given is func
        return "before, " + given(*args, **kwargs)

    def model(attend: Any, told: dict[str, Any]) -> Any:
        rest = {name: value for name, value in call.items() if name not in "qkv"}
        return attend(call["q"], call["k"], call["v"], HEADS, func=func, **rest)

    settings = options(start_percent=0.1, dense_blocks="3", min_tokens=min_tokens, verbose=True)
    host = Host(model, settings, before if has_before else None)
    with caplog.at_level(logging.INFO, "lite_attention"):
        out = host.sample(lambda: host.forward(sigma, **told))
    assert out == ("before, dense" if has_before else "dense")
    ((args, kwargs),) = seen
    assert all(one is other for one, other in zip(args, (call["q"], call["k"], call["v"], HEADS), strict=True))
    assert {name: kwargs.get(name) for name in call if name not in "qkv"} == {
        name: value for name, value in call.items() if name not in "qkv"
    } or "mask" in call
    first, last = caplog.messages
    assert first == f"LiteAttention: dense: {reason}"
    assert last == f"LiteAttention: no attention was skipped; dense were: {reason} (1 times)"


def test_layouts_and_scale() -> None:
    """Heads apart or not, on both sides, give the same; so does a scale."""
    outs = {}
    for skip_reshape in (False, True):
        for skip_output_reshape in (False, True):

            def model(
                attend: Any, told: dict[str, Any], into: bool = skip_reshape, out_of: bool = skip_output_reshape
            ) -> torch.Tensor:
                qkv = inputs(float(told["sigmas"][0]), 0)
                qkv = [x.transpose(1, 2) if into else flat(x) for x in qkv]
                out = attend(*qkv, HEADS, skip_reshape=into, skip_output_reshape=out_of, scale=0.1)
                return flat(out.transpose(1, 2)) if out_of else out

            host = Host(model, options())
            outs[skip_reshape, skip_output_reshape] = host.sample(
                lambda host=host: [host.forward(sigma) for sigma in SIGMAS[:-1].tolist()]
            )
    expected = [*by_hand(0, scale=0.1).values()]
    for out in outs.values():
        assert all(torch.equal(*each) for each in zip(out, expected, strict=True))


def test_fewer_key_heads() -> None:
    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        q, k, v = inputs(float(told["sigmas"][0]), 0)
        return attend(flat(q), flat(k[:, :, :1]), flat(v[:, :, :1]), HEADS, enable_gqa=True)

    host = Host(model, options())
    (out,) = host.sample(lambda: [host.forward(1.0)])
    q, k, v = inputs(1.0, 0)
    assert_close(out, flat(attention(q, k[:, :, :1], v[:, :, :1])))


def test_passes_with_the_same_conditioning_at_one_noise_level_are_told_apart() -> None:
    """Guidance by a perturbed pass calls the model again with a conditioning that was there."""

    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        return attend(*map(flat, inputs(float(told["sigmas"][0]), told["seed"])), HEADS)

    host = Host(model, options())
    outs = host.sample(lambda: [[host.forward(s, seed=seed) for seed in (0, 5)] for s in SIGMAS[:-1].tolist()])
    for step, (plain, perturbed) in enumerate(outs):
        assert torch.equal(plain, by_hand(0)[step])
        assert torch.equal(perturbed, by_hand(5)[step])


def test_context_windows_have_states_of_their_own_and_old_ones_go() -> None:
    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        return attend(*map(flat, inputs(float(told["sigmas"][0]), told["context_window"].index_list[0])), HEADS)

    def window(first: int) -> SimpleNamespace:
        return SimpleNamespace(index_list=[first, first + 1])

    host = Host(model, options())

    def still() -> Any:
        return [[host.forward(s, context_window=window(first)) for first in (0, 4)] for s in SIGMAS[:-1].tolist()]

    for step, pair in enumerate(host.sample(still)):
        assert all(torch.equal(out, by_hand(first)[step]) for out, first in zip(pair, (0, 4), strict=True))

    def moving() -> int:
        most = 0
        for step, sigma in enumerate(SIGMAS[:-1].tolist()):
            host.forward(sigma, context_window=window(step))
            assert host.patch._run is not None
            most = max(most, len(host.patch._run.memories))
        return most

    assert host.sample(moving) <= 3


def test_a_sampler_that_turns_back_starts_fresh() -> None:
    host = Host(one_block, options())
    levels = [*SIGMAS[:8].tolist(), float(SIGMAS[4])]
    outs = host.sample(lambda: [host.forward(sigma) for sigma in levels])
    assert_close(outs[-1], dense(0, levels[-1]))


def test_a_batch_that_is_not_of_the_conditionings() -> None:
    """A model that runs its samples one by one has a state for each call."""

    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        sigma = float(told["sigmas"][0])
        return torch.cat([attend(*map(flat, inputs(sigma, seed)), HEADS) for seed in told["cond_or_uncond"]])

    host = Host(model, options())
    pairs = [(0, 1 + step % 2) for step in range(STEPS)]  # the second one is another every other step
    outs = host.sample(lambda: [host.forward(float(SIGMAS[step]), pair) for step, pair in enumerate(pairs)])
    for step, (out, pair) in enumerate(zip(outs, pairs, strict=True)):
        expected = [by_hand(branch, range(step % 2, STEPS, 2))[step] for branch in pair]
        assert torch.equal(out, torch.cat(expected))


def test_two_nodes_do_not_pile_up() -> None:
    """Where both wrappers are there, the outer one attends; the inner one leaves the forward alone."""

    def model(attend: Any, told: dict[str, Any]) -> torch.Tensor:
        out = one_block(attend, told)
        q, k, v = map(flat, inputs(1.0, 9))
        assert_close(attend(q, k[:, :64], v[:, :64], HEADS), host_attention(q, k[:, :64], v[:, :64], HEADS))
        return out

    inner, outer = Host(model, options()), Host(model, options())

    def chained(x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, told: dict[str, Any]) -> Any:
        return inner.patch._apply_model(inner, x, t, c_concat, c_crossattn, control, told)

    chained.class_obj = outer.class_obj  # type: ignore[attr-defined]
    given = {"sigmas": torch.tensor([1.0]), "sample_sigmas": SIGMAS, "cond_or_uncond": [0], "uuids": ["a"]}

    def body() -> Any:
        return inner.sample(lambda: outer.patch._apply_model(chained, None, None, transformer_options=given))

    out = outer.sample(body)
    assert_close(out, dense(0, 1.0))
    assert "optimized_attention_override" not in given  # the caller's stay as they are


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(10.0, None), (8.0, 0), (7.0, 0), (6.0, 0), (5.0, 1), (4.0, 2), (3.0, 2), (2.0, 3), (1.9, None), (0.0, None)],
)
def test_steps_of_noise_levels(sigma: float, step: int | None) -> None:
    schedule = Schedule([12.0, 10.0, 6.0, 5.0, 4.0, 2.0, 1.0], highest=8.0, lowest=2.0)
    assert schedule.skipping == [2, 3, 4, 5]
    assert schedule.step(sigma) == step


def test_a_level_that_is_rounded_is_still_within() -> None:
    level, rounded = 8 / 9, float(torch.tensor(8 / 9))
    assert rounded > level
    assert Schedule([1.0, rounded, 0.5], highest=level, lowest=0.0).step(rounded) == 0


def test_the_workflow_has_the_node_with_inputs_that_are_right() -> None:
    from importlib.resources import files

    workflow = json.loads((files("lite_attention.integrations.comfyui") / "wan_text_to_video.json").read_text())
    (node,) = [node for node in workflow.values() if node["class_type"] == "LiteAttention"]
    given = {name: value for name, value in node["inputs"].items() if name != "model"}
    assert NodeOptions(**given) == NodeOptions()
    for node in workflow.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(source in workflow for source, _ in links)
