"""What the benchmarks of attention time: planted masks that stay, and residual steps of the kind that is named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import portable, residual_steps
from benchmarks.attention import runs_of_tiles
from lite_attention.cli.planted import planted, skipping
from lite_attention.ops import ResidualState, attention, step_plan
from lite_attention.ops.control import RESIDUALS, slot_word

HOW = {"quantization": "none", "implementation": "reference"}
SHAPE = 3, 2, 520, 2, 32  # of q, k and v: 9 x 9 tiles


def _inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(SHAPE)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_planted_mask_stays(quantization: str) -> None:
    q, k, v = _inputs()
    q += 2
    k[:, :64] += 2  # the other tiles would be voted out by a common threshold, not by that of planted masks
    mask = torch.rand(2, 9, 9) < 0.5
    state = planted(q, k, v, lambda *tiles: mask if tiles == (9, 9) else mask[:0], quantization=quantization)
    call, share = skipping(q, k, v, state, quantization=quantization)
    for _ in range(3):
        call()
        assert torch.equal(state.kept_tiles()[0], ~mask.expand(2, -1, -1, -1))
    assert share == pytest.approx(float(mask.float().mean()))


def test_runs_of_tiles_have_their_share_in_each_head() -> None:
    shares = torch.tensor([[0.0], [0.4], [0.8]])
    mask = partial(runs_of_tiles, shares)(50, 40)
    assert mask.shape == (3, 50, 40)
    assert mask.float().mean((1, 2)).tolist() == pytest.approx(shares.flatten().tolist(), abs=0.02)


@pytest.mark.parametrize(("kind", "words"), [  # residuals of the mask in use, masks decided, the mask in use
    ("sparse", [[2, 1, 1]] * 3),
    ("full", [[3, 1, 1], [4, 1, 1], [5, 1, 1]]),
    ("deciding", [[3, 2, 1], [1, 3, 2], [1, 4, 3]]),
    ("fresh", [[0, 1, 0]] * 3),
])  # fmt: skip
def test_a_step_is_of_its_kind_each_time(kind: str, words: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[ResidualState] = []

    def noted(*args: Any, **options: Any) -> ResidualState:
        states.append(in_use(*args, **options))
        return states[-1]

    in_use = residual_steps.in_use
    monkeypatch.setattr(residual_steps, "in_use", noted)
    call, share = residual_steps.step(*_inputs(), kind, 0.3, HOW)
    assert share == pytest.approx(0.7 if kind == "sparse" else 0.0, abs=0.01)
    first = slot_word(0, RESIDUALS)
    for expected in words:
        call()
        assert states[0].control[first : first + 3].tolist() == expected


def test_portable_has_rows_of_votes_and_of_residuals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the kernel runs here: the CPU's takes its place."""
    monkeypatch.setattr(portable, "IMPLEMENTATION", "reference")
    monkeypatch.setattr(portable, "attention_forward", lambda q, k, v, *_, **__: attention(q, k, v))
    ratios = portable.measure_shape((1, 2, 300, 64), portable.GROUPS, ["none", "int8"], 1e-4, "cpu")
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line[:42].rstrip() for line in lines[: len(ratios)]] == [*ratios]
    shares = {line[:42].rstrip(): line[76:85].strip() for line in lines[: len(ratios)]}
    for label in ("none", "int8"):
        assert {f"{label}, {kind} step" for kind in ("full", "deciding", "fresh")} <= ratios.keys()
        assert shares[f"{label}, sparse step, keep 20%"] == shares[f"{label}, votes, the mask of keep 20%"] == "80.0%"
    assert len([line for line in lines[len(ratios) :] if "full every" in line]) == 2 * 2 * 6
    few = portable.measure_shape((1, 1, 300, 64), ["votes"], ["int8_fp8"], 1e-4, "cpu")
    assert [*few][1:] == ["int8_fp8, mask in use, 0%", "int8_fp8, mask in use, 42%", "int8_fp8, mask in use, 77%"]


def test_generations_are_means_by_plan() -> None:
    ratios = dict.fromkeys(["votes, nothing skipped", "full step"], 1.0)
    ratios |= {"deciding step": 1.1, "fresh step": 1.5}
    for keep in ("20%", "30%"):
        ratios |= {f"votes, the mask of keep {keep}": 0.25, f"sparse step, keep {keep}": 0.3}
    of = {name: (cost, mean) for name, cost, mean, _ in residual_steps.generations(ratios, [""])}
    kinds = step_plan(20, full_every=5)
    expected = 1.5 + sum((0.3, 1.0, 1.1)[kind] for kind in kinds[1:])
    assert of["20 steps, keep 20%, full every 5"][1] == pytest.approx(expected / 20)
    assert of["20 steps, keep 20%, full every 5"][0] == pytest.approx(sum((0.2, 1, 1)[kind] for kind in kinds) / 20)
    del ratios["fresh step"]
    assert not [*residual_steps.generations(ratios, [""])]
