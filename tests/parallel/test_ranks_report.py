"""Reports where several processes share a model: what is here, and what all have together."""

from __future__ import annotations

from typing import Any

import pytest

from lite_attention.ops.part import Part, said_of
from tests.support import rank_reports as cases
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

SHARED = [
    ({"ulysses_degree": 2}, {}, ["heads 0 to 1 of 4", "heads 2 to 3 of 4"]),
    ({"ring_degree": 2}, {}, ["queries 0 to 47 of 96", "queries 48 to 95 of 96"]),
    ({"ulysses_degree": 2, "ulysses_anything": True}, {"heads": 5}, ["heads 0 to 2 of 5", "heads 3 to 4 of 5"]),
]


def check(degrees: dict[str, Any], options: dict[str, Any], here: list[str], ranks: Ranks) -> None:
    found = ranks.run(cases.of_model, degrees, *options.values())
    for (own, of_all, one), said in zip(found, here, strict=True):
        assert [row.here for row in own.swapped] == [said, said]
        assert said in str(own)
        for row, whole in zip(of_all.rows, one.rows, strict=True):
            assert (row.name, row.q_shape, row.k_shape, row.reason, row.note) == (
                whole.name, whole.q_shape if row.reason is None else row.q_shape, row.k_shape, whole.reason, None,
            )  # fmt: skip
            assert (row.skipped, row.tiles) == (whole.skipped, whole.tiles)  # bit for bit, as votes are
            assert row.here == ""
        assert max(of_all.swapped[0].sparsity) > 0.05
        assert of_all == found[0][1]
        assert [row.q_shape for row in own.swapped] == [row.q_shape for row in one.swapped]
    assert any(row.sparsity != whole.sparsity for row, whole in zip(found[0][0].rows, found[0][1].rows, strict=True))


@pytest.mark.parametrize(("degrees", "options", "here"), SHARED, ids=["ulysses", "ring", "uneven heads"])
def test_a_report_says_what_is_here_and_one_of_all_is_that_of_one_process(
    two: Ranks, degrees: dict[str, Any], options: dict[str, Any], here: list[str]
) -> None:
    check(degrees, options, here, two)


def test_a_report_of_two_dimensions(four: Ranks) -> None:
    here = [
        f"heads {heads} of 4, queries {queries} of 96"
        for queries in ("0 to 47", "48 to 95")
        for heads in ("0 to 1", "2 to 3")
    ]
    check({"ring_degree": 2, "ulysses_degree": 2}, {}, here, four)


def test_residuals_take_the_memory_of_all(two: Ranks) -> None:
    found = two.run(cases.of_model, {"ulysses_degree": 2}, 4, 96, cases.RESIDUAL | {"keep": 0.4})
    own, of_all, one = zip(*found, strict=True)
    assert of_all[0] == of_all[1]
    whole = of_all[0].residual
    assert whole.nbytes == sum(report.residual.nbytes for report in own) > max(r.residual.nbytes for r in own)
    assert whole.tiles == one[0].residual.tiles
    assert whole.plan == one[0].residual.plan
    assert whole.kept == pytest.approx(one[0].residual.kept, abs=0.03)


@pytest.mark.parametrize(("key_ranks", "parts"), [(1, 1), (1, 2), (2, 1)], ids=["heads", "heads in parts", "keys"])
def test_a_module_with_a_process_group_tells_the_heads_that_it_was_dealt(
    two: Ranks, key_ranks: int, parts: int
) -> None:
    found = two.run(cases.by_hand, key_ranks, parts)
    whole = found[0][1].rows[0]
    assert whole.q_shape[:3] == (2, 512, 4)
    for rank, (own, of_all, heads, logged) in enumerate(found):
        row = own.rows[0]
        assert of_all == found[0][1]
        assert row.q_shape == whole.q_shape
        assert logged == pytest.approx(sum(row.skipped) / sum(row.tiles))
        if key_ranks == 2:
            assert row.here == f"queries {256 * rank} to {256 * rank + 255} of 512"
        else:
            assert heads not in ([0, 1], [2, 3])  # dealt anew
            assert row.here == said_of([Part(tuple(heads), 4, 0, 512, 512)])
        assert row.tiles == tuple(tiles / 2 for tiles in whole.tiles)
    assert whole.here == ""
    assert whole.tiles[0] == 2 * 4 * 8 * 8  # of 64 x 64
    assert whole.skipped == tuple(map(sum, zip(*(own.rows[0].skipped for own, *_ in found), strict=True)))
    assert whole.skipped[0] > 0


def test_one_rank_alone_may_ask_for_what_is_here(two: Ranks) -> None:
    first, other = two.run(cases.printed, False)
    assert "heads 0 to 1 of 4" in first
    assert other == ""


def test_the_first_rank_prints_the_report_of_all(two: Ranks) -> None:
    first, other = two.run(cases.printed, True)
    assert "1 of 1 sites skip-aware" in first
    assert "heads" not in first
    assert other == ""


def test_what_ranks_say_otherwise_is_told_with_who_says_it(two: Ranks) -> None:
    for notes, reasons in two.run(cases.with_notes):
        assert notes == ["rank 1: dense", None]
        assert reasons == [None, "rank 1: none"]


def test_an_error_on_one_rank_is_told_on_all(two: Ranks) -> None:
    first, other = two.run(cases.failing)
    assert other.startswith("ValueError: model_or_pipe: expected an nn.Module")
    assert first == f"RuntimeError: rank 1 of 2: {other}"


@pytest.mark.parametrize(
    ("heads", "said"),
    [((0, 1, 2, 3), ""), ((3, 1), "heads 1, 3 of 4"), ((2,), "head 2 of 4"), ((3, 0, 1), "heads 0 to 1, 3 of 4")],
)
def test_parts_are_named_by_runs(heads: tuple[int, ...], said: str) -> None:
    assert said_of([Part(heads, 4, 0, 8, 8)]) == said
    assert said_of([Part((head,), 4, 0, 8, 8) for head in heads]) == said
    assert said_of([Part(heads, 4, 2, 3, 8)]) == ", ".join(filter(None, [said, "queries 2 to 4 of 8"]))
