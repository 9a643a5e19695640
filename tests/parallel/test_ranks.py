"""Ranks that share a model calibrate it as one: what one process finds, one file, and no rank left waiting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import rank_cases as cases
from tests.support.ranks import Ranks, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

BOTH = pytest.mark.parametrize("degrees", [cases.ULYSSES, cases.RING], ids=["ulysses", "ring"])


@BOTH
@pytest.mark.parametrize(
    "options", [{"target_error": 0.05}, {"target_sparsity": 0.3}, {"target_error": 0.02, "budget": True}]
)
def test_all_ranks_find_what_one_process_does(two: Ranks, degrees: dict[str, int], options: dict[str, Any]) -> None:
    for found in two.run(cases.calibration, degrees, options):
        assert found["off"] == 0
        assert found["figures"] < 1e-6
        assert (found["heads"], found["tokens"]) == (4, 96)
        assert found["left_out"] > 0.05
        assert found["kinds"] > 1  # so that a table of other heads would show


def test_the_first_rank_writes_one_file_of_the_whole_model(two: Ranks, tmp_path: Path) -> None:
    for found in two.run(cases.registry, str(tmp_path)):
        assert found["modes"] == ["calib", "load"]
        assert found["off"] == [0, 0]
        assert found["files"] == ["thresholds.toml"]
        assert found["saved"] == 0


def test_heads_that_were_dealt_are_calibrated_as_they_are_named(two: Ranks) -> None:
    for found in two.run(cases.by_hand):
        assert found["off"] == 0
        assert found["dealt"] != sorted(found["dealt"])
        assert not found["held"]


@BOTH
def test_shares_to_keep_are_the_same_on_all_ranks(two: Ranks, degrees: dict[str, int]) -> None:
    (errors, shares), other = two.run(cases.residual, degrees)
    assert (errors, shares) == other
    assert any(share < 1 for of_site in shares.values() for share in of_site)
    assert all(error > 0 for of_keep in errors.values() for error in of_keep.values())


def test_what_is_not_finite_on_one_rank_is_told_on_all(two: Ranks) -> None:
    for told in two.run(cases.not_finite):
        cause = re.sub(r"^RuntimeError: rank [01] of 2: ", "", told)  # where the other rank was the first to find it
        assert cause.startswith("FloatingPointError: blocks.0.attn1, slot 0, step 0")
        assert cause.endswith("where heads [3] are")


@pytest.mark.parametrize("lost", [False, True])
def test_ranks_go_on_together_after_an_interrupt(two: Ranks, tmp_path: Path, lost: bool) -> None:
    for found in two.run(cases.interrupted, str(tmp_path), lost):
        assert found["off"] == 0
        assert found["measured"] == [4]
        assert bool(found["said"]) == lost


def test_an_error_after_all_exchanges_is_told_on_all_ranks(two: Ranks) -> None:
    waits, fails = two.run(cases.fails_at, cases.STEPS)
    assert fails == "OSError: the disk of rank 1 is full"
    assert waits == "RuntimeError: rank 1 of 2: OSError: the disk of rank 1 is full"


def test_an_error_within_a_generation_is_told_to_those_who_wait_in_an_exchange() -> None:
    with ranks_of(2, timeout=3) as two:
        waits, fails = two.run(cases.fails_at, 1)
    assert fails == "OSError: the disk of rank 1 is full"
    assert waits == "RuntimeError: rank 1 of 2: OSError: the disk of rank 1 is full"
