"""The names of methods in the quality benchmarks, and what `lite_attention.enable` is told for each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_report import DENSE, RESIDUAL, SIMULATED, VOTING
from benchmarks.quality_simulation import Simulated
from benchmarks.quality_sol import sol_of
from lite_attention import schedules
from lite_attention.presets import PRESETS

RENDERED = "rendered"
_PATTERNS = ("radial", "spatial-temporal", "window")
FAMILIES = (DENSE, *VOTING, "table", *RESIDUAL, "preset", *SIMULATED, "sol", *_PATTERNS, "random", "steps", RENDERED)

_LEAST_KEPT = "1e-6"  # so little that the diagonal alone is left
_STORAGE = ("fp8", "bf16", "fp32")
_QUANTIZED = {
    "int8": {"use_int8": True}, "fp8": {"use_int8": True, "use_fp8": True},
    "residual-int8": {"use_int8": True}, "residual-fp8": {"use_int8": True, "use_fp8": True},
}  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """What a name such as "residual:0.3,3,no-forecast" says.

    Args:
        keep: share of tiles that sparse steps compute.
        full_every: every so many steps is full.
        forecast: of the residual, between full steps.
        decide_every: every so many full steps decides what is kept.
        storage: of the residual; None = the library's default.
        tile3d: tokens are in blocks of the video.
        steps: of the generation; None = as many as all others have.
        parts: see `Simulated`.
    """

    keep: float
    full_every: int
    forecast: bool = True
    decide_every: int = 2
    storage: str | None = None
    tile3d: bool = False
    steps: int | None = None
    parts: int = 1


_FLAGS: dict[str, dict[str, Any]] = {
    "no-forecast": {"forecast": False}, "tile3d": {"tile3d": True}, **{name: {"storage": name} for name in _STORAGE},
}  # fmt: skip
_COUNTS = {"decide": "decide_every", "steps": "steps", "parts": "parts"}
_OPTIONS = {
    **dict.fromkeys(RESIDUAL, (*_FLAGS, "decide", "steps")),
    "mean-keys": ("tile3d", "decide", "steps", "parts"), "maximum": ("tile3d", "decide", "steps"),
}  # fmt: skip


def residual_of(method: str) -> Residual | None:
    """Return what the name of a residual, or of what is simulated, says; None for all others.

    Raises:
        ValueError: it says nothing that makes sense.
    """
    family, _, value = method.partition(":")
    if family not in _OPTIONS:
        return None
    words = [_LEAST_KEPT] * (family == "cached") + value.split(",")
    if len(words) < 2 or not words[1].isdigit() or not int(words[1]) or not 0 < float(words[0]) <= 1:
        raise ValueError("a share of tiles above 0, at most 1 (cached has none), and every how many steps is full")
    found = Residual(float(words[0]), int(words[1]))
    for word in words[2:]:
        name, _, count = word.partition("=")
        if name not in _OPTIONS[family] or (name in _COUNTS) != (count.isdigit() and int(count) > 0):
            raise ValueError(f"{family} with options out of {', '.join(_OPTIONS[family])}, those with a number as =N")
        found = replace(found, **({_COUNTS[name]: int(count)} if count else _FLAGS[name]))
    return found


def simulated(method: str) -> Simulated | None:
    """Return what is to be simulated for a method; None where there is a kernel."""
    said, family = residual_of(method), method.partition(":")[0]
    if said is None or family not in SIMULATED:
        return None
    return Simulated(said.keep, said.full_every, said.decide_every, said.parts if family == "mean-keys" else 0)


def is_reordered(method: str) -> bool:
    """Return whether a method has its tokens in blocks of the video."""
    said = residual_of(method)
    return method.startswith("tile3d:") or (said is not None and said.tile3d)


def steps_of(method: str, steps: int) -> int:
    """Return how many steps a method's generation has, where others have `steps`."""
    family, _, value = method.partition(":")
    said = residual_of(method)
    return int(value) if family == "steps" else (said and said.steps) or steps


def schedule_of(value: str) -> torch.Tensor:
    """Return the thresholds of a value such as "-3", or "-3,4": the first four steps are dense."""
    threshold, _, dense_steps = value.partition(",")
    return schedules.dense_first(float(threshold), int(dense_steps or 0))


def enable_options(method: str, steps: int, tables: Mapping[str, Path]) -> dict[str, Any]:
    """Return what `lite_attention.enable` is told for a method; of a pattern or a random one, that it votes nothing.

    Args:
        method: one that `check` passes, neither dense nor simulated, nor Sol-Attn.
        steps: of the generation.
        tables: threshold files by name.
    """
    family, _, value = method.partition(":")
    options: dict[str, Any] = {"num_steps": steps, **_QUANTIZED.get(family, {})}
    if family == "preset":
        return {**options, "preset": value}
    said = residual_of(method)
    if said is not None:
        return options | {
            "method": "residual", "keep": said.keep, "full_every": said.full_every, "forecast": said.forecast,
            "decide_every": said.decide_every, "residual_dtype": said.storage,
        }  # fmt: skip
    if family == "table":
        return {**options, "threshold": tables[value]}
    return {**options, "threshold": schedule_of(value) if family in VOTING else -math.inf}


def check(method: str, tables: Collection[str], families: Collection[str] = FAMILIES) -> None:
    """Check the name of a method.

    Args:
        method: the name.
        tables: names of the threshold files.
        families: what may stand before the colon.

    Raises:
        ValueError: there is no such method.
    """
    family, _, value = method.partition(":")
    try:
        if family not in families:
            raise ValueError(f"one of {', '.join(families)}")
        if family in VOTING and not bool((schedule_of(value) <= 0).all()):
            raise ValueError("a threshold of at most 0")
        if family in ("table", "preset"):
            names = tables if family == "table" else PRESETS
            if value not in names:
                raise ValueError(f"a name out of {sorted(names)}")
        if family == "window" and len([int(number) for number in value.split(",")]) != 3:
            raise ValueError("three numbers")
        if family == "random":
            if value.partition(":")[0] not in (*VOTING, "table"):
                raise ValueError("a threshold or a table behind it")
            check(value, tables)
        if family == "steps" and not (value.isdigit() and int(value)):
            raise ValueError("a number of steps")
        residual_of(method)
        sol_of(method)
    except ValueError as error:
        raise ValueError(f"method {method}: expected {error}") from None
