"""Two processes on one GPU learn what one process does, bit for bit; what they exchange goes by the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import two_process_cases as cases
from tests.support.ranks import Ranks, ranks_of
from tests.support.two_process_cases import Case

pytestmark = pytest.mark.xdist_group("two processes")

CASES = [
    Case(method, quantization, gathers)
    for method in ("votes", "residual")
    for quantization in ("none", "int8_fp8")
    for gathers in (False, True)
]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks_of(2, timeout=120, start_method="spawn") as ranks:  # each may have kernels to compile
        yield ranks


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_learn_what_one_does(two: Ranks, case: Case) -> None:
    found = two.run(cases.generations, case)
    for of_rank in found:
        assert of_rank.same_masks
        assert of_rank.skipped > 0.05
        assert of_rank.error < 2**-6  # of bf16
    heads = [of_rank.heads for of_rank in found]
    dealt = case.method == "votes" and not case.gathers
    assert heads == [[*range(4)]] * 2 if case.gathers else (heads != [[0, 1], [2, 3]]) == dealt


@pytest.mark.parametrize("degree", ["ulysses_degree", "ring_degree"])
def test_two_processes_share_a_model_of_diffusers(two: Ranks, degree: str) -> None:
    pytest.importorskip("diffusers")
    for of_rank in two.run(cases.of_diffusers, degree):
        assert of_rank.error < 0.02
        assert of_rank.other_tiles < 0.05
        assert of_rank.skipped > 0.05
