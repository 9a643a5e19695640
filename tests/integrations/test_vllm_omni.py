"""vLLM-Omni's backend: where it is found, how it tells steps, branches and generations, and what it leaves alone."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lite_attention.ops.control import STEP, slot_word
from lite_attention.presets import preset_of
from tests.support import hosts, vllm_omni_host
from tests.support.served_calls import HEAD_DIM, HEADS, TOKENS, ByHand, inputs

DIFFUSION = "vllm_omni.diffusion"
THRESHOLD = -3.0
BRANCHES = ("cond", "uncond")


@pytest.fixture(params=hosts.kinds(vllm_omni_host.FOLDER))
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Start:
    return lambda **config: Worker(monkeypatch, request.param, config)


class Worker:
    """A worker that has found our plug-in, with a configuration in its environment."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, config: dict[str, Any]) -> None:
        vllm_omni_host.install(patch, kind)
        patch.setenv("LITE_ATTENTION_CONFIG", json.dumps(config))
        self.plugin = importlib.import_module("lite_attention.integrations.vllm_omni")
        self.plugin.register()
        self.enum = self.module("attention.backends.registry").DiffusionAttentionBackendEnum
        self.mixin = self.module("distributed.cfg_parallel").CFGParallelMixin
        self.metadata = self.module("attention.backends.abstract").AttentionMetadata
        self.context = self.module("forward_context")

    @staticmethod
    def module(name: str) -> Any:
        return importlib.import_module(f"{DIFFUSION}.{name}")

    def layer(self, number: int = 0, **options: Any) -> Any:
        kwargs = {
            "causal": False, "num_kv_heads": HEADS, "qkv_layout": None, "backend_kwargs": None, "role": "self",
            "prefix": f"blocks.{number}.attn1", "backend_explicit": True, **options,
        }  # fmt: skip
        impl = self.enum["LITE_ATTENTION"].get_class().get_impl_cls()
        return impl(num_heads=HEADS, head_size=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5, **kwargs)

    def pipeline(self, *layers: Any) -> Any:
        """Return a pipeline whose model has these layers."""

        class Pipeline(self.mixin):  # type: ignore[misc, name-defined]
            def predict_noise(self, branch: str, calls: list[Any], expected: list[Any]) -> torch.Tensor:
                for layer, qkv, out in zip(layers, calls, expected, strict=True):
                    torch.testing.assert_close(layer.forward(*qkv, None), out)
                return torch.zeros(1)

        return Pipeline()


Start = Callable[..., Worker]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def passes(by_hand: ByHand, step: int, request: int, branches: tuple[str, ...] = BRANCHES) -> list[dict[str, Any]]:
    """Return the arguments of the passes of a step, with what each layer is to give."""
    found = []
    for branch in branches:
        calls = [inputs(i, branch, step, request=request) for i in range(2)]
        expected = [by_hand((i, branch), qkv) for i, qkv in enumerate(calls)]
        found.append({"branch": branch, "calls": calls, "expected": expected})
    return found


def test_the_backend_has_a_name_that_is_found(start: Start) -> None:
    worker = start()
    member = worker.enum["LITE_ATTENTION"]
    assert worker.enum(member.value) is member
    backend = member.get_class()
    assert member.get_path() == f"{backend.__module__}.{backend.__qualname__}"
    assert backend.get_name() == "LITE_ATTENTION"
    assert backend.supports_head_size(HEAD_DIM)
    assert backend.supports_attention_mask()
    assert backend.supported_platforms == ("cuda",)
    backend.validate_available()


def test_registering_again_changes_nothing(start: Start) -> None:
    worker = start()
    members, method = list(worker.enum), worker.mixin.predict_noise_maybe_with_cfg
    worker.plugin.register()
    assert list(worker.enum) == members
    assert worker.mixin.predict_noise_maybe_with_cfg is method


def test_a_host_without_a_place_for_it_goes_on_without(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start()
    monkeypatch.setattr(worker.module("distributed.cfg_parallel"), "CFGParallelMixin", type("Other", (), {}))
    worker.plugin.register()
    monkeypatch.delattr(worker.module("distributed.cfg_parallel"), "CFGParallelMixin")
    with pytest.warns(UserWarning, match="does not get the backend LITE_ATTENTION: cannot import name"):
        worker.plugin.register()


@pytest.mark.parametrize("told", ["nothing", "timestep", "step"])
def test_a_memory_for_each_layer_and_branch_begins_with_each_request(start: Start, told: str) -> None:
    worker = start(threshold=THRESHOLD)
    pipeline = worker.pipeline(worker.layer(0), worker.layer(1))
    for request in range(2):
        by_hand = ByHand(THRESHOLD)
        with worker.context.set_forward_context():
            for step in range(3):
                if told == "step":
                    worker.context.set_forward_context_denoise_step_idx(step)
                elif told == "timestep":
                    worker.context.set_forward_context_denoise_timestep(1 - step / 3)
                positive, negative = passes(by_hand, step, request)
                pipeline.predict_noise_maybe_with_cfg(True, 0.5, positive, negative, cfg_normalize=False)
        assert by_hand.skipped > 0.05
        for record in worker.layer(9)._served.store.records:
            assert [int(record.last.control[slot_word(slot, STEP)]) for slot in (0, 1)] == [2, 2]


def test_a_pass_that_a_step_leaves_out_keeps_its_memory(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    pipeline = worker.pipeline(worker.layer(0), worker.layer(1))
    with worker.context.set_forward_context():
        for step, branches in enumerate([BRANCHES, ("cond",), BRANCHES]):
            positive, *negative = passes(by_hand, step, 0, branches)
            pipeline.predict_noise_maybe_with_cfg(bool(negative), 0.5, positive, negative[0] if negative else None)
    assert by_hand.skipped > 0.05


def test_a_rank_that_runs_the_negative_pass_alone(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    pipeline = worker.pipeline(worker.layer(0), worker.layer(1))
    around = worker.plugin._round

    def second_rank(self: Any, positive_kwargs: Any, negative_kwargs: Any) -> Any:
        return self.predict_noise(**negative_kwargs)

    with worker.context.set_forward_context():
        for step in range(3):
            negative = passes(by_hand, step, 0, ("uncond",))[0]
            around(second_rank, pipeline, passes(ByHand(THRESHOLD), step, 0, ("cond",))[0], negative)
    assert by_hand.skipped > 0.05
    session = worker.layer(9)._served.store.session
    assert session.branches == {"branch 1": 0}


def test_many_branches(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    pipeline = worker.pipeline(worker.layer(0), worker.layer(1))
    type(pipeline).combine_multi_branch_cfg_noise = lambda self, predictions, *args: predictions[0]
    with worker.context.set_forward_context():
        for step in range(3):
            branches = passes(by_hand, step, 0)
            third = [inputs(i, "cond", step, request=7) for i in range(2)]
            expected = [by_hand((i, "third"), qkv) for i, qkv in enumerate(third)]
            branches.append({"branch": "third", "calls": third, "expected": expected})
            pipeline.predict_noise_with_multi_branch_cfg(True, 0.5, branches)
    assert by_hand.skipped > 0.05


def test_a_context_for_each_step_goes_on_while_steps_do(start: Start) -> None:
    worker = start(threshold=THRESHOLD)
    pipeline = worker.pipeline(worker.layer(0), worker.layer(1))
    for request in range(2):
        by_hand = ByHand(THRESHOLD)
        for step in range(3):
            with worker.context.set_forward_context(denoise_step_idx=step):
                pipeline.predict_noise_maybe_with_cfg(True, 0.5, *passes(by_hand, step, request))
        assert by_hand.skipped > 0.05


def test_a_model_that_is_called_by_itself_runs_a_layer_once_in_a_forward(start: Start) -> None:
    worker = start(threshold=THRESHOLD)
    layers = [worker.layer(0), worker.layer(1)]
    for request in range(2):
        by_hand = ByHand(THRESHOLD)
        with worker.context.set_forward_context():
            for step in range(3):
                for i, layer in enumerate(layers):
                    qkv = inputs(i, "cond", step, request=request)
                    torch.testing.assert_close(layer.forward(*qkv, None), by_hand(i, qkv))
        assert by_hand.skipped > 0.05


def test_passes_of_a_timestep_are_told_apart_by_their_order(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layers = [worker.layer(0), worker.layer(1)]
    with worker.context.set_forward_context():
        for step in range(3):
            worker.context.set_forward_context_denoise_timestep(1 - step / 3)
            for branch in BRANCHES:
                for i, layer in enumerate(layers):
                    qkv = inputs(i, branch, step)
                    torch.testing.assert_close(layer.forward(*qkv, None), by_hand((i, branch), qkv))
    assert by_hand.skipped > 0.05


def test_a_method_that_calls_the_one_it_overrides_makes_one_pass(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    base = worker.pipeline(worker.layer(0), worker.layer(1))
    first, second = (worker.layer(i) for i in (2, 3))

    class Derived(type(base)):  # type: ignore[misc]
        def predict_noise(self, branch: str, calls: list[Any], expected: list[Any]) -> Any:
            torch.testing.assert_close(first.forward(*calls[0], None), expected[0])
            out = super().predict_noise(branch, calls, expected)
            torch.testing.assert_close(second.forward(*calls[1], None), expected[1])
            return out

    derived, other = Derived(), ByHand(THRESHOLD)
    with worker.context.set_forward_context():  # both methods are known from here on
        base.predict_noise_maybe_with_cfg(False, 1.0, passes(other, 0, 5)[0], None)
    with worker.context.set_forward_context():
        for step in range(3):
            derived.predict_noise_maybe_with_cfg(True, 0.5, *passes(by_hand, step, 0))
    served = first._served.store
    assert {len(record.states) for record in served.records} == {1}
    assert served.session.steps == 3
    assert len(served.records) == 4
    assert by_hand.skipped > 0.05


def test_masks_of_keys_are_taken_and_others_are_the_hosts(start: Start) -> None:
    worker, by_hand = start(threshold=THRESHOLD), ByHand(THRESHOLD)
    layer, keys = worker.layer(), torch.ones(1, TOKENS, dtype=torch.bool)
    keys[:, 300:] = False
    pairs = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with worker.context.set_forward_context():
        for step in range(3):
            qkv = inputs(0, "cond", step)
            mask = (keys, keys.int(), keys[:, None, None])[step]
            out = layer.forward(*qkv, worker.metadata(attn_mask=mask))
            torch.testing.assert_close(out, by_hand(0, qkv, key_mask=keys))
            out = layer.forward(*qkv, worker.metadata(attn_mask=pairs))
            torch.testing.assert_close(out, dense(*qkv, attn_mask=pairs))
    assert by_hand.skipped > 0.05


def test_a_mask_that_is_added_is_the_hosts(start: Start) -> None:
    """Its zeros are what takes part."""
    worker, added = start(threshold=THRESHOLD), torch.zeros(1, 1, 1, TOKENS)
    added[..., 300:] = float("-inf")
    with worker.context.set_forward_context():
        for step in range(3):
            qkv = inputs(0, "cond", step)
            out = worker.layer().forward(*qkv, worker.metadata(attn_mask=added))
            torch.testing.assert_close(out, dense(*qkv, attn_mask=added))


@pytest.mark.parametrize("kind", ["prefix", "spans", "all of it", "nothing"])
def test_what_stands_beside_the_video_is_exact(start: Start, kind: str) -> None:
    worker = start(threshold=0.0)
    abstract = worker.module("attention.backends.abstract")
    span = abstract.VideoTokenSpan
    spans = span(0, (2, 4, 4), "reference"), span(64, (4, 8, 8), "target")
    layout = {
        "prefix": abstract.VideoTokenLayout(64, (4, 8, 8)),
        "spans": abstract.VideoTokenLayout(used_len=TOKENS, video_spans=spans),
        "all of it": abstract.VideoTokenLayout(0, (5, 8, 8)),
        "nothing": None,
    }[kind]
    layer = worker.layer()
    with worker.context.set_forward_context():
        for step in range(3):
            qkv = inputs(0, "cond", step)
            out = layer.forward(*qkv, worker.metadata(video_layout=layout))
            is_exact = torch.allclose(out[:, :64], dense(*qkv)[:, :64], atol=1e-5)
            assert is_exact == (step == 0 or kind in ("prefix", "spans"))
            assert step == 0 or not torch.allclose(out, dense(*qkv), atol=1e-5)
    (record,) = layer._served.store.records
    kept = record.last.kept_tiles()[0]
    assert kept[..., 0].all() == (kind in ("prefix", "spans"))


@pytest.mark.parametrize(("exact", "is_dense"), [("auto", True), ([], False)])
def test_layers_of_audio_are_exact(start: Start, exact: Any, is_dense: bool) -> None:
    worker = start(threshold=THRESHOLD, exact_tokens=exact)
    layers = {name: worker.layer(prefix=f"transformer_blocks.0.{name}") for name in ("audio_attn1", "attn1")}
    with worker.context.set_forward_context():
        for step in range(3):
            for layer in layers.values():
                layer.forward(*inputs(0, "cond", step), None)
    names = {record.site.name for record in layers["attn1"]._served.store.records}
    assert names == {f"transformer_blocks.0.{name}" for name in layers if name == "attn1" or not is_dense}


SPANS = [[(64, TOKENS)]]  # causal before


@pytest.mark.parametrize("has_mask", [True, False])
def test_attention_that_is_causal_outside_of_spans_is_the_hosts(
    start: Start, monkeypatch: pytest.MonkeyPatch, has_mask: bool
) -> None:
    worker = start(threshold=THRESHOLD)
    sdpa = worker.module("attention.backends.sdpa")
    pairs = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    pairs[..., 64:, :] = True
    if not has_mask:  # a dense backend that reads the spans

        def forward(self: Any, query: Any, key: Any, value: Any, metadata: Any) -> torch.Tensor:
            return dense(query, key, value, attn_mask=pairs) if metadata.full_attn_spans else query

        monkeypatch.setattr(sdpa.SDPABackend, "supports_piecewise_spans", True, raising=False)
        monkeypatch.setattr(sdpa.SDPABackend.get_impl_cls(), "forward", forward)
    layer = worker.layer()
    assert worker.enum["LITE_ATTENTION"].get_class().supports_piecewise_spans
    with worker.context.set_forward_context():
        for step in range(3):
            qkv = inputs(0, "cond", step)
            metadata = worker.metadata(attn_mask=pairs if has_mask else None, full_attn_spans=SPANS)
            torch.testing.assert_close(layer.forward(*qkv, metadata), dense(*qkv, attn_mask=pairs))
    assert not layer._served.store.records


def test_spans_that_nobody_can_compute_are_refused(start: Start) -> None:
    worker = start(threshold=THRESHOLD)
    layer, qkv = worker.layer(), inputs(0, "cond", 0)
    with worker.context.set_forward_context(), pytest.raises(ValueError, match="full_attn_spans: expected none, or"):
        layer.forward(*qkv, worker.metadata(full_attn_spans=SPANS))


@pytest.mark.parametrize("options", [{"causal": True}, {"role": "cross"}, {"role": "video.cross"}])
def test_what_does_not_skip_is_the_hosts(start: Start, options: dict[str, Any]) -> None:
    worker = start(threshold=THRESHOLD)
    layer = worker.layer(**options)
    with worker.context.set_forward_context():
        for step in range(2):
            qkv = inputs(0, "cond", step)
            torch.testing.assert_close(layer.forward(*qkv, None), dense(*qkv, is_causal=options.get("causal", False)))
    assert not layer._served.store.records


@pytest.mark.parametrize("profile", [True, None], ids=["memory profile", "no context"])
def test_calls_outside_of_requests_are_the_hosts(start: Start, profile: bool | None) -> None:
    worker = start(threshold=THRESHOLD)
    layer, qkv = worker.layer(), inputs(0, "cond", 0)
    if profile is None:
        out = layer.forward(*qkv, None)
    else:
        with worker.context.set_forward_context(in_diffusion_kv_memory_profile=profile):
            out = layer.forward(*qkv, None)
    torch.testing.assert_close(out, dense(*qkv))
    assert not layer._served.store.records


def test_a_preset_follows_the_steps_of_a_request(start: Start) -> None:
    worker = start(preset="fast")
    layer = worker.layer()
    for steps in (4, 20):
        with worker.context.set_forward_context(denoise_step_idx=0):
            worker.context.set_forward_context_denoise_total_steps(steps)
            layer.forward(*inputs(0, "cond", 0), None)
        (record,) = layer._served.store.records
        assert float(record.last.keep[0]) == pytest.approx(preset_of("fast", steps).keep)
    assert preset_of("fast", 4) != preset_of("fast", 20)


def test_ring_attention_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start()
    monkeypatch.setattr(vllm_omni_host.config, "parallel_config", SimpleNamespace(ring_degree=2))
    with pytest.raises(ValueError, match="ring_degree: expected 1 with LITE_ATTENTION, got 2"):
        worker.layer()


def test_the_configuration_may_be_a_file(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = start()
    (tmp_path / "options.json").write_text('{"threshold": -7.0}')
    monkeypatch.setenv("LITE_ATTENTION_CONFIG", str(tmp_path / "options.json"))
    assert worker.layer()._served.options.settings.threshold == -7.0


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"treshold": -3}', "options out of"), ("{oops", "expected JSON"), ("[1]", "No such file"), ("", None)],
)
def test_a_wrong_configuration_is_told_before_a_model_is_made(
    start: Start, monkeypatch: pytest.MonkeyPatch, config: str, message: str | None
) -> None:
    backend = start().enum["LITE_ATTENTION"].get_class()
    monkeypatch.setenv("LITE_ATTENTION_CONFIG", config)
    if message is None:
        backend.validate_available()
    else:
        with pytest.raises((ValueError, OSError), match=message):
            backend.validate_available()


@pytest.mark.skipif(hosts.folder(vllm_omni_host.FOLDER) is None, reason=f"{vllm_omni_host.FOLDER} names no wheel")
@pytest.mark.parametrize("name", vllm_omni_host.CLASSES)
def test_recorded_signatures_are_those_of_the_wheel(name: str) -> None:
    root, (path, function) = hosts.folder(vllm_omni_host.FOLDER), vllm_omni_host.CLASSES[name]
    assert root is not None
    assert hosts.source_parameters(root / DIFFUSION.replace(".", "/"), path, name) == hosts.parameters(function)
