"""`DealtHeads`: which heads a rank computes of a `LiteAttention` with process groups, and what of it all is of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lite_attention.module_options import ModuleOptions
from lite_attention.ops import SkipState
from lite_attention.ops import control as c
from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.memory import Memory
from lite_attention.ops.part import FIRST_HEAD
from lite_attention.ops.shard import Ranks, Shard, rows_of_queries
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import all_gather, arrived, is_fake
from lite_attention.parallel.balance import deal, expanded, propose_deal
from lite_attention.parallel.exchange import spread
from lite_attention.parallel.group import ALONE, Group

__all__ = ["DealtHeads"]


class DealtHeads(Memory):
    """The heads of all ranks as they are dealt, and the queries, which stay where they are.

    Args:
        process_group: the ranks that exchange heads for tokens; None = none do.
        key_group: the ranks that gather keys; None = none do.
        parts: the heads of a rank are computed in so many, with a state each.
        balance: deal heads by what they cost.
        learns: what that is is learned; else heads lie as they come until somebody tells it.
    """

    order: torch.Tensor  # int64 (heads,): those of rank 0, of rank 1, ...
    proposed: torch.Tensor  # the order to be adopted by the next generation
    last_step: torch.Tensor  # int32 (1,), that of the call before, of any branch
    thresholds: torch.Tensor | None  # float32 (slots, steps, heads), where they differ by head
    initial_mask: torch.Tensor | None  # int32 (batch or 1, heads, q_tiles, k_words), likewise

    def __init__(self, process_group: Any, key_group: Any, parts: int, balance: bool, learns: bool = True) -> None:
        super().__init__()
        self.group = ALONE if process_group is None else Group.of(process_group)
        self.key_group = ALONE if key_group is None else Group.of(key_group, "key_group")
        self.parts, self.balance = check_count("parts", parts), balance and self.group.ranks > 1
        require(parts == 1 or process_group is not None, "parts", "1 where no heads are exchanged", parts)
        self.learns = learns
        self.kv_heads = 0
        self.is_held = False  # while somebody measures, heads stay where they are
        self._costs: tuple[float, ...] | None = None  # as somebody told them
        with torch.inference_mode(False):
            # No buffers: these stay on the CPU.
            self.calls, self.apart = (torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(2))
            for name in ("order", "proposed"):
                self.register_buffer(name, torch.empty(0, dtype=torch.int64, device="cpu"), persistent=False)
            before = torch.ones(1, dtype=torch.int32, device="cpu")  # any but 0: the first call begins a generation
            self.register_buffer("last_step", before, persistent=False)
        for name in ("thresholds", "initial_mask"):
            self.register_buffer(name, None, persistent=False)

    @property
    def shard(self) -> Shard:
        """How many ranks share heads and queries; which heads are here is `own_heads`, since they are dealt."""
        heads, keys = (Ranks(group.rank, group.ranks) for group in (self.group, self.key_group))
        return Shard(heads, keys, groups=(self.group.name, self.key_group.name))

    def deal_out(self, heads: int, kv_heads: int, device: torch.device) -> bool:
        """Deal heads of another number as they come, and return whether there were others before."""
        had_others = self.is_dealt and len(self.order) > 0
        if (len(self.order), self.kv_heads, self.order.device) == (heads, kv_heads, device):
            return False
        self.kv_heads = kv_heads
        with torch.inference_mode(False):
            self.order, self.proposed = (self._told_order(heads).to(device) for _ in range(2))
            self.last_step = self.last_step.to(device)
            self.apart = self.apart.pin_memory() if device.type == "cuda" else self.apart
        return had_others

    # ---- which heads are here ---------------------------------------------------------------------------------------

    @property
    def is_dealt(self) -> bool:
        """Whether heads may lie otherwise than they come."""
        return self.balance and (self.learns or self._costs is not None)

    def check_costs(self, name: str, costs: Sequence[float]) -> None:
        """Raise ValueError unless heads are dealt here, as many as there are costs."""
        require(self.balance, f"costs of {name}", "a site that is balanced", "one that is not")
        known = len(self.order) or len(costs)
        fits = len(costs) == known and len(costs) % (self.group.ranks * self.parts) == 0
        require(fits, f"costs of {name}", f"{len(self.order) or 'as many as'} heads", len(costs))

    def set_costs(self, costs: Sequence[float]) -> None:
        """Deal heads by these costs, where the next generation begins; at once where there is no state yet."""
        self._costs = tuple(costs)
        if len(self.order):
            self.proposed.copy_(self._told_order(len(self.order)))
            self.last_step.fill_(1)

    def _told_order(self, heads: int) -> torch.Tensor:
        if self._costs is None or len(self._costs) != heads:
            return torch.arange(heads)
        by_head = torch.tensor(self._costs, dtype=torch.float64, device="cpu")
        cost = by_head.view(self.kv_heads, -1).sum(1)
        return expanded(deal(cost, self.group.ranks), heads // self.kv_heads)

    def costs_of_all(self, costs: torch.Tensor) -> list[float]:
        """Return what all heads cost, from those of this rank, float32 (heads / ranks,); a collective."""
        known = costs.to(self.order.device, torch.float64)
        if self.group.ranks > 1:
            known = arrived(all_gather(known, self.group.ranks, self.group.name))
        by_head = torch.empty_like(known)
        by_head[self.order] = known
        if self.key_group.ranks > 1:
            rows = arrived(all_gather(by_head, self.key_group.ranks, self.key_group.name))
            by_head = rows.view(self.key_group.ranks, -1).mean(0)
        found: list[float] = by_head.tolist()
        return found

    def order_for(self, states: Sequence[SiteState]) -> torch.Tensor | None:
        """Return the order of the heads of this call, a new one if the generation begins; None = as they come."""
        if not self.is_dealt:
            return None
        if states:
            self._adopt(states)
        return self.order

    def _adopt(self, states: Sequence[SiteState]) -> None:
        control = states[0].control
        slots = [state.control[c.slot_word(0, 0) :].view(state.slots, c.SLOT_WORDS) for state in states]
        step = slots[0][:, c.STEP].index_select(0, control[c.SLOT : c.SLOT + 1])
        is_dense = control[c.FLAGS : c.FLAGS + 1] & c.FLAG_DENSE
        begins = (step == 0) & (self.last_step != 0)  # of the branches, the first alone
        begins = begins & (is_dense == 0) & (self.order != self.proposed).any()
        self.last_step.copy_(step)
        self.order.copy_(torch.where(begins, self.proposed, self.order))
        for words in slots:  # of other branches, too: these are other heads now
            words[:, c.FRESH].bitwise_or_(begins.to(words.dtype))
        for part, state in enumerate(states):
            if state.part is not None:
                state.part[FIRST_HEAD:].copy_(self._heads_of(part))
            if self.thresholds is not None and isinstance(state, SkipState):
                state.threshold.copy_(self.thresholds.index_select(2, self._heads_of(part)))
            if self.initial_mask is not None and state.initial_mask is not None:
                state.initial_mask.copy_(self.initial_mask.index_select(1, self._heads_of(part)))

    def learn_from(self, states: Sequence[SiteState], q: torch.Tensor) -> None:
        """Propose a deal after some calls, of q; a collective then, which waits for nothing."""
        masks = [state.skip_mask for state in states]
        if self.balance and self.learns and masks and not self.is_held and not is_fake(q):
            counted = (self.proposed, self.calls, self.apart)
            propose_deal(*counted, masks, self.order, self.kv_heads, self.group, self.key_group)

    # ---- what is of the heads here ---------------------------------------------------------------------------------

    @property
    def own_heads(self) -> torch.Tensor:
        """The heads of this rank, int64 (heads / ranks,), in the order of its states."""
        return self.order.view(self.group.ranks, -1)[self.group.rank]

    def _heads_of(self, part: int) -> torch.Tensor:
        return self.own_heads.view(self.parts, -1)[part]

    def part_words(self, part: int, seq_len: int) -> torch.Tensor | None:
        """Return which heads, and queries of so many tokens, a state is of, as `Part.words`; None = all."""
        if self.shard.place.ranks * self.parts == 1:
            return None
        keys = spread(self.group, self.key_group, seq_len).keys
        own = [len(self.order), 0 if keys is None else keys.query_start, seq_len]
        return torch.cat([torch.tensor(own, device=self.order.device), self._heads_of(part)])

    def own(self, name: str, table: Any, part: int, dim: int = -1) -> Any:
        """Return what of a tensor is of the heads of a state; one for all heads, or a number, as it is.

        Raises:
            ValueError: it has another number of heads.
        """
        if not _is_by_head(table, dim):
            return table
        heads = len(self.order)
        require(table.shape[dim] == heads, f"heads of {name}", f"1 or {heads}, those of all ranks", table.shape[dim])
        return table.index_select(dim, self._heads_of(part).to(table.device))

    def own_options(self, options: ModuleOptions, part: int, seq_len: int, tile_m: int) -> ModuleOptions:
        """Return the options of a state of this rank, for so many tokens of all ranks."""
        own = options.copy()
        if "threshold" in own.of_state:
            own.of_state["threshold"] = self.own("threshold", own.of_state["threshold"], part)
        mask = own.of_state["initial_mask"]
        if mask is not None:
            own.of_state["initial_mask"] = self.own("initial_mask", self._own_rows(mask, seq_len, tile_m), part, 1)
        return own

    def _own_rows(self, mask: torch.Tensor, seq_len: int, tile_m: int) -> torch.Tensor:
        """Return the rows of an initial mask that are of the queries here."""
        tokens = spread(self.group, self.key_group, seq_len)
        if tokens.keys is None:
            return mask
        return rows_of_queries(mask, tokens.keys.query_start, sum(tokens.lengths), seq_len, tile_m)

    def hold(self, options: ModuleOptions, states: Sequence[SiteState]) -> None:
        """Keep what is given by head, which follows heads as they are dealt anew."""
        if not self.balance or not states:
            return
        state = states[0]
        threshold: Any = options.of_state.get("threshold")
        initial_mask = options.of_state["initial_mask"]
        device = self.order.device
        with torch.inference_mode(False):
            self.thresholds = self.initial_mask = None
            if _is_by_head(threshold, -1) and isinstance(state, SkipState):
                self.thresholds = state.threshold_table(threshold, len(self.order)).to(device).clone()
            if _is_by_head(initial_mask, 1):
                rows = self._own_rows(initial_mask, state.capacity[3], state.tile_m)
                self.initial_mask = pack_bits(rows).to(device)


def _is_by_head(table: Any, dim: int) -> bool:
    return isinstance(table, torch.Tensor) and table.dim() > max(0, dim) and table.shape[dim] > 1
