"""A model that is enabled, in CUDA graphs: captured by hand, and by `torch.compile`'s mode "reduce-overhead"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lite_attention
from lite_attention.model_sites import sites_of
from tests.support.toys import Toy, context, tokens

STEPS, SEQ, DIM = 8, 1500, 256  # two heads of 128
OPTIONS: dict[str, dict[str, Any]] = {
    "votes": {"threshold": -4.0},
    "residual": {"method": "residual", "keep": 0.3, "num_steps": STEPS},
    "fast": {"preset": "fast", "num_steps": STEPS},
}


def toy() -> Toy:
    return Toy(2, DIM, seed=0).to("cuda", torch.bfloat16)


def inputs(step: int) -> torch.Tensor:
    return tokens(step, seq=SEQ, dim=DIM).to("cuda", torch.bfloat16)


def states(model: torch.nn.Module) -> list[Any]:
    return [state for site in sites_of(model) if site.swapped for state in site.states]


def learned(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of the states, but who counts the steps: the model where it is eager, the op in a graph."""
    counting = ("control", "times")
    return [b for state in states(model) for name, b in state.named_buffers() if name not in counting]


def share_skipped(model: torch.nn.Module) -> float:
    shares = [float(state.sparsity()) for state in states(model)]
    return sum(shares) / len(shares)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(learned(one), learned(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_by_hand(options: dict[str, Any]) -> None:
    """Two generations of a captured step are those of an eager model, to the bit."""
    eager, captured = (lite_attention.enable(toy(), compile=False, **options) for _ in range(2))
    x, to = inputs(0), context(dim=DIM).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for model in (eager, captured):  # whose states are there before the capture
            model(x, to)
            lite_attention.reset(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = captured(x, to)
        for _ in range(2):
            for model in (eager, captured):
                lite_attention.reset(model)
            for step in range(STEPS):
                x.copy_(inputs(step))
                graph.replay()
                assert torch.equal(out, eager(inputs(step), to))
            assert same(eager, captured)
    assert share_skipped(captured) > 0.05


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_with_graphs(options: dict[str, Any]) -> None:
    """A model compiled with CUDA graphs follows one that is eager, over two generations."""
    eager = lite_attention.enable(toy(), compile=False, **options)
    compiled = lite_attention.enable(toy(), compile=True, mode="reduce-overhead", **options)
    to = context(dim=DIM).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for generation in range(3):  # the first ones warm up and capture
            for model in (eager, compiled):
                lite_attention.reset(model)
            for step in range(STEPS):
                want, got = (model(inputs(step), to).clone() for model in (eager, compiled))
                error = (got.float() - want.float()).norm() / want.float().norm()
                assert error < 0.02, f"generation {generation}, step {step}"
    assert share_skipped(eager) > 0.05
    assert abs(share_skipped(compiled) - share_skipped(eager)) < 0.02
