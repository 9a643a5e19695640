"""A report of all processes that share a model, from that of each; what they say goes by the store of their group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from lite_attention.ops.part import Part
from lite_attention.parallel.agreement import texts_of_all, told_of_errors
from lite_attention.parallel.shard import shard_by
from lite_attention.report_rows import Report, ReportRow
from lite_attention.residual_report import ResidualReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["gathered_report"]


def gathered_report(report_here: Callable[[], Report], process_group: ProcessGroup) -> tuple[Report, bool]:
    """Return a report of all processes of a group, the same on all, and whether this is the first of them.

    Raises:
        ValueError: no group, or one without this process.
        RuntimeError: another process failed, or has said nothing within the timeout of the group.
    """
    shard = shard_by(process_group)
    with told_of_errors(shard):
        text = _written(report_here())
    reports = [_read(of_rank) for of_rank in texts_of_all(shard, text)]
    named = [dict(_numbered(report.rows)) for report in reports]
    names = dict.fromkeys(name for rows in named for name in rows)
    rows = [_row_of_all([rows.get(name) for rows in named]) for name in names]
    residuals = [report.residual for report in reports if report.residual is not None]
    return Report(rows, _residual_of_all(residuals)), shard.place.rank == 0


# ---- texts -----------------------------------------------------------------------------------------------------------


def _written(report: Report) -> str:
    rows = [{**_fields_of(row), "state": None} for row in report.rows]
    residual = None if report.residual is None else asdict(report.residual)
    return json.dumps({"rows": rows, "residual": residual}, default=str)  # sizes may be symbols


def _fields_of(row: ReportRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _read(text: str) -> Report:
    found = json.loads(text)
    residual = found["residual"]
    return Report([_row(**row) for row in found["rows"]], None if residual is None else ResidualReport(**residual))


def _row(**values: Any) -> ReportRow:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    lists["exact_tokens"] = tuple((start, end) for start, end in values["exact_tokens"])
    lists["parts"] = tuple(Part(tuple(heads), *numbers) for heads, *numbers in values["parts"])
    return ReportRow(**{**values, **lists})


def _numbered(rows: Sequence[ReportRow]) -> Iterator[tuple[tuple[str, int], ReportRow]]:
    """Yield rows by name, and number among those of that name."""
    met: Counter[str] = Counter()
    for row in rows:
        yield (row.name, met[row.name]), row
        met[row.name] += 1


# ---- of all ----------------------------------------------------------------------------------------------------------


def _row_of_all(of_ranks: Sequence[ReportRow | None]) -> ReportRow:
    """Return the row of a site, from that of each rank; None of one that has not met it."""
    rows = [row for row in of_ranks if row is not None]
    called = [row for row in rows if row.tiles] or rows
    return replace(
        called[0],
        reason=_said([None if row is None else row.reason for row in of_ranks]),
        note=_said([None if row is None else row.note for row in of_ranks]),
        dense_kernel=any(row.dense_kernel for row in rows),
        skipped=_sums([row.skipped for row in called]),
        tiles=_sums([row.tiles for row in called]),
        parts=tuple(part for row in rows for part in row.parts) if all(row.parts for row in called) else (),
    )


def _said(texts: Sequence[str | None]) -> str | None:
    """Return what all say, or who says what."""
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


def _sums(of_ranks: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Return sums by slot; ranks may have met fewer branches than others."""
    slots = max(map(len, of_ranks))
    return tuple(sum(counts[slot] for counts in of_ranks if slot < len(counts)) for slot in range(slots))


def _residual_of_all(reports: Sequence[ResidualReport]) -> ResidualReport | None:
    if not reports:
        return None
    tiles = sum(report.tiles for report in reports)
    return replace(
        max(reports, key=lambda report: len(report.plan)),
        kept=sum(report.kept * report.tiles for report in reports) / tiles,
        tiles=tiles,
        nbytes=sum(report.nbytes for report in reports),
        time_sources=sorted({source for report in reports for source in report.time_sources}),
    )
