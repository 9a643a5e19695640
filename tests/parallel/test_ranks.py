"""Ranks that share a model calibrate it as one: what one process finds, one file, and no rank left waiting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import rank_cases as cases
from tests.support.ranks import Ranks, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

BOTH = pytest.mark.parametrize("degrees", [cases.ULYSSES, cases.RING], ids=["ulysses", "ring"])
UNEVEN = {"ulysses_degree": 2, "ulysses_anything": True}
TWO_D, FOUR = {"ring_degree": 2, "ulysses_degree": 2}, {"ulysses_degree": 4}
ERROR: dict[str, Any] = {"target_error": 0.05}
SPARSITY: dict[str, Any] = {"target_sparsity": 0.3}


@pytest.fixture(scope="module")
def hurried() -> Iterator[Ranks]:
    """Two processes that do not wait long; the last test that has them leaves them apart."""
    with ranks_of(2, timeout=3) as ranks:
        yield ranks


def check(found: list[dict[str, Any]], heads: int = 4) -> None:
    for of_rank in found:
        assert of_rank["off"] == 0
        assert of_rank["figures"] < 1e-6
        assert (of_rank["heads"], of_rank["tokens"]) == (heads, 96)
        assert of_rank["left_out"] > 0.05
        assert of_rank["kinds"] > 1  # so that a table of other heads would show


@BOTH
@pytest.mark.parametrize("options", [ERROR, SPARSITY, {"target_error": 0.02, "budget": True}])
def test_all_ranks_find_what_one_process_does(two: Ranks, degrees: dict[str, int], options: dict[str, Any]) -> None:
    check(two.run(cases.calibration, degrees, options))


@pytest.mark.parametrize("options", [ERROR, SPARSITY])
def test_ranks_with_uneven_heads_find_what_one_process_does(two: Ranks, options: dict[str, Any]) -> None:
    check(two.run(cases.calibration, UNEVEN, options, 5), heads=5)


@pytest.mark.parametrize(
    ("degrees", "options"), [(TWO_D, ERROR), (TWO_D, SPARSITY), (FOUR, SPARSITY)], ids=["2-D", "2-D whole", "ulysses"]
)
def test_four_ranks_find_what_one_process_does(four: Ranks, degrees: dict[str, int], options: dict[str, Any]) -> None:
    check(four.run(cases.calibration, degrees, {**options, "passes": 1, "prompts": (0,)}))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_first_rank_writes_one_file_of_the_whole_model(two: Ranks, tmp_path: Path) -> None:
    first, other = found = two.run(cases.registry, str(tmp_path))
    for of_rank in found:
        assert of_rank["modes"] == ["calib", "load"]
        assert of_rank["off"] == [0, 0]
        assert of_rank["files"] == ["thresholds.toml"]
        assert of_rank["saved"] == 0
    assert first["saves"] == ["thresholds.toml"] * 2  # with generate=, and by save_if_calib()
    assert other["saves"] == []


@BOTH
def test_the_first_of_two_ranks_saves_a_result(two: Ranks, degrees: dict[str, int], tmp_path: Path) -> None:
    assert two.run(cases.results, str(tmp_path), degrees) == [["thresholds.toml", "keep.toml"], []]


def test_the_first_of_four_ranks_saves_a_result(four: Ranks, tmp_path: Path) -> None:
    assert four.run(cases.results, str(tmp_path), TWO_D) == [["thresholds.toml", "keep.toml"], [], [], []]


# ---- by hand, and residuals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 2 * cases.STEPS + 1], ids=["to be dealt", "dealt"])
def test_heads_stay_where_they_are_while_they_are_calibrated(two: Ranks, calls: int) -> None:
    for found in two.run(cases.by_hand, calls):
        assert found["off"] == 0
        (dealt,) = {tuple(order) for order in found["dealt"]}
        assert len(found["dealt"]) * cases.STEPS > 16  # calls, after some of which heads would be dealt
        assert (list(dealt) != sorted(dealt)) == bool(calls)
        assert found["then"] != sorted(found["then"])
        assert not found["held"]


@pytest.mark.parametrize(
    ("degrees", "heads"), [(cases.ULYSSES, 4), (cases.RING, 4), (UNEVEN, 5)], ids=["ulysses", "ring", "uneven heads"]
)
def test_shares_to_keep_are_the_same_on_all_ranks(two: Ranks, degrees: dict[str, int], heads: int) -> None:
    (errors, shares), other = two.run(cases.residual, degrees, heads)
    assert (errors, shares) == other
    assert any(share < 1 for of_site in shares.values() for share in of_site)
    assert all(error > 0 for of_keep in errors.values() for error in of_keep.values())


# ---- what goes wrong on one rank -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("method", "generation"), [("votes", 0), ("votes", 2), ("residual", 0)],
    ids=["calibration", "verification", "residual"],
)  # fmt: skip
def test_what_is_not_finite_on_one_rank_is_met_by_all_at_once(
    hurried: Ranks, degrees: dict[str, int], method: str, generation: int
) -> None:
    for told, met in hurried.run(cases.not_finite, degrees, method, generation):
        cause = re.sub(r"^RuntimeError: rank [01] of 2: ", "", told)  # where the other rank was the first to say it
        assert cause.startswith("FloatingPointError: blocks.0.attn1, ")
        assert "attention gives NaN or infinity" in cause
        assert met == "FloatingPointError"  # none has waited for the other in vain


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


@pytest.mark.parametrize("fail", [False, True])
def test_ranks_take_off_the_store_what_all_have_heard(two: Ranks, four: Ranks, fail: bool) -> None:
    for ranks, degrees in ((two, cases.ULYSSES), (four, TWO_D)):
        for agreed, left in ranks.run(cases.left_in_the_store, degrees, fail):
            assert agreed > 1
            assert left == {1}  # the last, which nobody knows that all have heard


def test_an_error_within_a_generation_is_told_to_those_who_wait_in_an_exchange(hurried: Ranks) -> None:
    waits, fails = hurried.run(cases.fails_at, 1)
    assert fails == "OSError: the disk of rank 1 is full"
    assert waits == "RuntimeError: rank 1 of 2: OSError: the disk of rank 1 is full"
