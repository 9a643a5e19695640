"""The benchmark of several GPUs runs on two gloo processes, ends when its time is spent, and compares bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parallel
from tests.support.ranks import ranks_of

TINY = ["--device", "cpu", "--tokens", "256", "--heads", "4", "--head-dim", "64", "--seconds", "0.001"]


def rows_of(arguments: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a rank."""
    args: argparse.Namespace = parallel.parsed(arguments)
    bench = parallel.Bench(args)
    parallel.run(bench, args)
    return bench.rows


def test_a_dry_run_shows_that_all_of_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    with ranks_of(2) as ranks:
        rows, others = ranks.run(rows_of, [*TINY, "--json", str(file), "--only", *parallel.PARTS_OF_IT[:-1]])
        nothing, _ = ranks.run(rows_of, [*TINY, "--budget", "1e-9"])
    assert nothing == []
    assert [row["name"] for row in rows] == [row["name"] for row in others]
    names = [row["name"] for row in rows]
    for expected in ("q, k, v packed and sent", "int8_fp8, 77% skipped", "heads 20% to 80% skipped, dealt"):
        assert expected in names
    assert len([name for name in names if "multiprocessors" in name]) == 2 * 2 * len(parallel.LEFT_FREE)
    (compared,) = (row for row in rows if row["name"] == "against one GPU")
    assert compared["skipped"] > 0.02
    assert compared["heads_that_moved"] > 0
    assert compared["words_that_differ"] == 0
    assert compared["largest_difference"] < 1e-6
    assert json.loads(file.read_text())["rows"] == rows


def test_without_ranks_a_line_says_how_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 -m benchmarks\.parallel"):
        parallel.main(TINY)
