"""Presets: choices of the residual's options that need no number.

| preset | keep | every so many steps is full | computes of 20 steps | of 50 |
|---|---|---|---|---|
| quality | 30 % | 2 | 68.5 % | 66.4 % |
| balanced | 30 % | 3 | 58 % | 55.2 % |
| fast | 20 % | 3 | 52 % | 48.8 % |

In a generation of at most 8 steps, whose neighbors are far apart, each keeps 40 %, and every second step is full. So it
computes 77.5 % of 8 steps, and 85 % of 4. Steps that are not full compute what is kept.

All take two residuals for each layer and branch, each as large as the layer's output: on a GPU in FP8, 1.03 bytes a
number at a head dim of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lite_attention.ops.arguments import require
from lite_attention.ops.plan import SPARSE

__all__ = ["PRESETS", "Preset", "computed_share", "preset_of"]

_FEW_STEPS = 8  # the most that are few


class Preset(NamedTuple):
    """Options of method "residual"."""

    keep: float
    full_every: int


PRESETS = {"quality": Preset(0.3, 2), "balanced": Preset(0.3, 3), "fast": Preset(0.2, 3)}
_OF_FEW_STEPS = Preset(0.4, 2)


def preset_of(name: str, num_steps: int | None = None) -> Preset:
    """Return a preset for a generation of so many steps, None = not known.

    Raises:
        ValueError: there is no such preset.
    """
    require(name in PRESETS, "preset", f"one of {[*PRESETS]}", repr(name))
    return _OF_FEW_STEPS if num_steps is not None and num_steps <= _FEW_STEPS else PRESETS[name]


def computed_share(plan: Sequence[int], kept: float) -> float:
    """Return the share of tiles that steps of these kinds compute, 0 to 1, where sparse ones compute what is kept."""
    return sum(kept if kind == SPARSE else 1.0 for kind in plan) / len(plan)
