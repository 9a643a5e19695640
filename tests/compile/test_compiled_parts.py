"""Parts of an eagerly enabled model that torch.compile has compiled: they run as they are, and have a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention.flex_attention import flex_attention

import lite_attention
from lite_attention.calibration.probe import AttentionProbe
from lite_attention.compile.origins import Origins
from tests.support.diffusers_models import silent_report
from tests.support.toys import TILE, Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


def _fusing(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """Compile to code whose ops nobody sees, as those that inductor fuses into a kernel."""

    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return gm(*args)

    return run


class _Norm(nn.Module):
    def __init__(self, compiled: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compiled(x, (32,))


def _attending(attend: Callable[..., torch.Tensor]) -> nn.Module:
    model = Toy(2)
    for block in model.blocks:
        block.attn1.attend = attend
    return model


def _normed(backend: Any) -> nn.Module:
    model, norm = Toy(2), _Norm(torch.compile(F.layer_norm, backend=backend))
    for block in model.blocks:
        block.attn1.norm_q = block.attn2.norm_q = norm
    return model


def _of_compiled_blocks(backend: Any) -> nn.Module:
    model = Toy(2)
    model.blocks = nn.ModuleList(torch.compile(block, backend=backend, fullgraph=True) for block in model.blocks)
    return model


FLEX = "another attention backend: FlexAttention"
APART = "torch.compile has compiled it apart from the model"
CROSS, UNLIKE = "cross-attention", "no evidence of self-attention in the graph, and lengths differ"
BLOCKS = [f"blocks.{i}.attn{j}" for i in range(2) for j in (1, 2)]
# How a model is made; what the rows of attn1 and attn2 say where the ops of compiled code are seen, and where not.
PARTS: dict[str, tuple[Callable[[Any], nn.Module], tuple[str | None, ...], tuple[str | None, ...]]] = {
    "attention": (
        lambda b: _attending(torch.compile(F.scaled_dot_product_attention, backend=b)), (None, CROSS), (APART, CROSS)),
    "FlexAttention": (lambda b: _attending(torch.compile(flex_attention, backend=b)), (FLEX, CROSS), (FLEX, CROSS)),
    "FlexAttention that compiles itself": (lambda _: _attending(flex_attention), (FLEX, CROSS), (FLEX, CROSS)),
    "a norm of the queries": (_normed, (None, CROSS), (None, UNLIKE)),
    "nothing": (
        lambda _: _attending(torch.compiler.disable(lambda *qkv: F.scaled_dot_product_attention(*qkv))),
        (None, CROSS), (None, CROSS),
    ),
}  # fmt: skip
BACKENDS = pytest.mark.parametrize("backend", ["eager", _fusing])


def _run(model: nn.Module, step: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(step), context())


def _enable(model: nn.Module, **options: Any) -> nn.Module:
    return lite_attention.enable(model, compile=False, tile_shape=TILE, num_steps=4, **options)


@BACKENDS
@pytest.mark.parametrize("part", PARTS)
def test_compiled_parts_run_as_they_are(part: str, backend: Any) -> None:
    build, seen, fused = PARTS[part]
    model = build(backend)
    dense = _run(model)
    _enable(model, threshold=-math.inf)
    for _ in range(2):
        torch.testing.assert_close(_run(model), dense, rtol=1e-5, atol=1e-5)
    reasons = seen if backend == "eager" else fused
    rows = {row.name: row.reason for row in silent_report(model).rows}
    assert rows == dict(zip(BLOCKS, reasons * 2, strict=True))
    lite_attention.disable(model)
    assert torch.equal(_run(model), dense)


@pytest.mark.slow
def test_flex_attention_that_inductor_fused_has_a_row() -> None:
    model = _attending(torch.compile(flex_attention))
    dense = _run(model)
    _enable(model, threshold=-math.inf)
    for _ in range(2):
        torch.testing.assert_close(_run(model), dense, rtol=1e-5, atol=1e-5)
    assert [row.reason for row in silent_report(model).rows] == [FLEX, CROSS] * 2


@BACKENDS
def test_blocks_that_were_compiled_before_have_rows(backend: Any) -> None:
    model = _of_compiled_blocks(backend)
    dense = _run(model)
    _enable(model, threshold=-math.inf)
    for _ in range(2):
        torch.testing.assert_close(_run(model), dense, rtol=1e-5, atol=1e-5)
    assert {row.name for row in silent_report(model).rows} == {"blocks.0", "blocks.1"}


@BACKENDS
def test_blocks_that_are_compiled_later_have_rows(backend: Any) -> None:
    model = Toy(2)
    dense = _run(model)
    _enable(model, threshold=-math.inf)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(_run(model), dense, rtol=1e-5, atol=1e-5)
    assert {row.name for row in silent_report(model).rows} == {""}
    assert {row.reason for row in silent_report(model).rows} == ({None, CROSS} if backend == "eager" else {APART})


@BACKENDS
def test_what_a_compiled_norm_hides_still_skips(backend: Any) -> None:
    model = _normed(backend)
    _enable(model, threshold=-4.0)
    for step in range(3):
        _run(model, step)
    rows = {row.name: row.sparsity for row in silent_report(model).swapped}
    assert rows.keys() == {"blocks.0.attn1", "blocks.1.attn1"}
    assert max(map(max, rows.values())) > 0


@BACKENDS
def test_a_model_with_compiled_parts_is_measured(backend: Any) -> None:
    model = _normed(backend)
    for block in model.blocks:
        block.attn2 = torch.compile(block.attn2, backend=backend, fullgraph=True)
    dense = _run(model)
    with AttentionProbe(model, num_steps=4, tile_shape=TILE):
        torch.testing.assert_close(_run(model), dense, rtol=1e-5, atol=1e-5)


# ---- where tensors come from -----------------------------------------------------------------------------------------


def _origins() -> tuple[Origins, nn.Module, torch.Tensor, torch.Tensor]:
    model, x, y = nn.Linear(4, 4), torch.ones(4), torch.ones(4)
    origins = Origins(model)
    origins.add_new((x, y))
    return origins, model, x, y


def test_same_inputs() -> None:
    origins, model, x, y = _origins()
    weight, hidden, both, partly = model.weight, torch.ones(4), torch.ones(4), torch.ones(4)
    origins.track((x, y), both, False)
    origins.track((x, hidden), partly, False)
    cases = [
        (x, x, True), (x, y, False), (both, x, False), (weight, x, False), (weight, weight, None),
        (hidden, x, None), (x, hidden, None), (hidden, hidden, None), (partly, x, True), (partly, y, False),
        (partly, both, None),
    ]  # fmt: skip
    for query, key, expected in cases:
        assert origins.are_same(query, key) is expected


def test_a_new_tensor_has_nothing_of_a_freed_one() -> None:
    origins, _, x, _ = _origins()
    for _ in range(100):
        freed = torch.ones(4)
        origins.track(x, freed, False)
        del freed
        assert origins.are_same(torch.ones(4), x) is None
