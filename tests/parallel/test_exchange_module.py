"""`LiteAttention(process_group=)`: what all ranks are told, what follows the heads, and what copies and files keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lite_attention import LiteAttention
from lite_attention.parallel import deal_heads
from lite_attention.parallel.group import Group
from tests.support import exchange_modules as modules
from tests.support.ranks import Ranks


def test_residuals_are_of_the_heads_of_a_rank(two: Ranks) -> None:
    found = two.run(modules.residual)
    for of_rank in found:
        assert of_rank.error < 1e-6
        assert of_rank.same_masks
        assert of_rank.heads == [[0, 1], [2, 3]]
        assert len({*of_rank.costs}) > 1
        assert of_rank.costs == found[0].costs


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_heads_with_residuals_are_dealt_by_what_another_run_found(two: Ranks, backend: str) -> None:
    """Their initial masks follow; a rank keeps the same share of tiles whatever heads it has."""
    costs = [3.0, 4.0, 1.0, 2.0]
    for of_rank in two.run(modules.residual, costs, backend):
        assert of_rank.heads == [[1, 2], [0, 3]]
        assert of_rank.error < 1e-6
        assert of_rank.same_masks


REFUSED = {
    "heads": ["heads of k: expected a multiple of 2 ranks, got 3"] * 2,
    "tokens": ["seq_len: expected the same on all ranks, or seq_len= of all of them, got [510, 508]"] * 2,
    "dtype": [
        f"dtype of q: expected the same on all ranks, got torch.float{bits} here, which is not what all have"
        for bits in (32, 64)
    ],
    "parts": ["parts: expected the same on all ranks, got [1, 2]"] * 2,
    "balance": [f"balance: expected the same on all ranks, got ({x}, True) here" for x in (False, True)],
    "costs": [f"costs: expected the same on all ranks, got {x} here" for x in (None, (4.0, 3.0, 1.0, 2.0))],
    "no count": ["seq_len: expected an integer, at least 1, got 512.0"] * 2,
    **{
        kind: ["q, k, v: expected calls that all ranks accept, got one that rank 1 refuses", on_rank_1]
        for kind, on_rank_1 in {
            "values of one rank": "seq_len of v: expected that of k, 256, got 255",
            "dimensions of one rank": "q: expected (batch, seq_len, heads, head_dim), got 2 dimensions",
            "no query": "q: expected a tensor, got NoneType",
            "no key": "k: expected a tensor, got NoneType",
            "no tensors": "q: expected a tensor, got NoneType",
            "a list": "seq_len: expected an integer, at least 1, got [512]",
        }.items()
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_all_ranks_are_told_and_none_waits(two: Ranks, kind: str) -> None:
    for (told, then), message in zip(two.run(modules.refused, kind), REFUSED[kind], strict=True):
        assert told.startswith(message)
        assert then == "fits"


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_set_and_copied_follows_the_heads(two: Ranks, parts: int) -> None:
    found = two.run(modules.by_hand, parts)
    for of_rank in found:
        assert of_rank["heads later"] == [of_rank["heads later"][0]] * 4
        assert of_rank["written"]
        assert of_rank["still there"]
        assert of_rank["told"] == "heads of threshold: expected 1 or 4, those of all ranks, got 2"
        assert of_rank["dense"]
        assert of_rank["by head"] == 2
        assert of_rank["off"]
        assert of_rank["site"] == (2, 512, 4, 0)
        assert of_rank["from meta"]
    assert found[0]["heads"] != [0, 1]


def _check_told(of_rank: list[str]) -> None:
    assert [bool(told) for told in of_rank] == [False] * 7 + [True] + [False] * 8
    assert of_rank[7].startswith("process_group: expected ranks that begin generations at the same call")


def test_ranks_that_begin_generations_apart_are_told(two: Ranks) -> None:
    for of_rank in two.run(modules.reset_by_one, 1):
        _check_told(of_rank)


def test_so_are_those_that_gather_keys(four: Ranks) -> None:
    for of_rank in four.run(modules.reset_by_one, 2):
        _check_told(of_rank)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_model_has_all_heads_for_those_who_ask_its_sites(two: Ranks, parts: int) -> None:
    for rank, found in enumerate(two.run(modules.in_a_model, parts)):
        assert found == {"heads": [4, 4], "written": True, "states": parts, "shard": (rank, 2)}


def test_a_persistent_state_keeps_its_heads(two: Ranks) -> None:
    assert two.run(modules.saved) == [True, True]


def _check_another_run(found: list[dict[str, Any]]) -> None:
    for rank, of_rank in enumerate(found):
        assert of_rank["off"] < 1e-6
        assert of_rank["error"] < 1e-6
        assert of_rank["empty"] == {}
        assert of_rank["heads"] in ([0, 3], [1, 2])  # the dearest with the cheapest
        assert of_rank["dealt by hand"] in ([0, 2], [1, 3])
        assert of_rank["told"] == [
            "costs: expected names of sites with a process group, attn, got 'attention'",
            "costs of attn: expected 4 heads, got 3",
            "costs of attn: expected finite numbers, got [nan, nan, nan, nan]",
            "costs of attn: expected finite numbers, got [1, 2, 3, '4']",
            "costs of attn: expected finite numbers, got [1, 2, 3, None]",
            "costs of attn: expected finite numbers, got 4.0",
            "costs of attn: expected finite numbers, got None",
            f"costs of attn: expected finite numbers, got [1, 2, 3, {10**400}]",
            "costs of attn: expected finite numbers, got [[1, 2], [1, 2], [1, 2], [1, 2]]",
            "costs: expected numbers by head, by the name of a site, got [1.0, 1.0, 1.0, 1.0]",
        ]
        assert of_rank["heads"] == found[rank % 2]["heads"]


def test_the_costs_of_a_run_deal_the_heads_of_the_next(two: Ranks) -> None:
    _check_another_run(two.run(modules.another_run, 1))


def test_and_where_keys_are_gathered(four: Ranks) -> None:
    _check_another_run(four.run(modules.another_run, 2))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("ranges", "must_do expects"),
        ("gradient", "lite_attention::skip_attention has no backward, and q or k or v requires a gradient"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_where_one_rank_fails_the_others_get_nan_of_its_heads(two: Ranks, parts: int, kind: str, told: str) -> None:
    """It is still in the exchange; else they would take what it sends next for the rest of this call."""
    whole, failed = two.run(modules.failed_alone, parts, kind)
    assert whole == ("", [False, False, True, True], True)
    assert failed[0].startswith(told)
    assert failed[2]


@pytest.mark.parametrize(("call", "parts", "failing"), [(0, 1, 0), (4, 1, 0), (7, 1, 0), (5, 2, 1), (5, 2, 0)])
def test_a_call_that_fails_on_one_rank_counts_there_too(two: Ranks, call: int, parts: int, failing: int) -> None:
    """So heads are dealt at the same calls, and the parts of the heads are at the same step."""
    found = two.run(modules.swallowed, call, parts, failing)
    assert found[0].told == [""] * 16
    assert [bool(told) for told in found[1].told] == [i == call for i in range(16)]
    for of_rank in found:
        assert of_rank.steps == [[(i + 1) % 4] * parts for i in range(16)]
        assert of_rank.error < 1e-6
    by_generation = [sorted(a + b) for a, b in zip(found[0].heads, found[1].heads, strict=True)]
    assert by_generation == [[0, 1, 2, 3]] * 4
    assert found[0].heads[-1] != [0, 1]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_call_that_fails_on_all_ranks_changes_nothing(two: Ranks, parts: int) -> None:
    for told, error, same_masks in two.run(modules.mistaken, parts):
        assert told == ["must_do expects"] * 3
        assert error < 1e-6
        assert same_masks


def test_where_one_rank_has_no_room_for_a_state_none_goes_on(two: Ranks) -> None:
    found = two.run(modules.no_room_on_one)
    assert [told for told, _, _ in found] == [
        "process_group: expected room for what is learned on all ranks, got none on rank 1, which says why; none of "
        "them goes on",
        "no memory is left",
    ]
    for _, states, error in found:
        assert states == 0
        assert error < 1e-6


@pytest.mark.parametrize("kinds", [[(4, 2), (4, 4)], [(4, 4), (2, 2)]], ids=["key heads", "heads"])
def test_sizes_of_before_have_their_heads_again(two: Ranks, kinds: list[tuple[int, int]]) -> None:
    """Each of them was agreed upon; what is dealt is of the last one."""
    for error, moved in two.run(modules.heads_in_turn, kinds):
        assert error < 1e-6
        assert any(moved)


def test_a_traced_call_has_the_key_heads_that_are_dealt(two: Ranks) -> None:
    for told in two.run(modules.traced_with_fewer_key_heads):
        assert "heads: expected 4 that share 4 of the keys, which are dealt here, got 4 and 2" in told


def test_another_rank_does_not_load_what_one_has_learned(two: Ranks) -> None:
    loaded, told = two.run(modules.pickled_by_rank_0)
    assert loaded == "loaded"
    assert told == (
        "process_group: expected rank 0 of 2, which made this module: make a new one on each, got rank 1 of 2"
    )


def test_costs_that_were_told_outlast_what_is_forgotten() -> None:
    model = nn.ModuleDict({"attn": LiteAttention(process_group=Group("none", 1, 2))})  # type: ignore[arg-type]
    deal_heads(model, {"attn": [4.0, 3.0, 1.0, 2.0]})
    module: Any = model.to("meta").to_empty(device="cpu")["attn"]
    module.allocate(1, 64, 4, 16)
    assert module.exchange.own_heads.tolist() == [1, 3]


def test_queries_and_keys_are_of_one_sequence() -> None:
    module = LiteAttention(process_group=Group("none", 1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_seq_len: expected 64, as of one sequence, with a process group, got 32"):
        module.allocate(1, 64, 4, 16, kv_seq_len=32)


def test_fake_tensors_ask_for_shapes_alone(two: Ranks) -> None:
    assert two.run(modules.shapes_alone) == [(torch.Size((2, 256, 4, 16)), True)] * 2


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"process_group: expected a torch.distributed.ProcessGroup, got int"):
        LiteAttention(process_group=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balance: expected True or False, got 1"):
        LiteAttention(balance=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parts: expected 1 where no heads are exchanged, got 2"):
        LiteAttention(parts=2)
    with pytest.raises(ValueError, match="parts: expected 1 where a state is saved, got 2"):
        LiteAttention(parts=2, persistent_state=True)
    with pytest.raises(ValueError, match="parts: expected at least 1, got 0"):
        LiteAttention(parts=0)
    q = torch.randn(1, 64, 2, 16)
    with pytest.raises(ValueError, match="seq_len: expected None without a process group, got 64"):
        LiteAttention()(q, q, q, seq_len=64)
