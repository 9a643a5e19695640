"""`LiteAttention` with a process group: heads go to ranks by what they cost, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lite_attention.ops import SkipState
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import count_bits, unpack_bits
from lite_attention.parallel.balance import deal, expanded
from lite_attention.parallel.group import Group
from lite_attention.parallel.module_exchange import ModuleExchange
from tests.support import exchange_cases as cases
from tests.support.exchange_cases import Learned
from tests.support.ranks import Ranks


def greedy(cost: list[int], ranks: int) -> list[list[int]]:
    """Deal one by one: the dearest to the rank with the least so far that has room."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(cost)), key=lambda head: -cost[head]):
        room = [hand for hand in hands if len(hand) < len(cost) // ranks]
        min(room, key=lambda hand: sum(cost[i] for i in hand)).append(head)
    return hands


@pytest.mark.parametrize(("heads", "ranks"), [(40, 2), (40, 4), (40, 8), (24, 3), (4, 4), (6, 1)])
def test_the_deal_gives_each_as_many_and_is_as_even_as_one_by_one(heads: int, ranks: int) -> None:
    cost = torch.randint(100, 1000, (heads,))
    order = deal(cost, ranks)
    assert sorted(order.tolist()) == [*range(heads)]
    hands = order.view(ranks, -1)
    assert hands.tolist() == hands.sort(1).values.tolist()
    one_by_one = [sum(int(cost[i]) for i in hand) for hand in greedy(cost.tolist(), ranks)]
    assert int(cost[hands].sum(1).max()) <= 1.02 * max(one_by_one)
    assert int(cost[hands].sum(1).max()) <= int(cost.view(ranks, -1).sum(1).max())


def test_heads_that_share_keys_stay_side_by_side() -> None:
    assert expanded(torch.tensor([2, 0, 1]), 2).tolist() == [4, 5, 0, 1, 2, 3]


def test_bits_are_counted() -> None:
    words = torch.cat([torch.randint(-(2**31), 2**31, (200,)), torch.tensor([0, -1, 1, -(2**31), 2**31 - 1])])
    words = words.to(torch.int32).view(5, -1)
    assert torch.equal(count_bits(words), unpack_bits(words.unsqueeze(-1), 32).sum(-1, dtype=torch.int32))


def _exchange_and_state() -> tuple[ModuleExchange, SkipState]:
    """Return those of rank 1 of 2, to whom heads 0 and 1 are proposed in place of 2 and 3."""
    exchange = ModuleExchange(Group("none", 1, 2), None, 1, balance=True)
    assert exchange.prepare(4, 4, 8, "cpu") == (2, 8)
    exchange.proposed.copy_(torch.tensor([2, 3, 0, 1]))
    return exchange, SkipState(batch=1, heads=2, seq_q=8, seq_k=8, tile_m=4, tile_n=4)


def test_a_deal_is_adopted_where_a_generation_begins_and_by_all_branches() -> None:
    exchange, state = _exchange_and_state()
    state.set_step(3)
    assert exchange.order_for([state]) is exchange.order
    assert exchange.own_heads.tolist() == [2, 3]
    state.set_step(0, slot=0)
    exchange.order_for([state])
    assert exchange.own_heads.tolist() == [0, 1]
    fresh = [int(state.control[c.slot_word(slot, c.FRESH)]) for slot in (0, 1)]
    assert fresh == [1, 1]  # slot 1, at its step 3, has learned of other heads


def test_a_generation_begins_with_its_first_branch() -> None:
    """Another one would take from the first what it has just learned."""
    exchange, state = _exchange_and_state()
    proposed = exchange.proposed.clone()
    exchange.proposed.copy_(exchange.order)
    exchange.order_for([state])
    state.set_step(1, slot=0)
    state.slot = 1
    exchange.proposed.copy_(proposed)
    exchange.order_for([state])
    assert exchange.own_heads.tolist() == [2, 3]
    state.set_step(1, slot=1)
    exchange.order_for([state])
    state.set_step(0)
    exchange.order_for([state])
    assert exchange.own_heads.tolist() == [0, 1]


def test_heads_that_are_dealt_by_hand_wait_for_the_next_step_0_alone() -> None:
    exchange, state = _exchange_and_state()
    exchange.proposed.copy_(exchange.order)
    exchange.order_for([state])
    exchange.set_costs([1.0, 2.0, 3.0, 4.0])
    exchange.order_for([state])
    assert exchange.own_heads.tolist() == [1, 2]


def test_while_skipping_is_off_heads_stay_with_what_was_learned_of_them() -> None:
    exchange, state = _exchange_and_state()
    state.set_flag(c.FLAG_DENSE, True)
    exchange.order_for([state])
    assert exchange.own_heads.tolist() == [2, 3]


BY_HEAD = torch.arange(256).view(1, 4, 8, 8) % 7 % 3 == 1
WAYS: dict[str, dict[str, Any]] = {
    "by steps": {},
    "by reset": {"reset": True},
    "two branches": {"branches": ("cond", "uncond")},
    "uneven": {"tokens_of_all": 517},
    "grouped queries": {"kv_heads": 2},
    "traced": {"backend": "aot_eager"},
    "two parts": {"parts": 2},
    "two parts, two branches, traced": {"parts": 2, "branches": ("cond", "uncond"), "backend": "aot_eager", "count": 2},
    "two parts, a mask by head": {
        "parts": 2,
        "options": {"initial_mask": torch.arange(256).view(1, 4, 8, 8) % 7 % 3 == 1},
    },
    "one threshold": {"options": {"threshold": -3.5}},
    "refreshed": {"options": {"refresh": 3}},
    "int8": {"options": {"use_int8": True}},
    "a mask by head": {"options": {"initial_mask": BY_HEAD}},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=[*WAYS])
def test_dealt_heads_compute_what_one_process_does(two: Ranks, way: dict[str, Any]) -> None:
    """Thresholds, masks and states follow their heads to other ranks."""
    found: list[Learned] = two.run(_generations, way)
    for of_rank in found:
        assert of_rank.error < 1e-6
        assert of_rank.same_masks
        assert of_rank.skipped > 0.05
    assert [of_rank.heads[0] for of_rank in found] == [[0, 1], [2, 3]]
    last = sorted(head for of_rank in found for head in of_rank.heads[-1])
    assert last == [0, 1, 2, 3]
    if way.get("kv_heads") is None:  # two pairs of heads may lie as they lay
        assert found[0].heads[-1] != [0, 1]
        spread = [max(kept) - min(kept) for kept in zip(*(of_rank.kept for of_rank in found), strict=True)]
        assert spread[-1] < spread[0]


BOTH: dict[str, dict[str, Any]] = {
    "both": {"key_ranks": 2},
    "both, a mask by head": {"key_ranks": 2, "options": WAYS["a mask by head"]["options"]},
    "both, traced": {"key_ranks": 2, "backend": "aot_eager", "count": 2},
    "keys": {"key_ranks": 4, "options": WAYS["a mask by head"]["options"]},
}


@pytest.mark.parametrize("name", BOTH)
def test_heads_are_dealt_where_keys_are_gathered_too(four: Ranks, name: str) -> None:
    found: list[Learned] = four.run(_generations, BOTH[name])
    assert max(of_rank.error for of_rank in found) < 1e-6
    assert all(of_rank.same_masks for of_rank in found)
    moved = [of_rank.heads[0] != of_rank.heads[-1] for of_rank in found]
    assert moved == [name != "keys"] * 4
    assert found[0].heads[-1] == found[2].heads[-1]


def _generations(way: dict[str, Any]) -> Learned:
    return cases.generations(**way)
