"""A table of the attention of a model: what is swapped, what is not and why, and how much is skipped."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from lite_attention.model_sites import ModelSite, sites_of
from lite_attention.ops.site_state import SiteState
from lite_attention.residual_report import ResidualReport, residual_report, skipped_by_next
from lite_attention.tables import text_table

__all__ = ["Report", "ReportRow", "SparsityLog", "named_states", "report"]


@dataclass
class ReportRow:
    """One attention site."""

    name: str  # module path, below the name of the transformer if it is a pipeline's
    class_name: str
    q_shape: tuple[Any, ...]  # batch, seq_len, heads, head_dim; of the latest call that skipped, or else as compiled
    k_shape: tuple[Any, ...]
    reason: str | None  # why it does not skip; None = skip-aware
    dense_kernel: bool  # `lite_attention::attention` runs it; otherwise, with a reason, it was left alone
    state: SiteState | None = field(repr=False)  # of the latest call that skipped; None before the first
    note: str | None = None  # what was otherwise in the last forward of the model
    exact_tokens: tuple[tuple[int, int], ...] = ()  # ranges (start, end) that are never skipped, of the latest call

    @property
    def sparsity(self) -> list[float]:
        """Share of tiles skipped, by slot."""
        return [] if self.state is None else [float(x) for x in self.state.sparsity(per="slot")]

    def cells(self) -> list[str]:
        """Return the row as text, one string a column."""
        skipped = " / ".join(f"{share:.1%}" for share in self.sparsity) if self.note is None else ""
        instead = "dense kernel" if self.dense_kernel else "left alone"
        status = "skip-aware" if self.reason is None else f"{instead}: {self.reason}"
        status = status if self.note is None else f"{status}, but {self.note}"
        shapes = ["x".join(map(str, shape)) for shape in (self.q_shape, self.k_shape)]
        return [self.name or "<root>", self.class_name, *shapes, status, skipped]


@dataclass
class Report:
    """The sites of a model; prints as a table."""

    rows: list[ReportRow]
    residual: ResidualReport | None = None  # where sites have the method "residual"

    @property
    def swapped(self) -> list[ReportRow]:
        """The sites that are skip-aware."""
        return [row for row in self.rows if row.reason is None]

    def __str__(self) -> str:
        """Return the table."""
        header = ["module", "class", "q (B, S, H, D)", "k", "attention", "skipped, by slot"]
        summary = f"{len(self.swapped)} of {len(self.rows)} sites skip-aware"
        dense = sum(row.dense_kernel for row in self.rows)
        if dense:
            summary += f", {dense} with the dense kernel"
        noted = sum(row.note is not None for row in self.swapped)
        if noted:
            summary += f", {noted} of these did not skip in the last forward"
        lines = [text_table(header, [row.cells() for row in self.rows]), summary, *self._exact()]
        return "\n".join(lines if self.residual is None else [*lines, str(self.residual)])

    def _exact(self) -> list[str]:
        """Return a line on exact tokens, if there are any."""
        counts = Counter((row.exact_tokens, int(row.k_shape[1])) for row in self.swapped if row.exact_tokens)
        said = [
            f"{', '.join(f'{start}:{end}' for start, end in ranges)} of {tokens} ({sites} sites)"
            for (ranges, tokens), sites in counts.items()
        ]
        return [f"exact tokens, which are never skipped: {'; '.join(said)}"] if said else []


class SparsityLog:
    """How much each site skips over the steps of a generation: `record()` after every step, or, for a pipeline,

        log = lite_attention.SparsityLog(pipe)
        pipe(prompt, callback_on_step_end=log.on_step_end)

    Args:
        model_or_pipe: as for `report`.
    """

    def __init__(self, model_or_pipe: Any) -> None:
        self.model_or_pipe = model_or_pipe
        self.steps: list[dict[str, float]] = []  # by step: share of tiles that the next step skips, 0 to 1, by site

    def record(self) -> None:
        """Note the sparsity of all sites, over heads and branches. Reading it waits for the device."""
        states = named_states(self.model_or_pipe)
        self.steps.append({name: skipped_by_next(state) for name, state in states.items()})

    def on_step_end(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Record; what diffusers' pipelines call after each step as `callback_on_step_end`."""
        self.record()
        return callback_kwargs

    @property
    def sites(self) -> list[str]:
        """Names of the sites met so far."""
        return list(dict.fromkeys(name for step in self.steps for name in step))

    def table(self) -> torch.Tensor:
        """Return the shares, float32 (sites, steps), NaN where a site had not been called yet."""
        rows = [[step.get(site, math.nan) for step in self.steps] for site in self.sites]
        return torch.tensor(rows).view(len(rows), len(self.steps))


def named_states(model_or_pipe: Any) -> dict[str, SiteState]:
    """Return the states of the latest calls of all skip-aware sites, those that have one, by the sites' names.

    Calls of one module have one name; the last of them stands for all.
    """
    rows = [_row_of(site) for site in sites_of(model_or_pipe)]
    return {row.name: row.state for row in rows if row.reason is None and row.state is not None}


def report(model_or_pipe: Any, *, file: TextIO | None = None) -> Report:
    """Print and return a table of the attention sites that a model has shown so far, after its first call.

    A row says whether the site is skip-aware, or why it is left alone, and the share of tiles that the next call skips,
    by slot. "But it did not run in the last forward", or "but dense in its last call", says what the last forward of an
    enabled model did otherwise; shares are then left out. Warns when nothing was swapped. Reading the shares waits for
    the device. With method "residual" the share is that which sparse steps skip, and a last line says how many steps
    are of which kind, what they compute, what memory it takes, and who told the flow's time.

    Args:
        model_or_pipe: a model or pipeline, compiled with our backend, given to `enable`, or holding `LiteAttention`.
        file: where to print; None = standard output.

    Raises:
        ValueError: it is neither a model nor a pipeline with a transformer.
    """
    sites = sites_of(model_or_pipe)
    rows = [_row_of(site) for site in sites]
    result = Report(rows, residual_report([site for site in sites if site.swapped]))
    print(result, file=sys.stdout if file is None else file)
    if not result.swapped:
        why = "; ".join(sorted({str(row.reason) for row in rows})) or (
            "no scaled_dot_product_attention was seen: has the model run, through our backend, "
            "with diffusers' native attention backend?"
        )
        warnings.warn(f"lite_attention: no attention of this model is skip-aware ({why})", stacklevel=2)
    return result


def _row_of(found: ModelSite) -> ReportRow:
    site = found.site
    return ReportRow(
        found.name, site.class_name, *found.shapes, found.reason, site.dense_kernel, found.last, found.note,
        () if found.record is None else found.record.exact_tokens,
    )  # fmt: skip
