"""The benchmark of several GPUs runs on two gloo processes, ends when its time is spent, and compares bit for bit."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

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


def fails(on: list[int], file: str) -> list[str]:
    """Return the rows of a rank, where a part of it fails on some ranks."""
    args = parallel.parsed([*TINY, "--json", file, "--only", "exchange", "balance"])
    bench = parallel.Bench(args)
    right = parallel.measure_exchange

    def measure_exchange(*arguments: Any) -> None:
        right(*arguments)
        if dist.get_rank() in on:
            raise ValueError("of this rank")
        bench.slowest(0.0)

    together = datetime.timedelta(seconds=1)
    with mock.patch.multiple(parallel, measure_exchange=measure_exchange, TOGETHER=together):
        parallel.run(bench, args)
    return [row["name"] for row in bench.rows]


def test_after_a_failure_of_all_ranks_the_next_part_goes_on(tmp_path: Path) -> None:
    with ranks_of(2) as ranks:
        for names in ranks.run(fails, [0, 1], str(tmp_path / "rows.json")):
            assert names[-1] == "heads 20% to 80% skipped, dealt"


def test_a_rank_that_fails_alone_ends_it_and_what_was_measured_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    with ranks_of(2, timeout=4) as ranks, pytest.raises(RuntimeError, match="rank 0 alone, exchange: RuntimeError"):
        ranks.run(fails, [1], str(file))
    assert len(json.loads(file.read_text())["rows"]) == 4


def test_what_hangs_is_ended_with_the_budget() -> None:
    """Two ranks are told, and one starts: it would wait for the other."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "benchmarks.parallel", *TINY, "--budget", "1"]
    assert subprocess.run(command, env={**os.environ, **alone}, timeout=60).returncode == -signal.SIGALRM


def test_without_ranks_a_line_says_how_to_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 -m benchmarks\.parallel"):
        parallel.main(TINY)
