"""What the quality benchmarks keep and print: a file of results, tables with intervals, verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.quality_metrics import Interval, Pair, bootstrap, difference, fidelity, vmaf_missing

Record = dict[str, Any]  # "method", "prompt", "seed", and figures by name; None = could not be measured

DENSE = "dense"
VOTING = ("threshold", "tile3d", "int8", "fp8")  # at a threshold
RESIDUAL = ("residual", "residual-int8", "residual-fp8", "cached")
SIMULATED = ("mean-keys", "maximum")


@dataclass(frozen=True)
class Metric:
    """A figure of a video.

    Args:
        name: in the records.
        heading: of its column.
        digits: behind the point.
        better: 1 if more is better, -1 if less.
        change: what counts is the difference to the dense video's; otherwise the figure is one of the two together.
    """

    name: str
    heading: str
    digits: int
    better: int
    change: bool = False


FIDELITY = (
    Metric("psnr", "PSNR (dB)", 1, 1),
    Metric("ssim", "SSIM", 4, 1),
    Metric("vmaf", "VMAF", 1, 1),
    Metric("features", "feature distance", 4, -1),
    Metric("path_to_dense", "path to dense (sides)", 4, -1),
)
TRUTH = (
    *(Metric(name, name, 2, 1, change=True) for name in ("shape", "color", "motion", "speed")),
    Metric("certainty", "certainty", 3, 1, change=True),
    Metric("jitter", "jitter (sides)", 4, -1, change=True),
    Metric("flicker", "flicker", 4, -1, change=True),
)


class Results:
    """Records in a JSON-lines file: the first line says what they are of, each further one is a record.

    Args:
        path: is gone on with if it exists; a last line that was cut off by an interrupt is dropped.
        about: what all records have in common, and the "date" of the first; None = what the file says.

    Raises:
        ValueError: the file is of something else, or not there to say it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None) -> None:
        self.path, self.about = path, dict(about or {})
        self._records: dict[tuple[str, Pair], Record] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines))
        if not lines and about is None:
            raise ValueError(f"{path}: expected results, got no file or an empty one")
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"about": self.about}) + "\n")
            return
        known = json.loads(lines[0])["about"]
        wanted = known if about is None else json.loads(json.dumps(self.about))  # tuples become lists
        differ = [key for key in {**known, **wanted} if key != "date" and known.get(key) != wanted.get(key)]
        if differ:
            is_of = ", ".join(f"{key} {known.get(key)}, not {wanted.get(key)}" for key in sorted(differ))
            raise ValueError(f"{path}: expected results of the same kind, got some with {is_of}; take another folder")
        self.about = known
        for line in lines[1:]:
            self._keep(json.loads(line))

    def _keep(self, record: Record) -> None:
        self._records[record["method"], (record["prompt"], record["seed"])] = record

    def add(self, records: Iterable[Record]) -> None:
        """Append records; one of the same method, prompt and seed takes the place of an earlier one."""
        records = list(records)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        for record in records:
            self._keep(record)

    def of(self, method: str) -> dict[Pair, Record]:
        """Return the records of a method."""
        return {pair: record for (name, pair), record in self._records.items() if name == method}

    def missing(self, method: str, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs that a method has no record of."""
        return [pair for pair in pairs if (method, pair) not in self._records]

    def values(self, method: str, name: str, pairs: Iterable[Pair]) -> dict[Pair, float]:
        """Return one figure of a method where it was measured."""
        found = {pair: self._records.get((method, pair), {}).get(name) for pair in pairs}
        return {pair: float(value) for pair, value in found.items() if value is not None}

    def fill_vmaf(self, videos: Videos) -> None:
        """Measure VMAF where it is still missing and both videos were kept."""
        lacking = [r for r in self._records.values() if "vmaf" in r and r["vmaf"] is None and not vmaf_missing()]
        for record in lacking:
            pair = (record["prompt"], record["seed"])
            if videos.has(record["method"], pair) and videos.has(DENSE, pair):
                found = fidelity(videos.load(record["method"], pair), videos.load(DENSE, pair))
                self.add([{**record, "vmaf": found["vmaf"]}])


class Videos:
    """Videos in a folder, uint8 (3, frames, height, width), by method, prompt and seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, method: str, pair: Pair) -> Path:
        """Return the file of a video."""
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in method)
        return self.folder / plain / f"{pair[0]}-{pair[1]}.pt"

    def has(self, method: str, pair: Pair) -> bool:
        return self.path(method, pair).exists()

    def load(self, method: str, pair: Pair) -> torch.Tensor:
        video: torch.Tensor = torch.load(self.path(method, pair), weights_only=True)
        return video

    def save(self, method: str, pair: Pair, video: torch.Tensor) -> None:
        """Write a video, whole or not at all."""
        path = self.path(method, pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(video.cpu().clone(), part)
        part.replace(path)


# ---- figures with their intervals ----------------------------------------------------------------------------------


def interval_of(results: Results, method: str, metric: Metric, pairs: Sequence[Pair]) -> Interval | None:
    """Return a figure's mean and interval; of a `change`, those of the difference to dense. None = not measured."""
    values = results.values(method, metric.name, pairs)
    if not values:
        return None
    if not metric.change:
        return bootstrap(values)
    dense = results.values(DENSE, metric.name, pairs)
    return difference(values, dense) if values.keys() & dense.keys() else None


def cost(results: Results, method: str, pairs: Sequence[Pair]) -> float:
    """Return the share of dense attention's tiles that a method computes, over the generation; NaN = not measured."""
    values = results.values(method, "attention", pairs)
    return sum(values.values()) / len(values) if values else math.nan


def text_of(interval: Interval, metric: Metric, signed: bool) -> str:
    """Return a mean and its interval as a cell of a table."""
    sign, digits = "+" if signed else "", metric.digits
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in interval)
    return f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Verdict:
    """Is a method better than another one that computes as much attention?"""

    method: str
    other: str
    metric: Metric
    sign: int  # 1 = better, -1 = worse, 0 = the interval of the paired difference has 0 in it
    cost: float  # share of tiles that the method computes


def verdicts(
    results: Results, twins: Iterable[tuple[str, str]], metrics: Sequence[Metric], pairs: Sequence[Pair]
) -> list[Verdict]:
    """Compare methods with their twins, pair by pair.

    Args:
        results: of both.
        twins: (twin, method), such as ("random:threshold:-3", "threshold:-3").
        metrics: those that were not measured are left out.
        pairs: of prompts and seeds.
    """
    found = []
    for twin, method in twins:
        for metric in metrics:
            mine, other = (results.values(name, metric.name, pairs) for name in (method, twin))
            if mine.keys() & other.keys():
                sign = metric.better * difference(mine, other).sign
                found.append(Verdict(method, twin, metric, sign, cost(results, method, pairs)))
    return found


def sentences(found: Sequence[Verdict]) -> list[str]:
    """Return in words what verdicts say of random skipping, and what follows for the metrics."""
    lines = []
    for twin, method, computed in dict.fromkeys((verdict.other, verdict.method, verdict.cost) for verdict in found):
        by_sign = {
            sign: ", ".join(v.metric.heading for v in found if (v.other, v.method, v.sign) == (twin, method, sign))
            for sign in (1, 0, -1)
        }
        able = "is" if by_sign[1] else "is **not**"
        line = f"Random skipping {able} distinguishable from `{method}` at equal sparsity, {1 - computed:.1%}"
        line += f": worse by {by_sign[1]}." if by_sign[1] else "."
        line += f" Not told apart by {by_sign[0]}: these show nothing here." if by_sign[0] else ""
        line += f" Random is better by {by_sign[-1]}: do not trust these." if by_sign[-1] else ""
        lines.append(line)
    return lines


def _cell(results: Results, method: str, metric: Metric, pairs: Sequence[Pair]) -> str:
    values = results.values(method, metric.name, pairs)
    interval = interval_of(results, method, metric, pairs)
    if not values:
        return "-"
    mean = f"{sum(values.values()) / len(values):.{metric.digits}f}"
    if interval is None or (metric.change and method == DENSE):
        return mean
    if not metric.change:
        return text_of(interval, metric, signed=False)
    return f"{mean} ({interval.low:+.{metric.digits}f} to {interval.high:+.{metric.digits}f})"


def table(results: Results, methods: Sequence[str], metrics: Sequence[Metric], pairs: Sequence[Pair]) -> str:
    """Return a markdown table, a row for each method; metrics that nothing was measured by are left out."""
    metrics = [m for m in metrics if any(results.values(method, m.name, pairs) for method in methods)]
    header = ["method", "videos", "skipped", "attention computed", *(m.heading for m in metrics)]
    rows = []
    for method in methods:
        count = len(results.values(method, "attention", pairs))
        skipped = list(results.values(method, "skipped", pairs).values())
        cells = [f"`{method}`", str(count)]
        cells += [f"{sum(skipped) / len(skipped):.1%}", f"{cost(results, method, pairs):.1%}"] if count else ["-"] * 2
        cells += [_cell(results, method, metric, pairs) for metric in metrics]
        rows.append(cells)
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def as_json(results: Results, methods: Sequence[str], metrics: Sequence[Metric], pairs: Sequence[Pair]) -> Record:
    """Return all means and intervals by method and metric."""
    found: Record = {}
    for method in methods:
        computed = cost(results, method, pairs)
        row: Record = {"cost": None if math.isnan(computed) else computed}
        for metric in metrics:
            values = results.values(method, metric.name, pairs)
            if values:
                interval = interval_of(results, method, metric, pairs)
                row[metric.name] = {
                    "videos": len(values), "mean": sum(values.values()) / len(values), "change": metric.change,
                    "interval": None if interval is None else interval._asdict(),
                }  # fmt: skip
        found[method] = row
    return found


def vmaf_note(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> str:
    """Return what there is to say about VMAF."""
    counts = {len(results.values(method, "vmaf", pairs)) for method in methods if results.values(method, "psnr", pairs)}
    if counts <= {0}:
        return f"No VMAF: {vmaf_missing() or 'measured where there was none, and the videos were not kept'}."
    numbers = " to ".join(map(str, sorted({min(counts), max(counts)})))
    few = f" Measured on {numbers} videos of a method." if counts != {len(pairs)} else ""
    return f"VMAF: ffmpeg's default model, small frames enlarged to at least 256 pixels a side.{few}"
