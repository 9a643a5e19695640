"""Errors of attention by site, branch and step: as measured, and as printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lite_attention.tables import text_table

__all__ = ["Curve", "ErrorReport", "ErrorRow"]


class Curve(NamedTuple):
    """What each choice costs at one (site, slot, step), over the prompts so far.

    Choice 0 leaves out what was left out at the step before, choice i also what that one voted out at the i-th
    candidate threshold.
    """

    errors: torch.Tensor  # float64 [choices, heads], of the output: the worst prompt's, or the mean
    losses: torch.Tensor  # float64 [choices, heads], of the site by those, see `loss_of`: the mean
    left_out: torch.Tensor  # float64 [choices, heads], tiles of a call, the mean
    tiles: float  # of a call and head, the mean
    prompts: int = 1

    def merged(self, other: Curve, worst: bool) -> Curve:
        """Return the curve of the prompts of both."""
        n, m = self.prompts, other.prompts
        both = torch.maximum(self.errors, other.errors) if worst else (n * self.errors + m * other.errors) / (n + m)
        losses = (n * self.losses + m * other.losses) / (n + m)
        left_out = (n * self.left_out + m * other.left_out) / (n + m)
        return Curve(both, losses, left_out, (n * self.tiles + m * other.tiles) / (n + m), n + m)


@dataclass
class ErrorRow:
    """One site, slot and step."""

    site: str
    slot: int
    step: int
    error: torch.Tensor  # [heads], of the call's output
    sparsity: torch.Tensor  # [heads], share of the call's tiles left out, 0 to 1
    tiles: float


@dataclass
class ErrorReport(Mapping[str, float]):
    """Errors and sparsity by site and step. As a mapping: the figures of the whole, by name.

    error and worst_error: mean and maximum over sites, branches, steps and heads. sparsity: share of all tiles left
    out. missed: share of (site, branch, step, head) whose error is above the bound, where there is one.
    """

    rows: list[ErrorRow]
    metric: str
    bound: float | None = None

    def _whole(self) -> dict[str, float]:
        if not self.rows:
            return {}
        errors = torch.cat([row.error for row in self.rows])
        sizes = torch.cat([torch.full_like(row.sparsity, row.tiles) for row in self.rows])
        sparsity = torch.cat([row.sparsity for row in self.rows])
        whole = {
            "error": errors.mean(),
            "worst_error": errors.max(),
            "sparsity": (sparsity * sizes).sum() / sizes.sum(),
        }
        if self.bound is not None:
            whole["missed"] = (errors > self.bound).double().mean()
        return {name: float(value) for name, value in whole.items()}

    def __getitem__(self, name: str) -> float:
        return self._whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def figures(self) -> list[str]:
        """Return the figures as text, in order."""
        return [f"{value:.4f}" if "error" in name else f"{value:.1%}" for name, value in self.items()]

    def header(self) -> list[str]:
        """Return what heads the columns of `figures`."""
        return [f"{self.metric} error", "worst", "skipped"] + ["missed"] * (self.bound is not None)

    def of_site(self, site: str) -> ErrorReport:
        """Return the part of one site."""
        return ErrorReport([row for row in self.rows if row.site == site], self.metric, self.bound)

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows; numbers by the thousand help nobody

    def __str__(self) -> str:
        """Return a table of the sites, and the whole."""
        parts = {site or "<root>": self.of_site(site) for site in dict.fromkeys(row.site for row in self.rows)}
        parts["all"] = self
        return text_table(["site", *self.header()], [[name, *part.figures()] for name, part in parts.items()])
