"""`use_int8` and `use_fp8` of the backend, the export pass and `enable`: the eager op's numbers, and which sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lite_attention
from lite_attention import cute_kernels
from lite_attention.compile import make_skip_aware, skip_states
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.store import StateStore
from lite_attention.ops import Session
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.site import Site
from lite_attention.ops.targets import SM90A
from tests.support.diffusers_models import silent_report
from tests.support.toys import (
    TILE,
    Attention,
    Inner,
    Reference,
    Toy,
    assert_same_states,
    compile_toy,
    context,
    tokens,
    toy_backend,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
OPTIONS: dict[str, Any] = {"threshold": -4.0, "tile_shape": TILE}
# Another order of sums moves a value by one of 127 steps here and there.
NEAR = {"rtol": 0.02, "atol": 0.02}

Switches = dict[str, bool]


@pytest.fixture(params=["int8", "int8_fp8"])
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def switches(quantization: str) -> Switches:
    return {"use_int8": True, "use_fp8": quantization == "int8_fp8"}


def assert_runs(run: Any, model: nn.Module, quantization: str, *more: torch.Tensor, **tolerance: float) -> Reference:
    """Run three steps against the eager op: the same as with this quantization, and unlike those with another."""
    reference = Reference(model, quantization=quantization)
    others = [Reference(model, quantization=other) for other in QUANTIZATIONS if other != quantization]
    for step in range(3):
        with torch.no_grad():
            out = run(tokens(step), *more)
        want = reference(tokens(step), *more)
        torch.testing.assert_close(out, want, **(tolerance or {"rtol": 0, "atol": 1e-6}))
    assert not any(torch.allclose(want, other(tokens(2), *more), rtol=1e-3, atol=1e-3) for other in others)
    assert reference.skipped > 0
    return reference


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_backend(how: str, quantization: str, switches: Switches) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(2), toy_backend(inner, **switches)
    before = Toy(2)
    reference = assert_runs(compile_toy(model, backend, how, fullgraph=True), before, quantization, context())
    assert_same_states(backend, model, reference)
    assert {node.kwargs["quantization"] for node in inner.calls()} == {quantization}


def test_inductor(quantization: str, switches: Switches) -> None:
    model, backend = Attention(), toy_backend("inductor", **switches)
    assert_runs(torch.compile(model, backend=backend, fullgraph=True), model, quantization, **NEAR)


def test_dynamic_shapes(quantization: str, switches: Switches) -> None:
    model, backend = Attention(), toy_backend("aot_eager", **switches)
    reference = Reference(model, quantization=quantization)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for step, (batch, seq) in enumerate([(2, 96), (2, 96), (3, 130), (2, 96)]):
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens(step, batch, seq)), reference(tokens(step, batch, seq)))
    assert_same_states(backend, model, reference)


def test_dense_sites_are_not_quantized(switches: Switches) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(1), toy_backend(inner, dense="kernel", select=lambda site: False, **switches)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(0), context()), model(tokens(0), context()), rtol=1e-4, atol=1e-4)
    assert len(inner.calls(torch.ops.lite_attention.attention.default)) == 2
    assert inner.calls() == []


# ---- enable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"compile": False}, {"inner": "aot_eager"}], ids=["eager", "compiled"])
def test_enable(how: dict[str, Any], quantization: str, switches: Switches) -> None:
    model = Toy(2)
    before = Toy(2)
    lite_attention.enable(model, num_steps=4, **OPTIONS, **switches, **how)
    reference = assert_runs(model, before, quantization, context())
    report = silent_report(model)
    assert {row.name for row in report.swapped} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert sum(int((~row.state.kept_tiles()).sum()) for row in report.swapped) == reference.skipped


def test_enable_tells_a_wrong_switch_before_anything_changes() -> None:
    model = Toy(1)
    with pytest.raises(ValueError, match="use_int8: expected True or False, got 'int8'"):
        lite_attention.enable(model, use_int8="int8")
    with pytest.raises(ValueError, match="use_fp8: expected use_int8=True beside it, got use_int8=False"):
        lite_attention.enable(model, use_fp8=True)
    assert model._compiled_call_impl is None


# ---- torch.export --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
def test_export_round_trip(decomposed: bool, quantization: str, switches: Switches, tmp_path: Path) -> None:
    model = Toy(2)
    program = make_skip_aware(torch.export.export(model, (tokens(0), context())), **OPTIONS, **switches)
    if decomposed:
        program = program.run_decompositions({})
    torch.export.save(program, tmp_path / "program.pt2")
    for each in (program, torch.export.load(tmp_path / "program.pt2")):
        module = each.module()
        reference = assert_runs(module, model, quantization, context())
        states = skip_states(module)
        assert sum(int((~state.kept_tiles()).sum()) for state in states.values()) == reference.skipped


@pytest.mark.slow
def test_aot_inductor(quantization: str, switches: Switches, tmp_path: Path) -> None:
    model = Attention()
    program = make_skip_aware(torch.export.export(model, (tokens(0),)), **OPTIONS, **switches)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    assert_runs(torch._inductor.aoti_load_package(path), model, quantization, **NEAR)


# ---- which sites ---------------------------------------------------------------------------------------------------


def _site(head_dim: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Site:
    shape = (1, 4096, 2, head_dim)
    return Site("attn", "Attention", 0, shape, shape, shape, dtype, torch.device(device))


@pytest.mark.parametrize("options", [{}, {"tile_shape": (192, 80)}, {"implementation": "reference"}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_other_head_dims_stay_dense_on_hopper(
    head_dim: int, options: dict[str, Any], quantization: str, switches: Switches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cute_kernels, "unsupported_reason", lambda *_, **__: None)  # a kernel for each, but for these
    settings = SkipSettings(**switches, **options)
    reason = settings.unsupported_reason(_site(head_dim))
    if head_dim in SM90A.head_dims(quantization):
        assert reason is None
    else:
        assert reason is not None
        assert reason.endswith(f" for '{quantization}', got {head_dim}")
    assert settings.unsupported_reason(_site(head_dim, torch.float32, "cpu")) is None
    assert SkipSettings(**options).unsupported_reason(_site(head_dim)) is None


def test_float32_stays_dense_on_hopper(switches: Switches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = SkipSettings(**switches).unsupported_reason(_site(128, torch.float32))
    assert reason is not None
    assert "bfloat16 and float16, got torch.float32" in reason


def test_a_state_belongs_to_tiles_and_a_device(
    quantization: str, switches: Switches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has other tiles, as another dtype or device may, has another state; what comes back finds its own."""
    store, owner = StateStore(SkipSettings(**switches), Session()), nn.Linear(1, 1)
    record = store.record([owner], (), _site(64, torch.float32, "cpu"))
    cpu, sizes = torch.device("cpu"), (1, 256, 256)
    state = store.state(record, sizes, cpu)
    assert (state.tile_m, state.tile_n) == (64, 64)
    seen = []

    def tile_shape(*args: Any) -> tuple[int, int]:
        seen.append(args)
        return 32, 16

    with monkeypatch.context() as patch:
        patch.setattr("lite_attention.compile.settings.tile_shape", tile_shape)
        other = store.state(record, sizes, cpu)
        elsewhere = store.state(record, sizes, torch.device("meta"))
    assert (other.tile_m, other.tile_n) == (32, 16)
    assert seen[0] == (64, torch.float32, cpu, quantization, None)
    assert seen[-1] == (64, torch.float32, torch.device("meta"), quantization, None)
    assert elsewhere.control.is_meta
    assert store.state(record, sizes, cpu) is state
    assert len(record.states) == 3
