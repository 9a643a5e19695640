"""What `report` returns: a row for each attention site of a model, and how they print."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lite_attention.model_sites import ModelSite
from lite_attention.ops.part import Part, said_of
from lite_attention.ops.site_state import SiteState
from lite_attention.residual_report import ResidualReport
from lite_attention.tables import text_table

__all__ = ["Report", "ReportRow", "row_of"]


@dataclass
class ReportRow:
    """One attention site."""

    name: str  # module path, below the name of the transformer if it is a pipeline's
    class_name: str
    q_shape: tuple[Any, ...]  # batch, seq_len, heads, head_dim; of the latest call that skipped, or else as compiled
    k_shape: tuple[Any, ...]  # both as in the whole model, where several processes share it
    reason: str | None  # why it does not skip; None = skip-aware
    dense_kernel: bool  # `lite_attention::attention` runs it; otherwise, with a reason, it was left alone
    state: SiteState | None = field(repr=False, compare=False)  # of the latest call that skipped; None before the first
    note: str | None = None  # what was otherwise in the last forward of the model
    exact_tokens: tuple[tuple[int, int], ...] = ()  # ranges (start, end) that are never skipped, of the latest call
    skipped: tuple[float, ...] = ()  # tiles that the next call skips, by slot
    tiles: tuple[float, ...] = ()  # of so many
    parts: tuple[Part, ...] = ()  # heads and queries that these are of; () = all

    @property
    def sparsity(self) -> list[float]:
        """Share of tiles skipped, by slot."""
        return [skipped / max(tiles, 1) for skipped, tiles in zip(self.skipped, self.tiles, strict=True)]

    @property
    def here(self) -> str:
        """Which heads and queries the row is of, such as "heads 20 to 39 of 40"; "" = all."""
        return said_of(self.parts)

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
        cells = [row.cells() for row in self.rows]
        if any(row.here for row in self.rows):
            header, cells = [*header, "here"], [[*row.cells(), row.here] for row in self.rows]
        summary = f"{len(self.swapped)} of {len(self.rows)} sites skip-aware"
        dense = sum(row.dense_kernel for row in self.rows)
        if dense:
            summary += f", {dense} with the dense kernel"
        noted = sum(row.note is not None for row in self.swapped)
        if noted:
            summary += f", {noted} of these did not skip in the last forward"
        lines = [text_table(header, cells), summary, *self._exact()]
        return "\n".join(lines if self.residual is None else [*lines, str(self.residual)])

    def _exact(self) -> list[str]:
        """Return a line on exact tokens, if there are any."""
        counts = Counter((row.exact_tokens, int(row.k_shape[1])) for row in self.swapped if row.exact_tokens)
        said = [
            f"{', '.join(f'{start}:{end}' for start, end in ranges)} of {tokens} ({sites} sites)"
            for (ranges, tokens), sites in counts.items()
        ]
        return [f"exact tokens, which are never skipped: {'; '.join(said)}"] if said else []


def row_of(found: ModelSite) -> ReportRow:
    """Return the row of a site, of what is here. Waits for the device."""
    site, latest = found.site, found.latest
    skipped, tiles = _by_slot(latest)
    return ReportRow(
        found.name, site.class_name, *found.shapes, found.reason, site.dense_kernel, found.last, found.note,
        () if found.record is None else found.record.exact_tokens, skipped, tiles,
        tuple(part for state in latest for part in [state.place] if part is not None),
    )  # fmt: skip


def _by_slot(states: list[SiteState]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts = [[x.tolist() for x in state.tile_counts("slot")] for state in states]
    skipped, tiles = (tuple(map(sum, zip(*(of_state[i] for of_state in counts), strict=True))) for i in (0, 1))
    return skipped, tiles
