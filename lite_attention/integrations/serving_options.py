"""`ServingOptions`: what a user of a serving framework writes into its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from lite_attention.compile.settings import SkipSettings
from lite_attention.exact_tokens import exact_slices
from lite_attention.integrations.numbers import numbers_in
from lite_attention.ops.arguments import check_count, require
from lite_attention.presets import with_preset
from lite_attention.token_layout import Layout, Ranges
from lite_attention.token_slices import TokenSlice, ranges_of

__all__ = ["ServingOptions", "layer_index", "mapping_of"]

# Options of `SkipSettings` that JSON cannot say.
_CALLABLES = {"select", "initial_mask"}
_OF_SETTINGS = {field.name for field in fields(SkipSettings)} - _CALLABLES
_OWN = {"preset", "dense_steps", "dense_layers", "exact_tokens"}
_BY_STEP = {"threshold": (-1, 1), "keep": (-1,)}  # shapes that tables of steps have

_SLOTS = {"votes": 3, "residual": 2}  # as `enable` has them


@dataclass(frozen=True)
class ServingOptions:
    """Options of attention that a server runs.

    Args:
        settings: of the sites, as `enable` has them.
        dense_steps: so many steps at the beginning are dense, and neither vote nor skip.
        dense_layers: numbers of the layers that stay dense.
        exact_tokens: slices of the sequence that are never skipped, and whose own attention skips nothing; "auto" is
            what is not of the picture, where a host tells, and layers whose name has "audio" in it.
        preset: whose options depend on the number of steps of a request; None = all is said.
    """

    settings: SkipSettings
    dense_steps: int = 0
    dense_layers: frozenset[int] = frozenset()
    exact_tokens: Literal["auto"] | tuple[TokenSlice, ...] = "auto"
    preset: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> ServingOptions:
        """Return the options that a configuration says.

        Args:
            config: any of the options of `SkipSettings` that are numbers, names or switches, where "threshold" and
                "keep" may be lists with a number for each step. Besides
                "preset": "quality", "balanced" or "fast", see `lite_attention.presets`;
                "dense_steps": a number; with the method "residual" it is another name for `first_full`;
                "dense_layers": a number, a list of numbers, or text such as "0,1,38-39";
                "exact_tokens": "auto", or a list of pairs, such as [[0, 226], [-256, null]].

        Raises:
            ValueError: an option that there is not, or one that is out of range.
        """
        given = dict(config or {})
        unknown = sorted({*given} - _OF_SETTINGS - _OWN)
        require(not unknown, "config", f"options out of {sorted(_OF_SETTINGS | _OWN)}", unknown)
        own = {name: given.pop(name) for name in _OWN & {*given}}
        given |= {name: _steps(name, given[name]) for name in {*_BY_STEP} & {*given}}
        preset = own.get("preset")
        is_open = preset is not None and not {"keep", "full_every", "num_steps"} & {*given}
        given = given if preset is None else with_preset(preset, given)
        given.setdefault("slots", _SLOTS.get(str(given.get("method", "votes")), 1))
        dense_steps = check_count("dense_steps", own.get("dense_steps", 0), least=0)
        if given.get("method") == "residual" and dense_steps:
            require("first_full" not in given, "dense_steps", "none beside first_full", dense_steps)
            given["first_full"], dense_steps = dense_steps, 0
        layers, exact = _layers(own.get("dense_layers")), exact_slices(own.get("exact_tokens", "auto"))
        return cls(SkipSettings(**given), dense_steps, layers, exact, preset if is_open else None)

    def exact_ranges(self, tokens: int, picture: tuple[int, int] | None) -> Ranges:
        """Return the ranges of exact tokens in a sequence of so many.

        Args:
            tokens: of the sequence.
            picture: (start, end) of what is not text, audio or a reference; None = it is not told.
        """
        if self.exact_tokens != "auto":
            return tuple(ranges_of(self.exact_tokens, tokens))
        return () if picture is None else Layout(picture[0], picture[1] - picture[0]).ranges(tokens)


def _steps(name: str, given: Any) -> Any:
    """Return a list of numbers as a tensor that holds one for each step, and anything else as it is."""
    if not isinstance(given, list):
        return given
    right = bool(given) and all(type(number) in (int, float) for number in given)
    require(right, name, "a number, or a list with one for each step", repr(given))
    return torch.tensor(given, dtype=torch.float32).view(_BY_STEP[name])


def _layers(given: object) -> frozenset[int]:
    """Return numbers of layers out of a number, a list, or text such as "0,1,38-39"."""
    if isinstance(given, str):
        return numbers_in("dense_layers", given)
    numbers = [] if given is None else given if isinstance(given, Sequence) else [given]
    expected = "a number, a list of numbers, or text such as '0,1,38-39'"
    require(all(type(n) is int and n >= 0 for n in numbers), "dense_layers", expected, repr(given))
    return frozenset(numbers)


def layer_index(name: str) -> int | None:
    """Return the number of a layer out of its path: the first one in it; None = it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def mapping_of(text: str) -> dict[str, Any]:
    """Return a configuration out of JSON, or out of the file of JSON that the text is the path of.

    Raises:
        ValueError: it is neither.
        OSError: the file cannot be read.
    """
    try:
        config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"configuration: expected JSON, got {text!r}: {error}") from error
    require(isinstance(config, dict), "configuration", "a JSON object", repr(config))
    return dict(config)
