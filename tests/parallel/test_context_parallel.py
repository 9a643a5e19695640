"""diffusers' context parallelism and `enable`: ranks compute, and learn, what one process does.

Masks are the single process's bits: its heads under Ulysses, its rows in a ring.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import context_parallel_cases as cases
from tests.support.context_parallel_cases import Found
from tests.support.ranks import Ranks, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("context parallel")]  # one pair of processes, not one a worker

ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
BOTH = pytest.mark.parametrize("degrees", [ULYSSES, RING], ids=["ulysses", "ring"])


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks_of(2) as ranks:
        yield ranks


def check(found: list[Found], error: float = 0.0) -> None:
    for of_rank in found:
        assert of_rank.error <= error
        assert of_rank.same_masks
        assert of_rank.same_names
    assert min(of_rank.skipped for of_rank in found) > 0.02
    assert min(of_rank.moved for of_rank in found) > 1e-3  # so that skipping shows


@BOTH
@pytest.mark.parametrize("order", ["split first", "split last", "split after a run"])
def test_eager_in_either_order(two: Ranks, order: str, degrees: dict[str, Any]) -> None:
    check(two.run(cases.in_order, degrees, {}, order))


@pytest.mark.parametrize(("degrees", "order"), [(ULYSSES, "split after a run"), (RING, "split first")])
def test_blocks_compiled(two: Ranks, order: str, degrees: dict[str, Any]) -> None:
    check(two.run(cases.in_order, degrees, {"compile": "blocks"}, order))


@BOTH
def test_compiled_whole(two: Ranks, degrees: dict[str, Any]) -> None:
    check(two.run(cases.in_order, degrees, {"compile": True}, "split last"))


@BOTH
def test_callables_and_initial_masks_are_of_the_whole_model(two: Ranks, degrees: dict[str, Any]) -> None:
    check(two.run(cases.callables, degrees))


def test_a_group_tells_where_the_model_does_not(two: Ranks) -> None:
    check(two.run(cases.told_by_a_group, {"threshold": cases.by_site, "initial_mask": cases.initial_mask}))


@BOTH
def test_patterns_are_of_the_whole_video(two: Ranks, degrees: dict[str, Any]) -> None:
    check(two.run(cases.pattern, degrees))


@BOTH
def test_thresholds_that_are_set_later(two: Ranks, degrees: dict[str, Any]) -> None:
    refused, found = zip(*two.run(cases.set_later, degrees), strict=True)
    check([*found])
    assert [len(of_rank) for of_rank in refused] == [2, 2]
    if degrees is ULYSSES:
        assert all("threshold: expected one for all heads, or 4, those of the whole" in text for text in refused[0])


@BOTH
def test_one_file_is_for_any_number_of_ranks(two: Ranks, degrees: dict[str, Any], tmp_path: Path) -> None:
    for found in zip(*two.run(cases.from_file, degrees, str(tmp_path / "table.toml")), strict=True):
        check([*found])


def test_a_file_of_a_ranks_heads_is_refused_by_all(two: Ranks, tmp_path: Path) -> None:
    for said in two.run(cases.foreign_file, ULYSSES, str(tmp_path / "table.toml")):
        assert re.search("heads: 2 in the file, 4 in the model", said), said


@pytest.mark.parametrize(
    ("degrees", "compile", "order"),
    [(ULYSSES, False, "split first"), (RING, False, "split last"), (RING, "blocks", "split first")],
)
def test_tokens_in_blocks(two: Ranks, degrees: dict[str, Any], compile: bool | str, order: str) -> None:
    check(two.run(cases.in_order, degrees, {"token_order": (1, 4, 4), "compile": compile}, order))


@BOTH
def test_tokens_in_blocks_with_timesteps_of_their_own(two: Ranks, degrees: dict[str, Any]) -> None:
    check(two.run(cases.in_order, degrees, {"token_order": (1, 4, 4)}, "split first", "timesteps"))


@pytest.mark.parametrize(
    ("degrees", "compile"),
    [
        ({**ULYSSES, "ulysses_anything": True}, False),
        ({**RING, "ring_anything": True}, False),
        ({**RING, "ring_anything": True}, "blocks"),
    ],
)
def test_lengths_that_do_not_divide(two: Ranks, degrees: dict[str, Any], compile: bool | str) -> None:
    if "ring_degree" in degrees:  # tiles of a part of 68 queries are not the whole's
        runs = (two.run(cases.uneven, degrees, t, compile) for t in (-torch.inf, -4.0))
        for of_rank, skips in zip(*runs, strict=True):
            assert of_rank.error < 2e-6
            assert of_rank.same_names
            assert skips.skipped > 0.02
    else:
        check(two.run(cases.uneven, degrees, -4.0, compile), 2e-6)


def test_heads_that_do_not_divide(two: Ranks) -> None:
    check(two.run(cases.uneven_heads), 2e-6)


@pytest.mark.parametrize(("degrees", "capacity"), [(ULYSSES, (1, 2, 96, 96)), (RING, (1, 4, 48, 96))])
def test_the_residual_is_of_the_ranks_heads_and_queries(
    two: Ranks, degrees: dict[str, Any], capacity: tuple[int, ...]
) -> None:
    for rank, found in enumerate(two.run(cases.residual, degrees)):
        assert found.error < 1e-4
        assert found.capacity == capacity
        assert found.query_start == (48 * rank if degrees is RING else None)
        assert 0.25 < found.kept < 0.4
        assert found.diagonal


@BOTH
@pytest.mark.parametrize(("name", "compile"), [("LTX", False), ("LTX", "blocks"), ("Flux", False)])
def test_other_models_that_skip_nothing_are_dense(
    two: Ranks, name: str, compile: bool | str, degrees: dict[str, Any]
) -> None:
    """LTX has a mask for its text, by head, of which diffusers alone takes those of all ranks."""
    for error, sites in two.run(cases.by_name, name, degrees, {"compile": compile}):
        assert error < 2e-5
        assert sites


@BOTH
@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
def test_ltx2_needs_a_plan_that_splits_all_that_is_of_the_video(
    two: Ranks, rope_type: str, degrees: dict[str, Any]
) -> None:
    """That of diffusers leaves out the one of attention to audio, and both where they have a dim for heads."""
    name = "rope" if rope_type == "split" else "cross_attn_rope"
    for said in two.run(cases.ltx2, degrees, rope_type, False):
        assert said.startswith(f"cp_plan: expected one that splits what {name} of LTX2VideoTransformer3DModel returns")
    for error in two.run(cases.ltx2, degrees, rope_type, True):
        assert error < 1e-5


@BOTH
@pytest.mark.parametrize("name", ["initial_mask", "exact_tokens"])
def test_tokens_of_a_sequence_in_another_order_are_not_named(two: Ranks, name: str, degrees: dict[str, Any]) -> None:
    for said in two.run(cases.joint, degrees, name):
        assert re.match(f"{name}: expected none for FluxTransformer2DModel with enable_parallelism", said), said


@BOTH
@pytest.mark.parametrize("keep_text", [True, False])
def test_one_sequence_of_text_and_video(two: Ranks, keep_text: bool, degrees: dict[str, Any]) -> None:
    """MiniMax-H3, which splits it as a whole: exact tokens are where they were, on whatever rank."""
    check(two.run(cases.minimax, degrees, keep_text), 2e-6)


@BOTH
def test_a_whole_pipeline(two: Ranks, degrees: dict[str, Any]) -> None:
    for error, moved, same_masks in two.run(cases.of_pipeline, degrees):
        assert error == 0.0
        assert moved > 1e-3
        assert len(same_masks) == 3
        assert all(same_masks)


def test_heads_in_one_group_and_queries_in_the_other() -> None:
    with ranks_of(4) as four:
        check(four.run(cases.two_dimensions))


def test_what_is_put_on_is_taken_off(two: Ranks) -> None:
    for found, said in two.run(cases.taken_off):
        assert found == [{"lite_attention"}, {None}] * 2
        assert "does not support return_lse" in said  # as diffusers' own ring says


@BOTH
@pytest.mark.parametrize("way", ["set", "context"])
def test_by_the_name_of_a_backend(two: Ranks, way: str, degrees: dict[str, Any]) -> None:
    check(two.run(cases.by_backend, way, degrees))
