"""`LiteAttention`: one module for each attention layer, eager and compiled."""

from __future__ import annotations

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lite_attention import LiteAttention
from lite_attention.ops import SkipState, default_session, skip_attention
from lite_attention.ops import control as c
from lite_attention.ops.ranges import must_skip_mask
from tests.support.op_cases import Qkv, clustered_qkv

SEQ, HEADS, DIM = 300, 2, 16  # 5 tiles of 64


def _inputs(step: int = 0, batch: int = 1, seq_q: int = SEQ, seq_k: int = SEQ, heads: int = HEADS) -> Qkv:
    return clustered_qkv(
        6, batch=batch, seq_q=seq_q, seq_k=seq_k, heads=heads, kv_heads=1, head_dim=DIM, clusters=10, step=step
    )


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*by_head, enable_gqa=True).transpose(1, 2)


def _buffers(module: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in module.buffers()]


def _state_of(module: LiteAttention) -> SkipState:
    assert module.state is not None
    return module.state


def _assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (other, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


# ---- the module is the functional form with a state of its own -----------------------------------------------------


def test_equals_the_functional_form_over_steps() -> None:
    module = LiteAttention(threshold=-3.0, num_steps=3)
    assert module.state is None
    assert list(module.buffers()) == []
    assert module.sparsity() == 0
    state = SkipState.for_inputs(*_inputs()[:2], threshold=-3.0, num_steps=3)
    for step in range(5):  # over the wrap
        out, lse = module(*_inputs(step), scale=0.3, return_softmax_lse=True, must_do_list=[70, 80])
        want, want_lse = skip_attention(*_inputs(step), state, scale=0.3, return_lse=True, must_do=[70, 80])
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        _assert_same_state(_state_of(module), state)
        assert 0.1 < module.sparsity() < 0.9
    assert torch.equal(module.sparsity("head"), state.sparsity("head"))
    module.reset_skip_state()
    assert module.sparsity() == 0
    assert _state_of(module).step() == 0


def test_ways_to_leave_keys_out() -> None:
    q, k, v = _inputs(batch=2)
    lengths, mask = torch.tensor([290, 200]), torch.rand(2, SEQ) < 0.9
    out = LiteAttention()(q, k, v, must_skip_list=[10, 90], key_lengths=lengths, key_mask=mask)
    joined = mask & (torch.arange(SEQ) < lengths[:, None]) & must_skip_mask([10, 90], SEQ)
    assert torch.equal(out, LiteAttention()(q, k, v, key_mask=joined))
    assert not torch.equal(out, LiteAttention()(q, k, v))


def test_reference_implementation() -> None:
    assert torch.equal(LiteAttention(implementation="reference")(*_inputs()), LiteAttention()(*_inputs()))


def test_two_modules_never_share() -> None:
    modules = nn.ModuleList([LiteAttention(threshold=-3.0), LiteAttention(threshold=-3.0)])
    states = [SkipState.for_inputs(*_inputs()[:2], threshold=-3.0) for _ in modules]
    for step in range(3):
        for number, (module, state) in enumerate(zip(modules, states, strict=True)):
            inputs = [x.flip(1) if number else x for x in _inputs(step)]
            assert torch.equal(module(*inputs), skip_attention(*inputs, state))
    assert not torch.equal(states[0].skip_mask, states[1].skip_mask)
    addresses = [buffer.data_ptr() for buffer in modules.buffers()]
    assert len(set(addresses)) == len(addresses) == 6


def test_a_copy_goes_its_own_way_and_follows_the_branches() -> None:
    unused = copy.deepcopy(LiteAttention(threshold=-3.0))
    module = LiteAttention(threshold=-3.0)
    module(*_inputs())
    twin, before = copy.deepcopy(module), _buffers(module)
    twin(*_inputs(1))
    unused(*_inputs(2))
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))
    with default_session.branch("cond"), default_session.branch("uncond"):
        assert [_state_of(m).slot for m in (module, twin, unused)] == [1, 1, 1]


def test_branches_have_memories_of_their_own() -> None:
    module = LiteAttention(threshold=-3.0)
    alone = LiteAttention(threshold=-3.0)
    states = [SkipState.for_inputs(*_inputs()[:2], threshold=-3.0) for _ in range(2)]
    for step in range(3):
        for number, name in enumerate(("cond", "uncond")):
            inputs = [x.flip(1) if number else x for x in _inputs(step)]
            with default_session.branch(name, step):
                out = module(*inputs)
            assert torch.equal(out, skip_attention(*inputs, states[number]))
        with default_session.branch("cond", step):
            alone(*_inputs(step))
    assert torch.equal(_state_of(module).skip_mask[0], _state_of(alone).skip_mask[0])


def test_one_branch_too_many_is_never_silent() -> None:
    for name in ("a", "b", "c"):
        with default_session.branch(name):
            pass
    module = LiteAttention(slots=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="branch: expected at most 2 names"), default_session.branch("c"):
            module(*_inputs())


# ---- allocation ----------------------------------------------------------------------------------------------------


def test_allocate() -> None:
    module = LiteAttention(threshold=-3.0, slots=3, num_steps=4, refresh=2)
    assert module.allocate(2, SEQ, HEADS, DIM, kv_seq_len=100, dtype=torch.bfloat16) is module
    state = _state_of(module)
    assert state.capacity == (2, HEADS, SEQ, 100)
    assert state.threshold.shape == (3, 4, HEADS)
    assert state.control[[c.NUM_STEPS, c.REFRESH, c.FLAGS]].tolist() == [4, 2, c.FLAG_AUTO_STEP]
    module(*_inputs(seq_k=100))
    assert module.state is state
    assert _state_of(LiteAttention().allocate(1, SEQ, HEADS, DIM)).capacity == (1, HEADS, SEQ, SEQ)


@pytest.mark.parametrize(
    "larger",
    [{"batch": 2}, {"seq_q": SEQ + 1}, {"seq_k": SEQ + 70}, {"heads": 3}, "tiles"],
    ids=str,
)
def test_what_does_not_fit_starts_fresh_and_is_logged_once(
    larger: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lite_attention")
    module = LiteAttention(threshold=-3.0)
    for step in range(2):
        module(*_inputs(step))
    assert caplog.records == []
    sizes = larger
    if larger == "tiles":  # another dtype or device may have other tiles; on the CPU all have the same
        monkeypatch.setattr("lite_attention.module.tile_shape", lambda *_: (32, 32))
        sizes = {}
    state = SkipState.for_inputs(*_inputs(**sizes)[:2], threshold=-3.0)
    if larger == "tiles":
        state = SkipState(batch=1, heads=HEADS, seq_q=SEQ, seq_k=SEQ, tile_m=32, tile_n=32, threshold=-3.0)
    for step in range(2):
        assert torch.equal(module(*_inputs(step, **sizes)), skip_attention(*_inputs(step, **sizes), state))
    _assert_same_state(_state_of(module), state)
    assert len(caplog.records) == 1
    assert "starting a fresh skip state" in caplog.text


def test_smaller_calls_fit_and_start_fresh() -> None:
    module = LiteAttention(threshold=-3.0)
    for step in range(2):
        module(*_inputs(step, batch=2))
    state = _state_of(module)
    for sizes in ({}, {"seq_q": 200}, {"seq_k": 130}, {"batch": 2}):
        first = LiteAttention(threshold=-3.0)
        assert torch.equal(module(*_inputs(**sizes)), first(*_inputs(**sizes)))
        assert torch.equal(module.sparsity(), first.sparsity())
    assert module.state is state


def test_another_dtype_with_the_same_tiles_goes_on() -> None:
    module, other = LiteAttention(threshold=-3.0), LiteAttention(threshold=-3.0)
    module(*_inputs())
    other(*_inputs())
    state = _state_of(module)
    in_half = [x.half() for x in _inputs(1)]
    assert torch.equal(module(*in_half), other(*in_half))
    assert module.state is state
    assert state.step() == 2


def test_an_initial_mask_fits_one_size_alone() -> None:
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 3] = True
    module = LiteAttention(initial_mask=mask, threshold=-math.inf)
    module(*_inputs())
    assert module.sparsity() == 0.2
    with pytest.raises(ValueError, match="initial_mask: expected bool"):
        module(*_inputs(seq_q=100, seq_k=100))


def test_inference_mode_and_no_grad_mix() -> None:
    module, other = LiteAttention(threshold=-3.0), LiteAttention(threshold=-3.0)
    with torch.inference_mode():
        module(*_inputs())
    other(*_inputs())
    assert torch.equal(module(*_inputs(1)), other(*_inputs(1)))
    module.reset_skip_state()
    module.set_threshold(-2.0)


# ---- options and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"refresh": 0}, "refresh: expected at least 1, got 0"),
        ({"threshold": 1.0}, r"threshold: expected at most 0 .*got 1\.0"),
        ({"threshold": math.nan}, "threshold: expected numbers, got NaN"),
        ({"use_int8": "int8_fp8"}, "use_int8: expected True or False, got 'int8_fp8'"),
        ({"use_int8": True, "use_fp8": 1}, "use_fp8: expected True or False, got 1"),
        ({"use_fp8": True}, "use_fp8: expected use_int8=True beside it, got use_int8=False"),
    ],
    ids=str,
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteAttention(**options)


# What a module is told, and what it tells the op.
QUANTIZED = pytest.mark.parametrize(
    ("switches", "quantization"),
    [({"use_int8": True}, "int8"), ({"use_int8": True, "use_fp8": True}, "int8_fp8")],
    ids=["int8", "int8_fp8"],
)


@QUANTIZED
def test_quantized_equals_the_functional_form_over_steps(switches: dict[str, bool], quantization: str) -> None:
    module, plain = LiteAttention(threshold=-3.0, **switches), LiteAttention(threshold=-3.0)
    assert f"quantization={quantization}\n" in repr(module)
    assert "quantization" not in repr(plain)
    state = SkipState.for_inputs(*_inputs()[:2], quantization=quantization, threshold=-3.0)
    options = {"key_mask": torch.arange(SEQ).unsqueeze(0) < SEQ - 20}
    for step in range(3):
        out, lse = module(*_inputs(step), return_softmax_lse=True, **options)
        want = skip_attention(*_inputs(step), state, quantization=quantization, return_lse=True, **options)
        assert torch.equal(out, want[0])
        assert torch.equal(lse, want[1])
        _assert_same_state(_state_of(module), state)
        assert not torch.equal(plain(*_inputs(step), **options), out)
    assert 0.1 < module.sparsity() < 0.9
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*_inputs(3)), module(*_inputs(3)))


@QUANTIZED
def test_each_quantization_has_tiles_of_its_own(
    switches: dict[str, bool], quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiles_of(head_dim: int, dtype: torch.dtype, device: torch.device, asked: str, _: str | None) -> tuple[int, int]:
        return (32, 16) if asked == quantization else (64, 64)

    monkeypatch.setattr("lite_attention.module.tile_shape", tiles_of)
    for options, tiles in ((switches, (32, 16)), ({}, (64, 64))):
        module = LiteAttention(**options)
        for step in range(2):
            module(*_inputs(step))
        state = _state_of(module)
        assert (state.tile_m, state.tile_n) == tiles
        assert state.step() == 2  # the second call found it


@QUANTIZED
def test_each_quantization_has_head_dims_of_its_own_on_hopper(switches: dict[str, bool], quantization: str) -> None:
    module = LiteAttention(**switches)
    with pytest.raises(ValueError, match=f"quantization: expected head dims .* for '{quantization}', got 96"):
        module.allocate(1, SEQ, HEADS, 96, dtype=torch.bfloat16, device="cuda")
    assert module.state is None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@QUANTIZED
def test_quantized_compiles(switches: dict[str, bool], quantization: str, backend: str) -> None:
    module, eager = (LiteAttention(threshold=-3.0, **switches).allocate(1, SEQ, HEADS, DIM) for _ in range(2))
    assert module.quantization == quantization
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for step in range(3):
        assert torch.equal(compiled(*_inputs(step)), eager(*_inputs(step)))
    _assert_same_state(module, eager)
    assert 0.1 < module.sparsity() < 0.9


def test_it_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = LiteAttention(threshold=-3.0)
    assert torch.equal(module.to_empty(device="cpu")(*_inputs()), LiteAttention(threshold=-3.0)(*_inputs()))


@pytest.mark.parametrize("allocated", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :, 0], k, v), r"expected \(batch, seq_len, heads, head_dim\), got"),
        (lambda q, k, v: (q, k[0], v), r"expected \(batch, seq_len, heads, head_dim\), got"),
        (lambda q, k, v: (q[:, :, :3], k, v), "heads of q: expected a multiple of those of k, 2, got 3"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v), "batch of k: expected that of q, 2, got 1"),
        (lambda q, k, v: (q, k, v[:, :9]), "seq_len of v: expected that of k, 40, got 9"),
    ],
)
def test_inputs_that_do_not_fit_leave_the_state_as_it_is(change: Any, message: str, allocated: bool) -> None:
    q, k, v = clustered_qkv(0, seq_q=40, heads=8, kv_heads=2, head_dim=8)
    module = LiteAttention()
    if allocated:
        module(q, k, v)
    state, before = module.state, _buffers(module)
    with pytest.raises(ValueError, match=message):
        module(*change(q, k, v))
    if allocated:
        assert module.state is state
        assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


@pytest.mark.parametrize("argument", ["must_do", "must_skip"])
def test_errors_name_the_argument(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        LiteAttention()(*_inputs(), **{f"{argument}_list": [5]})


def test_gradients_are_refused() -> None:
    q, k, v = _inputs()
    with pytest.raises(RuntimeError, match="no backward"):
        LiteAttention()(q.requires_grad_(), k, v)


def test_set_threshold_before_and_after_allocation() -> None:
    module = LiteAttention(threshold=-9.0)
    for wrong in (0.1, math.nan):
        with pytest.raises(ValueError, match="threshold: expected"):
            module.set_threshold(wrong)
    module.set_threshold(-3.0)
    module(*_inputs())
    table = _state_of(module).threshold
    assert (table == -3.0).all()
    with pytest.raises(ValueError, match="threshold: expected a number or a tensor that broadcasts"):
        module.set_threshold(torch.zeros(7))
    with pytest.raises(ValueError, match="threshold: expected at most 0"):
        module.set_threshold(0.1)
    module.set_threshold(torch.tensor([-1.0, -2.0]))
    assert _state_of(module).threshold is table
    assert (table == torch.tensor([-1.0, -2.0])).all()
    module(*_inputs(batch=2))  # a new state has it too
    assert (_state_of(module).threshold == torch.tensor([-1.0, -2.0])).all()
    assert "threshold=tensor([-1., -2.])" in repr(module)


def test_off_is_dense_and_learns_nothing() -> None:
    module = LiteAttention(threshold=-3.0)
    for step in range(2):
        module(*_inputs(step))
    before = _buffers(module)
    module.enable_skip_optimization(False)
    torch.testing.assert_close(module(*_inputs(2)), _dense(*_inputs(2)), rtol=1e-4, atol=1e-4)
    module.enable_skip_optimization()
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))
    assert not torch.allclose(module(*_inputs(2)), _dense(*_inputs(2)), atol=1e-4)

    off = LiteAttention(enable_skipping=False, threshold=-3.0)
    for step in range(2):
        torch.testing.assert_close(off(*_inputs(step)), _dense(*_inputs(step)), rtol=1e-4, atol=1e-4)
    assert off.sparsity() == 0
    off.enable_skip_optimization()
    first = LiteAttention(threshold=-3.0)
    assert torch.equal(off(*_inputs()), first(*_inputs()))
    _assert_same_state(off, first)


# ---- saving --------------------------------------------------------------------------------------------------------


def _layers(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), LiteAttention(**options), LiteAttention(**options))


def _after_two_steps(**options: Any) -> nn.Sequential:
    model = _layers(threshold=-3.0, **options)
    for step in range(2):
        model[1](*_inputs(step))
        model[2](*(x.flip(1) for x in _inputs(step)))
    return model


def test_a_persistent_state_goes_on_in_a_fresh_model() -> None:
    model = _after_two_steps(persistent_state=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = _layers(persistent_state=True)
    fresh.load_state_dict(torch.load(file))
    _assert_same_state(model, fresh)
    assert torch.equal(model[1](*_inputs(2)), fresh[1](*_inputs(2)))
    assert torch.equal(model[2](*_inputs(2)), fresh[2](*_inputs(2)))
    fresh.load_state_dict(_after_two_steps(persistent_state=True).state_dict())  # over a state that is there
    assert _state_of(fresh[1]).step() == 2
    with default_session.branch("a"), default_session.branch("b"):
        assert _state_of(fresh[1]).slot == 1


def test_a_state_is_not_saved_unless_persistent() -> None:
    model = _after_two_steps()
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    _layers().load_state_dict(model.state_dict())
    plain = _layers()
    plain.load_state_dict(_after_two_steps(persistent_state=True).state_dict())
    assert plain[1].state is None


@pytest.mark.parametrize("enable", [False, True])
def test_loading_leaves_skipping_on_or_off(enable: bool) -> None:
    fresh = _layers(persistent_state=True, enable_skipping=enable)
    fresh.load_state_dict(_after_two_steps(persistent_state=True, enable_skipping=not enable).state_dict())
    fresh[1](*_inputs(2))
    dense = torch.allclose(fresh[1](*_inputs(3)), _dense(*_inputs(3)), atol=1e-4)
    assert dense is not enable


def test_loading_keeps_allow_positive() -> None:
    fresh = _layers(persistent_state=True, allow_positive=True)
    fresh.load_state_dict(_after_two_steps(persistent_state=True).state_dict())
    fresh[1].set_threshold(1.0)
    assert (_state_of(fresh[1]).threshold == 1.0).all()


# ---- compiled ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of attention of the tokens among themselves; the second one with ranges and lengths."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.sites = nn.ModuleList(LiteAttention(threshold=-3.0).allocate(1, SEQ, HEADS, DIM) for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        for number, attend in enumerate(self.sites):
            h = 3 * F.layer_norm(x, x.shape[-1:])
            options = {"must_do_list": [70, 80], "must_skip_list": [5, 9], "key_lengths": lengths} if number else {}
            x = x + attend(h, h, h, **options)
        return x


def _tokens(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, _, _ = clustered_qkv(6, seq_q=SEQ, heads=HEADS, head_dim=DIM, clusters=10, step=step)
    return q, torch.tensor([290 - step])


def _compare_with_eager(backend: str, layers: int, tol: float) -> None:
    torch._dynamo.reset()
    eager = Net(layers)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def both(step: int) -> None:
        x, lengths = _tokens(step)
        torch.testing.assert_close(compiled(x, lengths), eager(x, lengths), rtol=tol, atol=tol)
        for a, b in zip(eager.buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b)

    with torch.no_grad():
        both(0)  # warm-up
        with torch.compiler.set_stance("fail_on_recompile"):
            for generation in range(2):
                for step in range(3):
                    for name in ("cond", "uncond"):
                        with default_session.branch(name, step):
                            both(step + 10 * generation)
                assert min(float(site.sparsity()) for site in model.sites) > 0.1
                for net in (eager, model):
                    for site in net.sites:
                        site.set_threshold(-2.0)
                        site.reset_skip_state()
            for net in (eager, model):
                net.sites[0].enable_skip_optimization(False)
            both(3)


def test_compiled_equals_eager_and_nothing_recompiles() -> None:
    _compare_with_eager("aot_eager", 3, 0.0)


def test_inductor_equals_eager_and_nothing_recompiles() -> None:
    _compare_with_eager("inductor", 2, 1e-4)


def test_tracing_without_a_state_that_fits_names_allocate() -> None:
    torch._dynamo.reset()
    for module in (LiteAttention(), LiteAttention().allocate(1, 100, HEADS, DIM)):
        with torch.no_grad(), pytest.raises(Exception, match=r"\.allocate\(batch, seq_len, heads, head_dim"):
            torch.compile(module, fullgraph=True, backend="eager")(*_inputs())


def test_a_module_that_version_0_1_pickled() -> None:
    module = LiteAttention(threshold=-2.0, num_steps=8, refresh=3)
    module(*_inputs())
    # It had its options as a dict, those of `SkipState`.
    pickled = {**copy.deepcopy(module).__dict__, "_options": dict(module._options.of_state)}
    loaded = LiteAttention.__new__(LiteAttention)
    loaded.__setstate__(pickled)
    for step in (1, 2):
        assert torch.equal(loaded(*_inputs(step)), module(*_inputs(step)))
    assert (str(loaded), loaded.num_steps, loaded.residual) == (str(module), 8, None)
    loaded.set_threshold(-5.0)
    assert float(_state_of(loaded).threshold.max()) == -5.0
