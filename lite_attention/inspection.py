"""A table of the attention of a model: what is swapped, what is not and why, and how much is skipped."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, TextIO

from torch import nn

from lite_attention.module import LiteAttention
from lite_attention.ops import SkipState
from lite_attention.wiring import parts_of

__all__ = ["Report", "ReportRow", "report"]


@dataclass
class ReportRow:
    """One attention site."""

    name: str  # module path, below the name of the transformer if it is a pipeline's
    class_name: str
    q_shape: tuple[Any, ...]  # batch, seq_len, heads, head_dim, as compiled
    k_shape: tuple[Any, ...]
    reason: str | None  # why it does not skip; None = skip-aware
    dense_kernel: bool  # `lite_attention::attention` runs it; otherwise, with a reason, it was left alone
    state: SkipState | None = field(repr=False)  # of the latest call; None before the first

    @property
    def sparsity(self) -> list[float]:
        """Share of tiles skipped, by slot."""
        return [] if self.state is None else [float(x) for x in self.state.sparsity(per="slot")]

    def cells(self) -> list[str]:
        """Return the row as text, one string a column."""
        skipped = " / ".join(f"{share:.1%}" for share in self.sparsity)
        instead = "dense kernel" if self.dense_kernel else "left alone"
        status = "skip-aware" if self.reason is None else f"{instead}: {self.reason}"
        shapes = ["x".join(map(str, shape)) for shape in (self.q_shape, self.k_shape)]
        return [self.name or "<root>", self.class_name, *shapes, status, skipped]


@dataclass
class Report:
    """The sites of a model; prints as a table."""

    rows: list[ReportRow]

    @property
    def swapped(self) -> list[ReportRow]:
        """The sites that are skip-aware."""
        return [row for row in self.rows if row.reason is None]

    def __str__(self) -> str:
        """Return the table."""
        header = ["module", "class", "q (B, S, H, D)", "k", "attention", "skipped, by slot"]
        table = [header, *(row.cells() for row in self.rows)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        summary = f"{len(self.swapped)} of {len(self.rows)} sites skip-aware"
        dense = sum(row.dense_kernel for row in self.rows)
        if dense:
            summary += f", {dense} with the dense kernel"
        return "\n".join(line.rstrip() for line in [*lines, summary])


def report(model_or_pipe: Any, *, file: TextIO | None = None) -> Report:
    """Print and return a table of the attention sites that a model has shown so far, after its first call.

    Warns when nothing was swapped.

    Args:
        model_or_pipe: a model or pipeline, compiled with our backend, given to `enable`, or holding `LiteAttention`.
        file: where to print; None = standard output.
    """
    from lite_attention.compile.store import records_of

    rows = []
    for part, module_or_compiled in parts_of(model_or_pipe).items():
        model: nn.Module = getattr(module_or_compiled, "_orig_mod", module_or_compiled)
        prefix = "" if isinstance(model_or_pipe, nn.Module) else f"{part}."
        for _, record in records_of(model):
            site, name = record.site, prefix + record.name(model)
            shapes = (site.q_shape, site.k_shape)
            rows.append(ReportRow(name, site.class_name, *shapes, site.reason, site.dense_kernel, record.last))
        for name, module in model.named_modules():
            if isinstance(module, LiteAttention):
                batch, heads, seq_q, seq_k = (0, 0, 0, 0) if module.state is None else module.state.capacity
                shapes = ((batch, seq_q, heads), (batch, seq_k, heads))
                rows.append(ReportRow(prefix + name, type(module).__name__, *shapes, None, False, module.state))
    result = Report(rows)
    print(result, file=sys.stdout if file is None else file)
    if not result.swapped:
        why = "; ".join(sorted({str(row.reason) for row in rows})) or (
            "no scaled_dot_product_attention was seen: has the model run, through our backend, "
            "with diffusers' native attention backend?"
        )
        warnings.warn(f"lite_attention: no attention of this model is skip-aware ({why})", stacklevel=2)
    return result
