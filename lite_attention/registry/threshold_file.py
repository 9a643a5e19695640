"""Thresholds of a model's attention sites as a file that a person can read, compare and edit."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lite_attention.ops.validate import check_threshold
from lite_attention.tables import text_table

__all__ = ["ThresholdTable"]

_VERSION = 1
_DECIMALS = 3  # of thresholds
_DIGITS = 6  # of all numbers
_HEADER = (
    "# LiteAttention thresholds, log2 units: a row for each step, in it a number for each head; one stands for all.\n"
)

# What the existing CUDA project writes: an array of tables for each module, one table for each of its calls.
_RUN, _DISABLED = "LiteAttentionRunConfig", "LiteAttentionDisabledConfig"


@dataclass
class ThresholdTable:
    """Thresholds by site, and what is known of where they come from and what they reach; None = not known.

    Args:
        thresholds: log2 units, by site name: (slots or 1, steps or 1, heads or 1).
        tile_shapes: (tile_m, tile_n) by site name, where known; a threshold is judged tile by tile.
        model_class: name of the model's class.
        model: name of the model, or a hash of its parameters' names and shapes.
        dtype: of the queries, such as "bfloat16".
        tokens: queries of the longest site.
        resolution: frames, height, width of the video in pixels.
        num_steps: denoising steps of a generation.
        branches: their names in the order of the slots.
        metric: of the error: "L1", "Cossim" or "RMSE".
        target_error: what the calibration aimed at.
        reached: errors on calibration and on held-out prompts, sparsity, ..., by name.
        library_version: of lite_attention.
        date: ISO 8601.

    Raises:
        ValueError: a field is of another kind, or a threshold is NaN or not of three dimensions.
    """

    thresholds: dict[str, torch.Tensor]
    tile_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    model_class: str | None = None
    model: str | None = None
    dtype: str | None = None
    tokens: int | None = None
    resolution: tuple[int, ...] | None = None
    num_steps: int | None = None
    branches: tuple[str, ...] | None = None
    metric: str | None = None
    target_error: float | None = None
    reached: dict[str, Any] = field(default_factory=dict)
    library_version: str | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        for name in _ABOUT:
            value, kind, many = getattr(self, name), _KINDS[name], name in _TUPLES
            items = value if isinstance(value, tuple) else (value,)
            if value is not None and (isinstance(value, tuple) != many or not all(_is_a(item, kind) for item in items)):
                raise ValueError(f"{name}: expected {'a tuple of ' * many}{kind.__name__} or None, got {value!r}")
        if not isinstance(self.reached, dict):
            raise ValueError(f"reached: expected a dict, got {self.reached!r}")
        for site, threshold in self.thresholds.items():
            if threshold.dim() != 3 or threshold.numel() == 0:
                raise ValueError(
                    f"thresholds of {site}: expected (slots or 1, steps or 1, heads or 1), got {tuple(threshold.shape)}"
                )
            check_threshold(threshold, allow_positive=True)

    def _about(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ABOUT if getattr(self, name) is not None}

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the table as TOML, thresholds rounded to 3 decimals. What is the same for all is written once."""
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    def to_toml(self) -> str:
        """Return what `save` writes.

        Raises:
            ValueError: `reached` holds something that TOML does not know.
        """
        lines = [_HEADER, f"version = {_VERSION}\n", "\n[about]\n"]
        lines += [f"{name} = {_inline(value)}\n" for name, value in self._about().items()]
        if self.reached:
            lines += ["\n[about.reached]\n", *(f"{_key(k)} = {_inline(v)}\n" for k, v in self.reached.items())]
        for site, threshold in self.thresholds.items():
            lines.append(f"\n[sites.{_inline(site)}]\n")
            if site in self.tile_shapes:
                lines.append(f"tile_shape = {_inline(self.tile_shapes[site])}\n")
            slots = [_collapsed(slot) for slot in threshold.tolist()]
            if all(slot == slots[0] for slot in slots):
                lines.append(f"threshold = {_rows(slots[0])}\n")
            else:
                lines += [f"threshold_of_slot_{i} = {_rows(slot)}\n" for i, slot in enumerate(slots)]
        return "".join(lines)

    @classmethod
    def load(cls, path: str | Path) -> ThresholdTable:
        """Read a file that `save` wrote, or one of the existing CUDA project.

        What was written once comes back with a size of 1, which broadcasts. The CUDA project's files know no steps:
        they hold a threshold for each forward call of a module, in order. One call is taken as a threshold for all
        steps, n calls as those of n steps, disabled ones as -inf.

        Raises:
            ValueError: the file is not TOML, has no version or a newer one, or does not say thresholds as it should.
            OSError: the file cannot be read.
        """
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib

        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # of the decoder too
            raise ValueError(f"{path}: expected a TOML file, got one that is not: {error}") from error
        try:
            return _parse_cuda_project(cls, content) if _is_cuda_project(content) else _parse(cls, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # ---- reading it ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Return what is known, and a row for each site: how many slots, steps and heads it tells apart, and values."""
        lines = [f"{name}: {_plain(value)}" for name, value in {**self._about(), **self.reached}.items()]
        header = ["site", "tile", "slots", "steps", "heads", "min", "median", "max"]
        rows = []
        for site, threshold in self.thresholds.items():
            tile = "x".join(map(str, self.tile_shapes.get(site, ())))
            sizes = ["all" if size == 1 else str(size) for size in threshold.shape]
            values = [
                f"{float(value):.{_DECIMALS}f}" for value in (threshold.min(), _median(threshold), threshold.max())
            ]
            rows.append([site, tile, *sizes, *values])
        return "\n".join([*lines, *([""] if lines else []), text_table(header, rows)])


_TUPLES = ("resolution", "branches")
_ABOUT = [f.name for f in fields(ThresholdTable) if f.name not in ("thresholds", "tile_shapes", "reached")]
_KINDS: dict[str, type] = {name: str for name in _ABOUT} | {
    "tokens": int, "resolution": int, "num_steps": int, "target_error": float,
}  # fmt: skip


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _median(threshold: torch.Tensor) -> torch.Tensor:
    return threshold.flatten().median()  # the lower of two: a mean of -inf and a number says nothing


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---- writing -------------------------------------------------------------------------------------------------------

# A slot's thresholds as written: one number, or a row for each step, which is a number or a list of one for each head.
_Rows = float | list[float | list[float]]


def _collapsed(slot: list[list[float]]) -> _Rows:
    """Return the thresholds of a slot, rounded, without what is the same for all heads or steps."""
    rounded = [[round(value, _DECIMALS) + 0.0 for value in row] for row in slot]  # + 0.0: no -0.0
    rows = [row[0] if all(value == row[0] for value in row) else row for row in rounded]
    if any(row != rows[0] for row in rows):
        return rows
    return rows[:1] if isinstance(rows[0], list) else rows[0]


def _rows(rows: _Rows) -> str:
    if not isinstance(rows, list):
        return _inline(rows)
    return "".join(["[\n", *(f"    {_inline(row)},\n" for row in rows), "]"])


def _key(name: object) -> str:
    return str(name) if re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) else _inline(str(name))


def _inline(value: Any) -> str:
    """Return a value as TOML on one line. tomli-w would give each number of a list a line of its own."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return repr(value)
    if isinstance(value, float):
        return repr(float(f"{value:.{_DIGITS}g}"))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(k)} = {_inline(v)}' for k, v in value.items())} }}"
    raise ValueError(f"expected strings, numbers, lists and dicts of them, got {type(value).__name__}: {value!r}")


# ---- reading -------------------------------------------------------------------------------------------------------


def _parse(cls: type[ThresholdTable], content: dict[str, Any]) -> ThresholdTable:
    version = content.get("version")
    if not isinstance(version, int):
        raise ValueError(f"version: expected a number, at most {_VERSION}, got {version!r}; not a threshold file?")
    if version > _VERSION:
        raise ValueError(f"version: expected at most {_VERSION}, got {version}: written by a newer lite_attention")
    about, sites = content.get("about", {}), content.get("sites")
    if not isinstance(about, dict):
        raise ValueError(f"about: expected a table, got {about!r}")
    if not isinstance(sites, dict) or not sites or not all(isinstance(entry, dict) for entry in sites.values()):
        raise ValueError(f"sites: expected a table for each site, got {sites!r}")
    unknown = [*(content.keys() - {"version", "about", "sites"}), *(about.keys() - {*_ABOUT, "reached"})]
    if unknown:
        raise ValueError(f"expected version, sites and in about {', '.join(_ABOUT)}, got {', '.join(sorted(unknown))}")
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    tile_shapes = {}
    for site, entry in sites.items():
        shape = entry.get("tile_shape")
        if shape is not None:
            if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
                raise ValueError(f"tile_shape of {site}: expected [tile_m, tile_n], got {shape!r}")
            tile_shapes[site] = (shape[0], shape[1])
    return cls({site: _parse_site(site, entry) for site, entry in sites.items()}, tile_shapes, **known)


def _parse_site(site: str, entry: dict[str, Any]) -> torch.Tensor:
    rows = {key: value for key, value in entry.items() if key != "tile_shape"}
    names = [f"threshold_of_slot_{slot}" for slot in range(len(rows))]
    if not rows or list(rows) not in (["threshold"], names):
        raise ValueError(f"{site}: expected threshold, or threshold_of_slot_0 and so on, got {', '.join(rows) or None}")
    slots = [_parse_rows(f"{name} of {site}", value) for name, value in rows.items()]
    steps, heads = (max(slot.shape[dim] for slot in slots) for dim in (0, 1))
    if any(slot.shape[0] not in (1, steps) or slot.shape[1] not in (1, heads) for slot in slots):
        shapes = ", ".join(str(tuple(slot.shape)) for slot in slots)
        raise ValueError(f"{site}: expected all slots with the same number of steps and heads, got {shapes}")
    return torch.stack([slot.expand(steps, heads) for slot in slots])


def _parse_rows(name: str, value: object) -> torch.Tensor:
    """Return thresholds of a slot, (steps or 1, heads or 1)."""
    rows = [row if isinstance(row, list) else [row] for row in (value if isinstance(value, list) else [value])]
    heads = max((len(row) for row in rows), default=0)
    for step, row in enumerate(rows):
        if len(row) not in (1, heads) or not row or not all(_is_a(number, float) for number in row):
            raise ValueError(f"{name}: expected {heads or 'some'} numbers or one in row {step}, got {row!r}")
    if not rows:
        raise ValueError(f"{name}: expected a number, or a row for each step, got none")
    return torch.tensor([row * (heads // len(row)) for row in rows], dtype=torch.float32)


def _is_cuda_project(content: dict[str, Any]) -> bool:
    return bool(content) and all(
        isinstance(calls, list) and calls and all(isinstance(call, dict) and "_type" in call for call in calls)
        for calls in content.values()
    )


def _parse_cuda_project(cls: type[ThresholdTable], content: dict[str, list[dict[str, Any]]]) -> ThresholdTable:
    thresholds = {}
    for site, calls in content.items():
        values = []
        for call in calls:
            value = -math.inf if call["_type"] == _DISABLED else call.get("threshold")
            if call["_type"] not in (_RUN, _DISABLED) or not _is_a(value, float):
                raise ValueError(f"{site}: expected {_DISABLED}, or {_RUN} with a threshold, got {call!r}")
            values.append(value)
        thresholds[site] = torch.tensor(values, dtype=torch.float32).view(1, -1, 1)
    return cls(thresholds)
