"""The benchmark of a forward times what it says: steps that are told apart, of the kind and share asked for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import lite_attention
from benchmarks.model import over_steps
from benchmarks.model_variants import Variants
from lite_attention.inspection import named_states
from lite_attention.ops import control as c
from lite_attention.ops import step_plan
from lite_attention.ops.plan import DECIDING, FULL, SPARSE


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """Of a tiny Wan on the CPU: 192 tokens."""
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=64, num_layers=1, in_channels=16, out_channels=16,
        text_dim=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 16, 16), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }  # fmt: skip
    enable = functools.partial(lite_attention.enable, inner="eager", tile_shape=(16, 16))
    monkeypatch.setattr(lite_attention, "enable", enable)
    return Variants(model.eval().requires_grad_(False), inputs)


def state_of(variants: Variants) -> Any:
    (state,) = named_states(variants.model).values()
    return state


@pytest.mark.filterwarnings("error:lite_attention")
def test_votes_skip_what_is_planted_at_every_call(variants: Variants) -> None:
    call = variants.ours()
    for share in (0.0, 0.6):
        skipped = variants.plant(call, share)
        assert skipped == pytest.approx(share, abs=0.1)
        for _ in range(3):
            call()
        assert float(state_of(variants).sparsity()) == pytest.approx(skipped)
        assert all(row.note is None for row in lite_attention.report(variants.model).swapped)


@pytest.mark.filterwarnings("error:lite_attention")
def test_steps_of_the_residual_become_of_a_kind(variants: Variants) -> None:
    call = variants.residual()
    for kind, keep in ((FULL, 0.2), (DECIDING, 0.2), (SPARSE, 0.2), (SPARSE, 0.4)):
        skipped = variants.become(call, kind, keep)
        assert skipped == pytest.approx(1 - keep, abs=0.01)
        before = words_of(variants)
        call()
        residuals, decided, taken = (now - then for now, then in zip(words_of(variants), before, strict=True))
        assert (decided, taken) == ((1, 1) if kind == DECIDING else (0, 0))
        if kind != DECIDING:  # which takes another mask, and so begins to count again
            assert residuals == (kind == FULL)
            assert before[0] >= 2  # enough to forecast


def words_of(variants: Variants) -> list[int]:
    words = c.control_list(state_of(variants).control)
    return [words[c.slot_word(0, field)] for field in (c.RESIDUALS, c.DECIDED, c.TAKEN)]


def test_a_generation_is_the_mean_of_its_steps() -> None:
    of_kind = {SPARSE: 0.5, FULL: 1.0, DECIDING: 1.1}
    assert over_steps(of_kind, step_plan(7, full_every=3)) == pytest.approx((1.1 + 1 + 0.5 + 1.1 + 0.5 + 0.5 + 1) / 7)
