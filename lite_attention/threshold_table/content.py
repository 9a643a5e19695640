"""What a threshold table holds: thresholds by site, or shares to keep, and what is known of where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lite_attention.ops.residual_settings import check_keep
from lite_attention.ops.validate import check_threshold

__all__ = ["ABOUT", "Content", "is_a"]

# What a table knows beside its thresholds, by name: the kind of each item.
ABOUT: dict[str, type] = {
    "model_class": str, "model": str, "dtype": str, "tokens": int, "resolution": int, "num_steps": int,
    "branches": str, "metric": str, "target_error": float, "target_sparsity": float, "library_version": str,
    "date": str, "method": str, "full_every": int, "first_full": int, "decide_every": int,
}  # fmt: skip
_TUPLES = ("resolution", "branches")  # of several items


def is_a(value: object, kind: type) -> bool:
    """Return whether a value is of a kind; an int is a float too, and a bool is neither."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


@dataclass(eq=False)
class Content(Mapping[str, torch.Tensor]):
    """The fields of `ThresholdTable`, which says what they mean."""

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
    target_sparsity: float | None = None
    reached: dict[str, Any] = field(default_factory=dict)
    library_version: str | None = None
    date: str | None = None
    method: str | None = None
    full_every: int | None = None
    first_full: int | None = None
    decide_every: int | None = None
    path: Path | None = field(default=None, init=False, repr=False)  # of the file that it was loaded from

    def __post_init__(self) -> None:
        for name, kind in ABOUT.items():
            value, many = getattr(self, name), name in _TUPLES
            items = value if isinstance(value, tuple) else (value,)
            if value is not None and (isinstance(value, tuple) != many or not all(is_a(item, kind) for item in items)):
                raise ValueError(f"{name}: expected {'a tuple of ' * many}{kind.__name__} or None, got {value!r}")
        for name in ("thresholds", "tile_shapes", "reached"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: expected a dict, got {getattr(self, name)!r}")
        if self.method not in (None, "votes", "residual"):
            raise ValueError(f"method: expected 'votes', 'residual' or None, got {self.method!r}")
        for site, threshold in self.thresholds.items():
            got = tuple(threshold.shape) if isinstance(threshold, torch.Tensor) else threshold
            if not isinstance(threshold, torch.Tensor) or threshold.dim() != 3 or threshold.numel() == 0:
                raise ValueError(f"thresholds of {site}: expected (slots or 1, steps or 1, heads or 1), got {got}")
            self._check_values(site, threshold)

    def _check_values(self, site: str, values: torch.Tensor) -> None:
        if self.name == "threshold":
            check_threshold(values, allow_positive=True)
            return
        if values.shape[0] != 1 or values.shape[2] != 1:
            raise ValueError(
                f"keep of {site}: expected one number a step, (1, steps or 1, 1), got {tuple(values.shape)}"
            )
        check_keep(values.flatten())

    def for_state(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of a site in the shape that its state takes."""
        return values if self.name == "threshold" else values.flatten()

    @property
    def dense(self) -> float:
        """The value with which a site skips nothing."""
        return -math.inf if self.name == "threshold" else 1.0

    @property
    def name(self) -> Literal["threshold", "keep"]:
        """What its values are."""
        return "keep" if self.method == "residual" else "threshold"

    def __getitem__(self, site: str) -> torch.Tensor:
        return self.thresholds[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.thresholds)

    def __len__(self) -> int:
        return len(self.thresholds)

    def about(self) -> dict[str, Any]:
        """Return what is known beside thresholds, tile shapes and `reached`, by name."""
        return {name: getattr(self, name) for name in ABOUT if getattr(self, name) is not None}

    @property
    def label(self) -> str:
        """The path of its file, for messages."""
        return "the table" if self.path is None else str(self.path)
