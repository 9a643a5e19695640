"""States of several processes: saved joined, as one process has them, and loaded by any number of processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import rank_states as cases
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

ONE: dict[str, Any] = {}
ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
UNEVEN = {"ulysses_degree": 2, "ulysses_anything": True}
BOTH, FOUR = {"ring_degree": 2, "ulysses_degree": 2}, {"ulysses_degree": 4}


def check(found: list[dict[str, Any]], method: str) -> None:
    for of_rank in found:
        assert all(of_rank["held"])
        if method == "votes":  # residuals are of tiles that ranks choose among their own
            assert all(of_rank["same"])
            assert of_rank["off"] == 0
        assert of_rank["skipped"] > 0.05


@pytest.mark.parametrize(
    ("before", "then", "heads"),
    [(ULYSSES, RING, 4), (RING, ULYSSES, 4), (ULYSSES, ONE, 4), (ONE, RING, 4), (UNEVEN, ONE, 5), (ONE, UNEVEN, 5)],
    ids=["ulysses to ring", "ring to ulysses", "ulysses to one", "one to ring", "uneven to one", "one to uneven"],
)
def test_an_enabled_model_goes_on_with_what_others_have_saved(
    two: Ranks, before: dict[str, Any], then: dict[str, Any], heads: int
) -> None:
    check(two.run(cases.of_model, "votes", before, then, heads), "votes")


@pytest.mark.parametrize(("before", "then"), [(BOTH, FOUR), (FOUR, BOTH)], ids=["both to ulysses", "ulysses to both"])
def test_four_processes_go_on_otherwise(four: Ranks, before: dict[str, Any], then: dict[str, Any]) -> None:
    check(four.run(cases.of_model, "votes", before, then), "votes")


@pytest.mark.parametrize(("before", "then"), [(ONE, ULYSSES), (ONE, RING)], ids=["ulysses", "ring"])
def test_residuals_of_one_process_go_on_in_two(two: Ranks, before: dict[str, Any], then: dict[str, Any]) -> None:
    check(two.run(cases.of_model, "residual", before, then), "residual")


@pytest.mark.parametrize("method", ["votes", "residual"])
@pytest.mark.parametrize(
    ("before", "then"), [(1, None), (None, 1), (1, 2), (2, None)],
    ids=["heads to one", "one to heads", "heads to keys", "keys to one"],
)  # fmt: skip
def test_the_state_dict_of_a_model_with_modules(two: Ranks, method: str, before: int | None, then: int | None) -> None:
    for found in two.run(cases.by_hand, method, before, then):
        assert found["held"]
        assert found["keys"]
        assert found["proj"]
        if method == "votes":
            assert found["same"]
            assert found["off"] < 1e-6
        assert found["skipped"] > 0.05


def test_heads_that_were_dealt_are_saved_in_the_order_of_the_model(two: Ranks) -> None:
    for found in two.run(cases.dealt):
        assert found["order"] != [0, 1, 2, 3]
        assert found["differ"] == ["control"]  # a branch that has not run is to start fresh with its new heads
        assert found["own"]
        assert found["off"] < 1e-6
        assert found["not saved"] == []


def test_thresholds_by_head_that_a_deal_would_move_are_refused(two: Ranks) -> None:
    for by_head, number, given, overwritten in two.run(cases.thresholds_that_a_deal_would_move):
        assert by_head == (
            "ValueError: threshold: expected those by head that the module has, which deals its heads: call its "
            "set_threshold() first, got [-6.0, -5.0, -4.0, -3.0]"
        )
        assert (number, given) == ("", "")
        assert overwritten.startswith("ValueError: threshold: expected those by head that the module has")


def test_a_state_of_some_heads_of_a_rank_is_not_joined(two: Ranks) -> None:
    for told in two.run(cases.in_parts):
        assert "ValueError: process_group: expected ranks that have each head and query once, of modules with" in told
        assert "parts=1" in told


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("by hand", "heads 0 to 1 of 4", "heads 2 to 3 of 4"),
        ("ulysses", "heads 0 to 1 of 4", "heads 2 to 3 of 4"),
        ("ring", "queries 0 to 47 of 96", "queries 48 to 95 of 96"),
    ],
)
def test_what_rank_0_saved_of_its_own_is_refused_by_rank_1(two: Ranks, kind: str, own: str, others: str) -> None:
    first, second = two.run(cases.of_rank_0, kind)
    assert first == ["", ""]
    told = f"ValueError: part of the model: expected a state of {others}, or all, got that of {own}, of another process"
    assert second == [told] * 2


def test_what_a_rank_saved_of_its_own_is_refused_by_one_process(two: Ranks) -> None:
    for told in two.run(cases.by_one_process):
        assert told.startswith("ValueError: part of the model: expected a state of all heads and queries, got that of ")


def test_ranks_that_are_apart_are_told(two: Ranks) -> None:
    first, second = two.run(cases.apart)
    for told in (first, second):
        assert "control: expected the same on all ranks" in told[0]
        assert "queries: expected parts of whole tiles of " in told[1]
        assert told[2].startswith("ValueError: module: expected the same states on all ranks, got ['1.state.control', ")
    assert first[3].startswith("RuntimeError: rank 1 of 2: AttributeError: ")
    assert second[3].startswith("AttributeError: ")


def test_a_model_that_has_not_run_has_no_states(two: Ranks) -> None:
    assert two.run(cases.empty) == [["proj.bias", "proj.weight"]] * 2


def test_heads_that_do_not_divide_are_refused(two: Ranks) -> None:
    for told in two.run(cases.indivisible):
        assert told == "ValueError: kv_heads: expected a multiple of 2 ranks x 1 parts, got 3"
