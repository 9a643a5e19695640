"""Presets: choices of the residual's options that need no number.

| preset | keep | full every | computes of 20 steps | of 50 steps | PSNR, 20 steps |
|---|---|---|---|---|---|
| quality | 50 % | 2 | 77.5 % | 76 % | 40.8 dB |
| balanced | 30 % | 3 | 58 % | 55.2 % | 32.8 dB |
| fast | 20 % | 3 | 52 % | 48.8 % | 30.4 dB |

In a generation of at most 8 steps, neighbors are far apart, and balanced and fast keep more:

| preset | keep | full every | computes of 8 steps | of 4 steps | PSNR, 8 steps |
|---|---|---|---|---|---|
| quality | 50 % | 2 | 81.25 % | 87.5 % | 33.2 dB |
| balanced, fast | 50 % | 3 | 75 % | 87.5 % | 31.6 dB |

Steps that are not full compute what is kept. PSNR is to the dense video of as many steps, on the small video model of
examples/moving_shapes: the mean of 64 videos at 20 steps, of eight at 8. There, fewer dense steps had 32.2 dB at 70 %,
29.4 at 60 % and 27.0 at 50 % of 20 steps, and 29.7 at 75 % of 8. docs/quality.md has the intervals.

All take two residuals for each layer and branch, each as large as the layer's output: on a GPU in FP8, 1.03 bytes a
number at a head dim of 128.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.plan import SPARSE

__all__ = ["PRESETS", "Preset", "computed_share", "preset_of", "with_preset"]

_FEW_STEPS = 8  # the most that are few


class Preset(NamedTuple):
    """Options of method "residual"."""

    keep: float
    full_every: int


PRESETS = {"quality": Preset(0.5, 2), "balanced": Preset(0.3, 3), "fast": Preset(0.2, 3)}
_OF_FEW_STEPS = {**PRESETS, "balanced": Preset(0.5, 3), "fast": Preset(0.5, 3)}


def preset_of(name: str, num_steps: int | None = None) -> Preset:
    """Return a preset for a generation of so many steps, None = not known.

    Raises:
        ValueError: there is no such preset.
    """
    require(name in (*PRESETS,), "preset", f"one of {[*PRESETS]}", repr(name))
    few = num_steps is not None and num_steps <= _FEW_STEPS
    return (_OF_FEW_STEPS if few else PRESETS)[name]


def with_preset(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `SkipSettings` with those of a preset, where they say nothing else.

    Raises:
        ValueError: there is no such preset, or an option is of another method.
    """
    method, steps = options.get("method", "residual"), options.get("num_steps")
    preset = preset_of(name, None if steps is None else check_count("num_steps", steps))
    of_others = {
        "method": None if method == "residual" else method, "threshold": options.get("threshold"),
        "allow_positive": options.get("allow_positive") or None,
    }  # fmt: skip
    for option, value in of_others.items():
        expected = f"none with preset={name!r}, whose method is 'residual'"
        require(value is None, option, expected, reprlib.repr(value))
    given = {option: value for option, value in options.items() if value is not None or option not in Preset._fields}
    return {"method": "residual", **preset._asdict(), **given}


def computed_share(plan: Sequence[int], kept: float) -> float:
    """Return the share of tiles that steps of these kinds compute, 0 to 1, where sparse ones compute what is kept."""
    return sum(kept if kind == SPARSE else 1.0 for kind in plan) / len(plan)
