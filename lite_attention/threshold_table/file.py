"""The file of a `ThresholdTable`: TOML that a person can read, compare and edit."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from lite_attention.threshold_table.content import ABOUT, Content, is_a

__all__ = ["DECIMALS", "parse", "to_toml"]

_VERSION = 1
DECIMALS = 3  # of thresholds
_DIGITS = 6  # of all numbers
_HEADERS = {
    "threshold": "thresholds, log2 units: a row for each step, in it a number for each head; one stands for all.",
    "keep": "shares of tiles to keep, 0 to 1: a row for each step; one stands for all.",
}

# What the existing CUDA project writes: an array of tables for each module, one table for each of its calls.
_RUN, _DISABLED = "LiteAttentionRunConfig", "LiteAttentionDisabledConfig"


# ---- writing -------------------------------------------------------------------------------------------------------


def to_toml(table: Content) -> str:
    """Return a table as TOML.

    Raises:
        ValueError: `reached` holds something that TOML does not know.
    """
    lines = [f"# LiteAttention {_HEADERS[table.name]}\n", f"version = {_VERSION}\n", "\n[about]\n"]
    lines += [f"{name} = {_inline(value)}\n" for name, value in table.about().items()]
    if table.reached:
        lines += ["\n[about.reached]\n", *(f"{_key(k)} = {_inline(v)}\n" for k, v in table.reached.items())]
    for site, threshold in table.thresholds.items():
        lines.append(f"\n[sites.{_inline(site)}]\n")
        if site in table.tile_shapes:
            lines.append(f"tile_shape = {_inline(table.tile_shapes[site])}\n")
        slots = [_collapsed(slot) for slot in threshold.tolist()]
        if all(slot == slots[0] for slot in slots):
            lines.append(f"{table.name} = {_rows(slots[0])}\n")
        else:
            lines += [f"threshold_of_slot_{i} = {_rows(slot)}\n" for i, slot in enumerate(slots)]
    return "".join(lines)


# A slot's thresholds as written: one number, or a row for each step, which is a number or a list of one for each head.
_Rows = float | list[float | list[float]]


def _collapsed(slot: list[list[float]]) -> _Rows:
    """Return the thresholds of a slot, rounded, without what is the same for all heads or steps."""
    rounded = [[round(value, DECIMALS) + 0.0 for value in row] for row in slot]  # + 0.0: no -0.0
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


def parse(content: bytes) -> dict[str, Any]:
    """Return the arguments of the `ThresholdTable` that a file holds, ours or the CUDA project's.

    Raises:
        ValueError: it is no such file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        found = tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows begin a file with a mark
    except (ValueError, RecursionError) as error:  # of the decoder too
        raise ValueError(f"expected a TOML file, got one that is not: {error}") from error
    return _parse_cuda_project(found) if _is_cuda_project(found) else _parse(found)


def _parse(content: dict[str, Any]) -> dict[str, Any]:
    version: Any = content.get("version")
    if not is_a(version, int) or version < 1:
        raise ValueError(f"version: expected a number, at most {_VERSION}, got {version!r}; not a threshold file?")
    if version > _VERSION:
        raise ValueError(f"version: expected at most {_VERSION}, got {version}: written by a newer lite_attention")
    about, sites = content.get("about", {}), content.get("sites")
    if not isinstance(about, dict):
        raise ValueError(f"about: expected a table, got {about!r}")
    if not isinstance(sites, dict) or not sites or not all(isinstance(entry, dict) for entry in sites.values()):
        raise ValueError(f"sites: expected a table for each site, got {sites!r}")
    unknown = [*(content.keys() - {"version", "about", "sites"}), *(about.keys() - {*ABOUT, "reached"})]
    if unknown:
        raise ValueError(f"expected version, sites and in about {', '.join(ABOUT)}, got {', '.join(sorted(unknown))}")
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    tile_shapes = {}
    for site, entry in sites.items():
        shape = entry.get("tile_shape")
        if shape is not None:
            if not isinstance(shape, list) or [type(size) for size in shape] != [int, int] or min(shape) < 1:
                raise ValueError(f"tile_shape of {site}: expected [tile_m, tile_n], got {shape!r}")
            tile_shapes[site] = (shape[0], shape[1])
    name = "keep" if known.get("method") == "residual" else "threshold"
    thresholds = {site: _parse_site(site, entry, name) for site, entry in sites.items()}
    return {"thresholds": thresholds, "tile_shapes": tile_shapes, **known}


def _parse_site(site: str, entry: dict[str, Any], name: str) -> torch.Tensor:
    rows = {key: value for key, value in entry.items() if key != "tile_shape"}
    names = [f"{name}_of_slot_{slot}" for slot in range(len(rows))]
    if not rows or list(rows) not in ([name], names):
        raise ValueError(f"{site}: expected {name}, or {name}_of_slot_0 and so on, got {', '.join(rows) or None}")
    slots = [_parse_rows(f"{key} of {site}", value) for key, value in rows.items()]
    steps, heads = (max(slot.shape[dim] for slot in slots) for dim in (0, 1))
    if any(slot.shape[0] not in (1, steps) or slot.shape[1] not in (1, heads) for slot in slots):
        shapes = ", ".join(str(tuple(slot.shape)) for slot in slots)
        raise ValueError(f"{site}: expected all slots with the same number of steps and heads, got {shapes}")
    return torch.stack([slot.expand(steps, heads) for slot in slots])


def _parse_rows(name: str, value: object) -> torch.Tensor:
    """Return thresholds of a slot, (steps or 1, heads or 1)."""
    rows: list[list[Any]] = [
        row if isinstance(row, list) else [row] for row in (value if isinstance(value, list) else [value])
    ]
    heads = max((len(row) for row in rows), default=0)
    for step, row in enumerate(rows):
        if len(row) not in (1, heads) or not row or not all(is_a(number, float) for number in row):
            raise ValueError(f"{name}: expected {heads or 'some'} numbers or one in row {step}, got {row!r}")
    if not rows:
        raise ValueError(f"{name}: expected a number, or a row for each step, got none")
    return _tensor(name, [row * (heads // len(row)) for row in rows])


def _tensor(name: str, rows: list[list[float]]) -> torch.Tensor:
    try:
        return torch.tensor([[float(number) for number in row] for row in rows], dtype=torch.float32, device="cpu")
    except OverflowError:
        raise ValueError(f"{name}: expected numbers that a float can hold, got an integer that is too large") from None


def _is_cuda_project(content: dict[str, Any]) -> bool:
    return bool(content) and all(
        isinstance(calls, list) and calls and all(isinstance(call, dict) and "_type" in call for call in calls)
        for calls in content.values()
    )


def _parse_cuda_project(content: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    thresholds = {}
    for site, calls in content.items():
        values: list[Any] = []
        for call in calls:
            value = -math.inf if call["_type"] == _DISABLED else call.get("threshold")
            if call["_type"] not in (_RUN, _DISABLED) or not is_a(value, float):
                raise ValueError(f"{site}: expected {_DISABLED}, or {_RUN} with a threshold, got {call!r}")
            values.append(value)
        thresholds[site] = _tensor(site, [values]).view(1, -1, 1)
    return {"thresholds": thresholds}
