"""The library's own exchange: ranks of a gloo group compute what one process computes, bit for bit in their masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import exchange_cases as cases
from tests.support import two_process_cases
from tests.support.exchange_cases import Case
from tests.support.ranks import Ranks, ranks_of

CASES = {
    "votes": Case(),
    "residual": Case("residual"),
    "uneven": Case(count=131),
    "residual, uneven": Case("residual", 131),
    "grouped queries": Case(kv_heads=2),
    "wider values": Case(value_dim=24),
    "heads first in memory": Case(by_head_first=True),
    "two parts": Case(parts=2),
    "dealt": Case(order=(2, 1, 0, 3)),
    "dealt, uneven, two parts": Case(count=131, order=(3, 1, 0, 2), parts=2),
    "dealt, grouped queries": Case(kv_heads=2, order=(2, 3, 0, 1)),
    "keys": Case(key_ranks=2),
    "keys, uneven": Case(count=131, key_ranks=2),
    "keys, residual, wider values": Case("residual", key_ranks=2, value_dim=24),
    "keys, grouped queries, int8": Case(kv_heads=1, key_ranks=2, options=(("quantization", "int8"),)),
    "int8": Case(options=(("quantization", "int8"),)),
    "int8 and fp8": Case(options=(("quantization", "int8_fp8"),)),
    "ranges": Case(options=(("must_do", (16, 48)), ("must_skip", (100, 117)))),
    "key lengths, scale": Case(options=(("key_lengths", (128, 90)), ("scale", 0.3))),
}


def check(found: list[cases.Found]) -> None:
    for of_rank in found:
        assert of_rank.error < 1e-6
        assert of_rank.lse_error < 1e-5
        assert of_rank.same_masks
    assert max(of_rank.skipped for of_rank in found) > 0.1
    assert max(of_rank.moved for of_rank in found) > 1e-4  # so that skipping shows


@pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])
def test_two_ranks_compute_what_one_process_does(two: Ranks, case: Case) -> None:
    check(two.run(cases.generation, case))


@pytest.mark.parametrize("name", ["votes", "uneven", "dealt", "wider values", "dealt, uneven, two parts"])
def test_each_element_is_copied_once(two: Ranks, name: str) -> None:
    """To pack q, k and v, and to unpack the output; one by one, with copies before and after, it would be twice."""
    for elements, least in two.run(cases.copied, CASES[name]):
        assert least <= elements <= least + 64  # and the numbers of heads


@pytest.mark.parametrize("name", ["votes", "residual, uneven", "dealt, uneven, two parts", "int8", "keys"])
def test_traced_whole_it_is_the_same(two: Ranks, name: str) -> None:
    check(two.run(cases.generation, CASES[name]._replace(backend="aot_eager")))


@pytest.mark.slow
def test_compiled_it_is_the_same(two: Ranks) -> None:
    check(two.run(cases.generation, CASES["dealt, grouped queries"]._replace(backend="inductor")))


FOUR = {
    **{name: CASES[name] for name in ("votes", "residual", "uneven", "dealt")},
    "keys": Case(key_ranks=4),
    "both": Case(key_ranks=2),
    "both, uneven, dealt": Case(count=131, key_ranks=2, order=(3, 1, 0, 2)),
    "both, residual": Case("residual", key_ranks=2),
    "both, uneven, traced": Case(count=131, key_ranks=2, backend="aot_eager"),
}


@pytest.mark.parametrize("case", FOUR.values(), ids=[*FOUR])
def test_four_ranks_compute_what_one_process_does(four: Ranks, case: Case) -> None:
    check(four.run(cases.generation, case))


REFUSED = {
    "grouped queries": (Case(kv_heads=1), "heads of k: expected a multiple of 2 ranks, got 1"),
    "parts": (Case(), "heads of k: expected a multiple of 2 ranks x 8 parts, got 4"),
    "queries alone": (Case(), "seq_len of k: expected that of q, 64, as of one sequence, got 63"),
    "tokens of another rank": (Case(), "seq_len of q: expected 66, which rank {rank} of 2 has of 132 tokens, got 64"),
    "no state": (Case(), "state: expected a SkipState, a ResidualState or some of one kind, got NoneType"),
    "states of two kinds": (
        Case(), "state: expected a SkipState, a ResidualState or some of one kind, got SkipState, ResidualState",
    ),
    "no group": (Case(), "key_group: expected a torch.distributed.ProcessGroup, got int"),
    "no tensor": (Case(), "order: expected int64 (4,) on cpu, got list"),
    "of some heads": (Case(), "order: expected int64 (4,) on cpu, got torch.int64 (2,) on cpu"),
    "no integers": (Case(), "order: expected int64 (4,) on cpu, got torch.float32 (4,) on cpu"),
    "a head twice": (Case(), "order: expected each head once, got [0, 1, 1, 3]"),
    "sharers apart": (
        Case(kv_heads=2), "order: expected each head once, those side by side that share keys, 2, got [0, 2, 1, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_every_rank_refuses_before_it_sends(two: Ranks, change: str) -> None:
    case, message = REFUSED[change]
    told = two.run(cases.refused, case, change)
    assert told == [message.format(rank=rank) for rank in (0, 1)]


@pytest.mark.parametrize("way", ["by hand", "heads", "keys", "stays away"])
def test_where_a_rank_died_or_stays_away_the_others_are_told(way: str) -> None:
    """Within the timeout of their group, at the latest."""
    with ranks_of(2, timeout=3) as ranks:
        told, gone = ranks.run(cases.without_one, way)
    assert gone == "stays away" if way == "stays away" else isinstance(gone, EOFError)
    assert isinstance(told, str)
    assert "nothing was told" not in told


def test_ranks_of_which_a_signal_ends_one_begin_anew(tmp_path: Path) -> None:
    with (
        ranks_of(2, timeout=3) as ranks,
        pytest.warns(UserWarning, match="abort_once was ended by signal 6"),
    ):
        assert ranks.run(cases.abort_once, str(tmp_path / "marked")) == [0, 1]


@pytest.mark.parametrize("gathers", [False, True], ids=["heads", "keys"])
@pytest.mark.parametrize(("method", "quantization"), [("votes", "int8_fp8"), ("residual", "none")])
def test_in_bf16_two_processes_learn_what_one_does(two: Ranks, method: str, quantization: str, gathers: bool) -> None:
    """On a GPU tests/gpu/test_two_processes.py has the same."""
    for found in two.run(two_process_cases.generations, two_process_cases.Case(method, quantization, gathers, "cpu")):
        assert found.same_masks
        assert found.skipped > 0.05
        assert found.error < 2**-6


@pytest.mark.parametrize("degree", ["ulysses_degree", "ring_degree"])
def test_in_bf16_two_processes_share_a_model_of_diffusers(two: Ranks, degree: str) -> None:
    for found in two.run(two_process_cases.of_diffusers, degree, "cpu"):
        assert found.error < 0.02
        assert found.other_tiles == 0
        assert found.skipped > 0.05
