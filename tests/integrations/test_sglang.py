"""SGLang's backend: where it is found, which calls it runs with which memory, and which it leaves alone."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from lite_attention.ops import step_plan
from lite_attention.presets import preset_of
from tests.support import hosts, sglang_host
from tests.support.served_calls import HEAD_DIM, HEADS, TOKENS, ByHand, inputs
from tests.support.sglang_host import Request

RUNTIME = "sglang.multimodal_gen.runtime"
THRESHOLD = -3.0
BRANCHES = ("cond", "uncond")


@pytest.fixture(params=hosts.kinds(sglang_host.FOLDER))
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Start:
    return lambda **config: Server(monkeypatch, request.param, config)


class Server:
    """A server that has found our plug-in, with a configuration of its attention."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, config: dict[str, Any]) -> None:
        sglang_host.install(patch, kind, config)
        self.plugin = importlib.import_module("lite_attention.integrations.sglang")
        self.plugin.register()
        self.module("platforms.plugins").HookRegistry.apply_hooks()
        self.enum = self.module("platforms").AttentionBackendEnum
        self.platform = self.module("platforms").current_platform
        self.context = self.module("managers.forward_context").set_forward_context

    @staticmethod
    def module(name: str) -> Any:
        return importlib.import_module(f"{RUNTIME}.{name}")

    @property
    def backend(self) -> Any:
        path = self.platform.get_attn_backend_cls_str(self.enum["LITE_ATTENTION"], HEAD_DIM, torch.float32)
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def layer(self, number: int = 0, **options: Any) -> Any:
        kwargs = {"causal": False, "num_kv_heads": HEADS, "prefix": f"blocks.{number}.attn1.impl", **options}
        return self.backend.get_impl_cls()(
            num_heads=HEADS, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5, **kwargs
        )  # fmt: skip

    def step(self, request: Request, step: Any, branch: str = "cond") -> Any:
        request.is_cfg_negative = branch == "uncond"
        return self.context(step, None, request)


Start = Callable[..., Server]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def test_the_backend_has_a_name_that_is_found(start: Start) -> None:
    server = start()
    member = server.enum["LITE_ATTENTION"]
    assert str(member.name).lower() == "lite_attention"
    assert server.enum(member.value) is member
    assert [other for other in server.enum if other.value == member.value] == [member]
    assert member.is_sparse
    assert server.enum["SOL_ATTN"].is_sparse
    assert not server.enum["FA"].is_sparse
    assert server.backend.get_enum() is member
    assert server.backend.supports_ring_rotation()
    other = server.platform.get_attn_backend_cls_str(server.enum["TORCH_SDPA"], HEAD_DIM, torch.float32)
    assert other.endswith("SDPABackend")


def test_it_is_registered_once(start: Start) -> None:
    server = start()
    before = list(server.enum)
    assert server.plugin.backend_member() is server.enum["LITE_ATTENTION"]
    assert list(server.enum) == before


def test_ring_attention_is_admitted(start: Start) -> None:
    server = start()
    module = server.module("server_args.server_args")
    for cls in (module.ServerArgs, type("Derived", (module.ServerArgs,), {})):
        cls()._adjust_attention_backend()
        assert module.RING_CAPABLE_ATTENTION_BACKENDS == ("fa", "sage_attn", "lite_attention")


def test_a_memory_for_each_layer_and_branch_begins_with_each_request(start: Start) -> None:
    server = start(threshold=THRESHOLD)
    layers = [server.layer(0), server.layer(1)]
    for number in range(2):
        by_hand, request = ByHand(THRESHOLD), Request()
        for step, branch in product(range(3), BRANCHES):
            with server.step(request, step, branch):
                for i, layer in enumerate(layers):
                    qkv = inputs(i, branch, step, request=number)
                    torch.testing.assert_close(layer.forward(*qkv, None), by_hand((i, branch), qkv))
        assert by_hand.skipped > 0.05


def test_a_size_has_a_memory_of_its_own(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step, tokens in product(range(3), (TOKENS, 256)):
        with server.step(request, step):
            qkv = inputs(0, "cond", step, tokens)
            torch.testing.assert_close(layer.forward(*qkv, None), by_hand(tokens, qkv))
    assert by_hand.skipped > 0


def test_a_third_pass_of_a_step_has_a_memory_and_a_fourth_is_dense(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step in range(2):
        for number, branch in enumerate(("cond", "uncond", "cond")):
            with server.step(request, step, branch):
                qkv = inputs(number, branch, step)
                torch.testing.assert_close(layer.forward(*qkv, None), by_hand(number, qkv))
        qkv = inputs(3, "cond", step)
        with server.step(request, step, "cond"):
            if step == 0:
                with pytest.warns(UserWarning, match="more than 3 passes"):
                    out = layer.forward(*qkv, None)
            else:
                out = layer.forward(*qkv, None)
            torch.testing.assert_close(out, dense(*qkv))


@pytest.mark.parametrize(
    ("options", "is_in_request"),
    [({"causal": True}, True), ({"is_cross_attention": True}, True), ({}, False)],
    ids=["causal", "cross", "outside of a request"],
)
def test_what_does_not_skip_is_the_hosts(start: Start, options: dict[str, Any], is_in_request: bool) -> None:
    server = start(threshold=THRESHOLD)
    layer, qkv = server.layer(**options), inputs(0, "cond", 0)
    request = Request() if is_in_request else None
    for step in range(2):
        with server.context(step if is_in_request else 0, None, request):
            torch.testing.assert_close(layer.forward(*qkv, None), dense(*qkv, is_causal=options.get("causal", False)))
    torch.testing.assert_close(layer.forward(*qkv, None), dense(*qkv, is_causal=options.get("causal", False)))
    assert not layer._served.store.records


def test_keys_of_another_number_than_queries_are_dense(start: Start) -> None:
    server = start(threshold=THRESHOLD)
    layer, (q, k, v) = server.layer(), inputs(0, "cond", 0)
    with server.step(Request(), 0), pytest.warns(UserWarning, match="different number"):
        torch.testing.assert_close(layer.forward(q[:, :100], k, v, None), dense(q[:, :100], k, v))


def test_dense_steps_and_layers(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD, dense_steps=2, dense_layers="0,5-6"), ByHand(THRESHOLD)
    layers, request = {i: server.layer(i) for i in (0, 1, 6)}, Request()
    for step in range(4):
        with server.step(request, step):
            for i, layer in layers.items():
                qkv = inputs(i, "cond", step)
                expected = by_hand(i, qkv) if i == 1 and step >= 2 else dense(*qkv)
                torch.testing.assert_close(layer.forward(*qkv, None), expected)
    assert by_hand.skipped > 0


def test_a_threshold_for_each_step(start: Start) -> None:
    server, by_hand = start(threshold=[float("-inf"), THRESHOLD]), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step in range(4):
        with server.step(request, step):
            qkv = inputs(0, "cond", step)
            expected = by_hand(0, qkv) if step else dense(*qkv)
            torch.testing.assert_close(layer.forward(*qkv, None), expected)
    assert by_hand.skipped > 0


def test_exact_tokens_are_never_skipped(start: Start) -> None:
    server, by_hand, without = start(threshold=0.0, exact_tokens=[[0, 70], [-60, None]]), ByHand(0.0), ByHand(0.0)
    layer, request = server.layer(), Request()
    ranges = [0, 70, TOKENS - 60, TOKENS]
    for step in range(3):
        with server.step(request, step):
            qkv = inputs(0, "cond", step)
            expected, whole = by_hand(0, qkv, must_do=ranges), dense(*qkv)
            rows = torch.zeros(TOKENS, dtype=torch.bool)
            for first in range(0, TOKENS, by_hand.states[0].tile_m):  # outward to tiles
                tile = slice(first, first + by_hand.states[0].tile_m)
                rows[tile] = any(start < tile.stop and first < end for start, end in ((0, 70), (TOKENS - 60, TOKENS)))
            out, other = layer.forward(*qkv, None), without(0, qkv)
            torch.testing.assert_close(out, torch.where(rows[:, None, None], whole, expected))
    assert not rows.all()
    assert not torch.allclose(expected, other)


def test_exact_tokens_do_not_hold_in_parts_of_a_ring(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD, exact_tokens=[[0, 70]]), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step in range(3):
        q, k, v = inputs(0, "cond", step)
        with server.step(request, step), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = layer.forward(q, k[:, :160], v[:, :160], attn_metadata=None, return_softmax_lse=True)
        torch.testing.assert_close(result, by_hand(0, (q, k[:, :160], v[:, :160]), return_lse=True))
        assert [str(warning.message).count("exact_tokens does not hold") for warning in caught] == [1] * (step == 0)


def test_parts_of_a_ring_have_memories_and_merge(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step in range(3):
        q, *kv = inputs(0, "cond", step)
        parts = [[x[:, part] for x in kv] for part in (slice(0, 160), slice(160, TOKENS))]
        with server.step(request, step):
            for i, part in enumerate(parts):
                out, lse = layer.forward(q, *part, attn_metadata=None, return_softmax_lse=True)
                torch.testing.assert_close((out, lse), by_hand(i, (q, *part), return_lse=True))
                packed = layer.forward_ring_kv_chunk(q[0], *(x[0] for x in part))
                torch.testing.assert_close(packed[0], by_hand(2 + i, (q, *part), return_lse=True)[0][0])
                assert packed[1].shape == (HEADS, TOKENS)
    assert by_hand.skipped > 0


@pytest.mark.parametrize("config", [{"threshold": float("-inf")}, {"dense_steps": 9}], ids=["skips nothing", "dense"])
def test_merged_parts_are_the_whole(start: Start, config: dict[str, Any]) -> None:
    server = start(**config)
    layer, (q, k, v) = server.layer(), inputs(0, "cond", 0)
    with server.step(Request(), 0):
        outs, lses = zip(
            *(
                layer.forward(q, k[:, part], v[:, part], None, return_softmax_lse=True)
                for part in (slice(0, 128), slice(128, TOKENS))
            ),
            strict=True,
        )
    weights = torch.stack(lses).softmax(0).transpose(2, 3)[..., None]
    torch.testing.assert_close((torch.stack(outs) * weights).sum(0), dense(q, k, v))


@pytest.mark.parametrize("told", [True, False], ids=["bounds on the host", "on the device"])
def test_packed_sequences_attend_within_themselves(start: Start, told: bool) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request, bounds = server.layer(), Request(), (0, TOKENS, TOKENS + 192, TOKENS + 200, TOKENS + 200)
    for step in range(3):
        parts = [inputs(i, "cond", step, tokens) for i, tokens in enumerate((TOKENS, 192, 8))]
        packed = [torch.cat(x, 1)[0] for x in zip(*parts, strict=True)]
        expected = [by_hand(0, parts[0]), by_hand(1, parts[1]), dense(*parts[2])]
        with server.step(request, step), warnings.catch_warnings():
            warnings.simplefilter("error")  # that one is short is as it should be
            out = layer.forward_varlen(
                *packed, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=TOKENS,
                cu_seqlens_host=bounds if told else None,
            )  # fmt: skip
        torch.testing.assert_close(out, torch.cat(expected, 1)[0])
    assert by_hand.skipped > 0


def test_what_stands_beside_the_video_of_minimax_h3_is_exact(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, by_hand = start(threshold=0.0), ByHand(0.0)

    class MiniMaxH3DiTModel:
        def forward(self, **given: Any) -> torch.Tensor:
            bounds = (0, TOKENS, TOKENS + 8)  # of text, audio and video; and padding
            return layer.forward_varlen(
                *given["packed"], cu_seqlens=torch.tensor(bounds), max_seqlen=TOKENS, cu_seqlens_host=bounds
            )  # type: ignore[no-any-return]

    monkeypatch.setitem(sys.modules, sglang_host.MINIMAX_H3, hosts.stub(sglang_host.MINIMAX_H3))
    sys.modules[sglang_host.MINIMAX_H3].MiniMaxH3DiTModel = MiniMaxH3DiTModel  # type: ignore[attr-defined]
    layer, request, model = server.layer(), Request(), MiniMaxH3DiTModel()
    for first in (70, 135):  # the second time with a longer text
        rows = torch.arange(first, TOKENS)
        for step in range(3):
            qkv, pad = inputs(0, "cond", step), inputs(1, "cond", step, 8)
            packed = [torch.cat(x, 1)[0] for x in zip(qkv, pad, strict=True)]
            with server.step(request, step):
                out = model.forward(packed=packed, img_pos_for_infer_output_info={"position_ids": rows})
            expected, whole = by_hand((first, 0), qkv, must_do=[0, first]), dense(*qkv)[0]
            tile = by_hand.states[first, 0].tile_m
            exact = -(-first // tile) * tile
            torch.testing.assert_close(out[:exact], whole[:exact])
            torch.testing.assert_close(out[exact:TOKENS], expected[0, exact:])
            assert step == 0 or not torch.allclose(out[exact:TOKENS], whole[exact:], atol=1e-4)
    assert layer._served.store.records[0].last.kept_tiles()[0, ..., 0].all()


def test_packed_sequences_outside_of_a_request_are_the_hosts(start: Start) -> None:
    layer, qkv = start(threshold=THRESHOLD).layer(), inputs(0, "cond", 0)
    bounds = torch.tensor([0, 100, TOKENS], dtype=torch.int32)
    out = layer.forward_varlen(*(x[0] for x in qkv), cu_seqlens=bounds, max_seqlen=220)
    expected = [dense(*(x[:, part] for x in qkv)) for part in (slice(0, 100), slice(100, TOKENS))]
    torch.testing.assert_close(out, torch.cat(expected, 1)[0])


def test_threads_have_memories_of_their_own(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()

    def run(request: Request, number: int, step: int) -> None:
        with server.step(request, step):
            qkv = inputs(0, "cond", step, request=number)
            torch.testing.assert_close(layer.forward(*qkv, None), by_hand(number, qkv))

    def run_all() -> None:
        try:
            other = Request()
            for step in range(3):
                run(other, 1, step)
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    run(request, 0, 0)
    run(request, 0, 1)
    thread = threading.Thread(target=run_all)
    thread.start()
    thread.join()
    assert not errors, errors
    run(request, 0, 2)
    assert by_hand.skipped > 0


@pytest.mark.parametrize("timesteps", [(999, 600, 200), (0.9, 0.5, 0.1), "tensors"], ids=["ints", "floats", "tensors"])
@pytest.mark.parametrize("named", [True, False], ids=["branches named", "not named"])
def test_a_context_may_tell_timesteps_in_place_of_steps(start: Start, timesteps: Any, named: bool) -> None:
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    if timesteps == "tensors":
        timesteps = torch.tensor([999.0, 600.0, 200.0]).unbind()
    for chunk in range(2):  # a pipeline may run its loop several times for a request
        for (step, timestep), branch in product(enumerate(timesteps), BRANCHES):
            with server.step(request, timestep, branch if named else "cond"):
                qkv = inputs(0, branch, step, request=chunk)
                torch.testing.assert_close(layer.forward(*qkv, None), by_hand((chunk, branch), qkv))
    assert by_hand.skipped > 0


@pytest.mark.parametrize("step", [None, -1, float("nan")])
def test_a_context_without_a_step_is_no_denoising(start: Start, step: Any) -> None:
    """An encoder, or a forward that fills a cache, between two steps."""
    server, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for number in range(3):
        with server.step(request, number):
            qkv = inputs(0, "cond", number)
            torch.testing.assert_close(layer.forward(*qkv, None), by_hand(0, qkv))
        with server.step(request, step):
            other = inputs(1, "cond", number)
            torch.testing.assert_close(layer.forward(*other, None), dense(*other))
    assert by_hand.skipped > 0


def test_a_loop_that_tells_no_request_is_known_by_its_steps(start: Start) -> None:
    """As LTX-2's: from the second step on, since encoders tell no request either, and always the first step."""
    server = start(threshold=THRESHOLD)
    layers = {name: server.layer(prefix=f"blocks.{name}") for name in ("attn1.attn.impl", "audio_attn1.attn.impl")}
    encoder = server.layer(prefix="encoder.0")
    for number in range(2):
        by_hand = ByHand(THRESHOLD)
        for told in (0, 0, None):
            with server.context(told, None):
                qkv = inputs(5, "cond", 0)
                torch.testing.assert_close(encoder.forward(*qkv, None), dense(*qkv))
        for step, branch in product(range(4), BRANCHES):
            with server.context(step, None):
                qkv = inputs(0, branch, step, request=number)
                expected = by_hand(branch, qkv) if step else dense(*qkv)
                torch.testing.assert_close(layers["attn1.attn.impl"].forward(*qkv, None), expected)
                torch.testing.assert_close(layers["audio_attn1.attn.impl"].forward(*qkv, None), dense(*qkv))
        assert by_hand.skipped > 0
    assert [record.site.name for record in encoder._served.store.records] == ["blocks.attn1.attn"]


def test_a_loop_that_tells_neither_request_nor_steps_is_dense_and_said_once(start: Start) -> None:
    server = start(threshold=THRESHOLD)
    layer, qkv = server.layer(), inputs(0, "cond", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for told in (0, 0, None, 999, 999, 700, 400, 0, None, 999, 500.0, torch.tensor(3.0)):
            with server.context(told, None):
                torch.testing.assert_close(layer.forward(*qkv, None), dense(*qkv))
    assert [str(warning.message).count("without a request") for warning in caught] == [1]
    assert not layer._served.store.records


@pytest.mark.parametrize("told", ["timesteps", "timestep", "nothing"])
def test_the_flows_time_is_the_timestep(start: Start, told: str) -> None:
    server = start(method="residual", keep=0.5)
    timesteps = torch.tensor([1000.0, 970.0, 900.0, 700.0])
    layer, request = server.layer(), Request(timesteps=timesteps if told == "timesteps" else None)
    for step, timestep in enumerate(timesteps):
        with server.step(request, timestep if told == "timestep" else step):
            layer.forward(*inputs(0, "cond", step), None)
        (record,) = layer._served.store.records
        time = float(record.last.times[0, 0])
        assert math.isnan(time) if told == "nothing" else time == float(timestep)


def test_a_preset_follows_the_steps_of_a_request(start: Start) -> None:
    server = start(preset="fast")
    layer = server.layer()
    for steps in (4, 20):
        with server.step(Request(num_inference_steps=steps), 0):
            layer.forward(*inputs(0, "cond", 0), None)
        (record,) = layer._served.store.records
        keep, full_every = preset_of("fast", steps)
        assert float(record.last.keep[0]) == pytest.approx(keep)
        assert record.last.plan[:12].tolist() == step_plan(12, full_every=full_every)
    assert preset_of("fast", 4) != preset_of("fast", 20)


def test_it_runs_in_inference_mode(start: Start) -> None:
    server, by_hand = start(threshold=THRESHOLD, exact_tokens=[[0, 8]]), ByHand(THRESHOLD)
    layer, request = server.layer(), Request()
    for step in range(3):
        qkv = inputs(0, "cond", step)
        with server.step(request, step), torch.inference_mode(step != 1):
            out = layer.forward(*qkv, None)
        expected = by_hand(0, qkv, must_do=[0, 8])
        first = by_hand.states[0].tile_m  # exact from the first to the last key, as the first tile is
        torch.testing.assert_close(out.clone()[:, first:], expected[:, first:])


def test_a_wrong_configuration_is_told_when_a_layer_is_made(start: Start) -> None:
    with pytest.raises(ValueError, match=r"config: expected options out of .* got \['treshold'\]"):
        start(treshold=-3.0).layer()


of_wheel = pytest.mark.skipif(hosts.folder(sglang_host.FOLDER) is None, reason=f"{sglang_host.FOLDER} names no wheel")


@of_wheel
def test_the_selector_of_the_wheel_takes_it_for_self_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, "wheel", {})
    select = server.module("layers.attention.selector").get_attn_backend
    chosen = {"selected_attention_backend": server.enum["LITE_ATTENTION"]}
    assert select(HEAD_DIM, torch.float32, **chosen) is server.backend
    assert select(HEAD_DIM, torch.float32, {server.enum["FA"]}, **chosen) is server.backend
    assert select(HEAD_DIM, torch.float32, **chosen, is_cross_attention=True).__name__ == "SDPABackend"
    requirements = server.module("layers.attention.backends.attention_backend").AttentionRequirements(True)
    assert select(HEAD_DIM, torch.float32, **chosen, attention_requirements=requirements) is server.backend


@of_wheel
def test_pipelines_without_a_request_are_named() -> None:
    root = hosts.folder(sglang_host.FOLDER)
    assert root is not None
    assert sglang_host.stages_without_request(root) == {*sglang_host.WITHOUT_REQUEST}
    text = " ".join(str(importlib.import_module("lite_attention.integrations.sglang").__doc__).split())
    assert all(name in text for name in sglang_host.WITHOUT_REQUEST.values())


@of_wheel
def test_minimax_h3_is_told_the_rows_of_its_video() -> None:
    root = hosts.folder(sglang_host.FOLDER)
    assert root is not None
    runtime = root.joinpath(*RUNTIME.split("."))
    stage = "pipelines_core/stages/model_specific_stages/minimax_h3/denoise_loop.py"
    told = '"img_pos_for_infer_output_info": {"position_ids": self.img_target_seq_idx}'
    assert told in (runtime / stage).read_text()
    assert '"img_pos_for_infer_output_info",' in (runtime / "models/dits/minimax_h3.py").read_text()


@of_wheel
@pytest.mark.parametrize("name", sglang_host.CLASSES)
def test_recorded_signatures_are_those_of_the_wheel(name: str) -> None:
    root, (path, function) = hosts.folder(sglang_host.FOLDER), sglang_host.CLASSES[name]
    assert root is not None
    assert hosts.source_parameters(root / RUNTIME.replace(".", "/"), path, name) == hosts.parameters(function)
