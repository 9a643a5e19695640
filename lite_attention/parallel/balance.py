"""Which rank computes which heads: dealt by what they cost, since the exchange waits for the rank with the most tiles.

Nothing of it waits for the device. What heads cost is read off a state now and then, and a deal is proposed. A site
adopts it where its state starts fresh, for a state belongs to its heads: all ranks do so at the same call.
"""

from __future__ import annotations

import torch

from lite_attention.ops.bitmask import count_bits
from lite_attention.ops.namespace import NAMESPACE
from lite_attention.ops.torch_internals import all_gather, arrived
from lite_attention.parallel.group import Group

__all__ = ["deal", "expanded", "propose_deal"]

_FIRST, _EVERY = 4, 64  # calls before a proposal; in between, twice as many each time


def deal(cost: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return which heads go to which rank, as many to each, so that the sums of what they cost are nearly alike.

    The dearest first, in rounds of one head a rank: the dearer, the less the rank has so far.

    Args:
        cost: (heads,), a multiple of the ranks, on any device.
        ranks: how many there are.

    Returns:
        int64 (heads,): the heads of rank 0 in growing order, of rank 1, ...
    """
    sums, hands = cost.new_zeros(ranks), []
    for heads in cost.argsort(descending=True, stable=True).view(-1, ranks):
        taken = torch.empty_like(heads)
        taken[sums.argsort(stable=True)] = heads
        sums = sums + cost[taken]
        hands.append(taken)
    return torch.stack(hands, 1).sort(1).values.flatten()


def expanded(order: torch.Tensor, shared: int) -> torch.Tensor:
    """Return the order of query heads, int64 (heads * shared,), of which so many share a head of the keys."""
    return (order.unsqueeze(1) * shared + torch.arange(shared, device=order.device)).flatten()


def _is_due(calls: int) -> bool:
    return calls >= _FIRST and (calls % _EVERY == 0 or calls & (calls - 1) == 0)


def _propose(
    proposed: torch.Tensor, calls: torch.Tensor, apart: torch.Tensor, skip_masks: list[torch.Tensor],
    order: torch.Tensor, kv_heads: int, ranks: int, group: str, key_ranks: int, key_group: str,
) -> None:  # fmt: skip
    if proposed.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a replay would not count
    calls += 1
    if not _is_due(int(calls)):
        return
    heads = len(order)
    own = torch.cat([count_bits(mask).sum((0, 1, 3, 4)) for mask in skip_masks])
    rows = arrived(all_gather(torch.cat([own, order]), ranks, group)).view(ranks, -1)
    skipped, orders = rows.split([len(own), heads], 1)
    differ = (orders != orders[0]).any()
    by_head = torch.empty_like(order)
    by_head[orders[0]] = skipped.flatten()  # so that all propose the same whatever they have
    if key_ranks > 1:  # which have the same heads, and other queries
        own = torch.cat([by_head, order, differ.view(1)])
        rows = arrived(all_gather(own, key_ranks, key_group)).view(key_ranks, -1)
        by_head = rows[:, :heads].sum(0)
        differ = (rows[:, heads:-1] != rows[0, heads:-1]).any() | rows[:, -1].any()
    cost = -by_head.view(kv_heads, -1).sum(1)  # less what all cost if nothing is skipped
    proposed.copy_(expanded(deal(cost, ranks), heads // kv_heads))
    apart.copy_(differ, non_blocking=True)  # on a GPU a later call reads it, when it has come
    _require_together(apart)  # after the gather, in which the others are


def _require_together(apart: torch.Tensor) -> None:
    """Raise RuntimeError where ranks were seen to have dealt heads apart; what they computed since is of no use."""
    if int(apart):
        apart.zero_()  # for those who reset and go on
        raise RuntimeError(
            "process_group: expected ranks that begin generations at the same call, got heads that were dealt apart, "
            "so what was computed since is wrong: reset all ranks, or none"
        )


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "propose_deal(Tensor(a!) proposed, Tensor(b!) calls, Tensor(c!) apart, Tensor[] skip_masks, Tensor order,"
    " int kv_heads, int ranks, str group, int key_ranks, str key_group) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("propose_deal", _propose, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::propose_deal", lambda *_: None, lib=_library)


def propose_deal(
    proposed: torch.Tensor, calls: torch.Tensor, apart: torch.Tensor, skip_masks: list[torch.Tensor],
    order: torch.Tensor, kv_heads: int, group: Group, key_group: Group,
) -> None:  # fmt: skip
    """Count a call, and at some calls write a new deal into `proposed`; an op, so that compiled code does so, too.

    Args:
        proposed: int64 (heads,), as `deal` returns it, of query heads.
        calls: int64 (1,) on the CPU, the calls so far: the same on all ranks.
        apart: int64 (1,) on the CPU, pinned: whether ranks were seen to have different deals in use.
        skip_masks: of the heads of this rank, in their order, int32 (slots, B, some of them, q_tiles, k_words).
        order: int64 (heads,), the deal in use.
        kv_heads: heads of the keys, which are dealt whole.
        group: whose heads are dealt.
        key_group: whose keys are gathered; they have the same heads.

    Raises:
        RuntimeError: they have; on a GPU this is said at a later proposal than the one that saw it.
    """
    propose = getattr(torch.ops, NAMESPACE).propose_deal
    of_groups = (group.ranks, group.name, key_group.ranks, key_group.name)
    propose(proposed, calls, apart, skip_masks, order, kv_heads, *of_groups)
