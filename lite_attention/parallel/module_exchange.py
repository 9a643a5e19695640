"""`ModuleExchange`: what a `LiteAttention` with process groups knows of the other ranks, and what of it all is here."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lite_attention.module_options import ModuleOptions
from lite_attention.ops import SkipState
from lite_attention.ops import control as c
from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.memory import Memory
from lite_attention.ops.shard import Ranks, Shard, rows_of_queries
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import all_gather, arrived, is_fake
from lite_attention.parallel.balance import deal, expanded, propose_deal
from lite_attention.parallel.exchange import Tokens, spread, tokens_of
from lite_attention.parallel.group import ALONE, Group
from lite_attention.parallel.ulysses import Attend, exchanged_attention

__all__ = ["ModuleExchange"]


class ModuleExchange(Memory):
    """Which heads and queries this rank computes, and their part of what is given for all.

    Args:
        process_group: the ranks that exchange heads for tokens; None = none do.
        key_group: the ranks that gather keys; None = none do.
        parts: the heads of a rank are computed in so many, with a state each.
        balance: deal heads by what they cost.
    """

    order: torch.Tensor  # int64 (heads,): those of rank 0, of rank 1, ...
    proposed: torch.Tensor  # the order to be adopted by the next generation
    last_step: torch.Tensor  # int32 (1,), that of the call before, of any branch
    thresholds: torch.Tensor | None  # float32 (slots, steps, heads), where they differ by head
    initial_mask: torch.Tensor | None  # int32 (batch or 1, heads, q_tiles, k_words), likewise

    def __init__(self, process_group: Any, key_group: Any, parts: int, balance: bool) -> None:
        super().__init__()
        self.group = ALONE if process_group is None else Group.of(process_group)
        self.key_group = ALONE if key_group is None else Group.of(key_group, "key_group")
        self.parts, self.balance = check_count("parts", parts), balance and self.group.ranks > 1
        require(parts == 1 or process_group is not None, "parts", "1 where no heads are exchanged", parts)
        self.kv_heads = 0
        self.is_held = False  # while somebody measures, heads stay where they are
        self._costs: tuple[float, ...] | None = None  # as somebody told them
        self._agreed: dict[Any, Tokens] = {}
        with torch.inference_mode(False):
            # No buffers: these stay on the CPU.
            self.calls, self.apart = (torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(2))
            for name in ("order", "proposed"):
                self.register_buffer(name, torch.empty(0, dtype=torch.int64, device="cpu"), persistent=False)
            before = torch.ones(1, dtype=torch.int32, device="cpu")  # any but 0: the first call begins a generation
            self.register_buffer("last_step", before, persistent=False)
        for name in ("thresholds", "initial_mask"):
            self.register_buffer(name, None, persistent=False)

    def anew(self) -> ModuleExchange:
        """Return one that has learned nothing, on the CPU."""
        twin = self.__new__(type(self))
        ModuleExchange.__init__(twin, self.group, self.key_group, self.parts, self.balance)
        twin._costs = self._costs
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was copied or pickled.

        Raises:
            ValueError: another rank pickled it.
        """
        super().__setstate__(state)
        if not self._check_place():
            self._agreed = {}  # so that the first call looks again

    def _check_place(self) -> bool:
        """Return whether there are the groups yet; raise ValueError if this is another rank of them."""
        of_groups = {"process_group": self.group, "key_group": self.key_group}
        return all([group.is_there(name) for name, group in of_groups.items()])

    # ---- calls ------------------------------------------------------------------------------------------------------

    def attend(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: Sequence[SiteState],
        seq_len: int | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        """Exchange, attend, exchange.

        Args:
            attend: attention by the module's states, which is told `part`, and `keys` where they are gathered.
            q: of the tokens here, as are the others.
            k: keys.
            v: values.
            states: what there are before the call, one of each part of the heads of this rank, or none.
            seq_len: tokens of all ranks; None = as many on each.
            return_lse: also return the log-sum-exp.

        Raises:
            ValueError: the call does not fit, here or on another rank.
        """
        tokens = self._tokens(q, k, v, seq_len, states)
        order = None if is_fake(q) else self.order_for(states)
        attends = [partial(attend, part=part, keys=tokens.keys) for part in range(self.parts)]
        return exchanged_attention(attends, q, k, v, tokens, order, return_lse)

    def _tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_len: int | None, states: Sequence[SiteState]
    ) -> Tokens:
        """Return where the tokens of a call are; a call of a new size is compared with those of the other ranks."""
        if torch.compiler.is_compiling():
            self._check_traced(q.shape[2], k.shape[2])
        if torch.compiler.is_compiling() or not isinstance(q, torch.Tensor) or is_fake(q):
            return tokens_of(q, k, v, self.group, self.key_group, seq_len, self.parts)
        call = (*(getattr(x, "shape", None) for x in (q, k, v)), q.dtype, q.device, seq_len)
        if call not in self._agreed:
            self._agreed[call] = self._agree(q, k, v, seq_len)
        if self._prepare(q.shape[2], k.shape[2], q.device):
            for state in states:
                state.start_fresh()  # its heads are others now
        return self._agreed[call]

    def _check_traced(self, heads: int, kv_heads: int) -> None:
        """Raise RuntimeError unless heads are dealt as a traced call has them, which cannot deal others."""
        dealt = (len(self.order), self.kv_heads)
        if self.balance and dealt != (heads, kv_heads):
            raise RuntimeError(
                f"heads: expected {dealt[0]} that share {dealt[1]} of the keys, which are dealt here, got {heads} and "
                f"{kv_heads}: call .allocate(..., kv_heads={kv_heads}) before this is traced"
            )

    def _agree(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_len: int | None) -> Tokens:
        """Check a call on all ranks: collectives, which wait for the device. What one refuses, all refuse."""
        tokens: Tokens | None = None
        refusal: ValueError | None = None
        try:
            self._check_place()
            tokens = tokens_of(q, k, v, self.group, self.key_group, seq_len, self.parts)
        except ValueError as error:
            refusal = error
        named = {} if tokens is None else _numbers(q, k, v, tokens)
        for group in (self.group, self.key_group):
            if group.ranks > 1:
                rows = group.numbers([0] * _NUMBERS if refusal else [*named.values()], q.device)
                refusal = refusal or _disagreement([*named], rows)
        if refusal is not None or tokens is None:
            raise refusal or AssertionError
        return tokens

    def prepare(self, heads: int, kv_heads: int, seq_len: int, device: torch.device | str) -> tuple[int, int]:
        """Get ready for calls of so many heads and tokens; return the heads and queries of a state.

        Raises:
            ValueError: they do not divide.
        """
        states = self.group.ranks * self.parts
        dealt = f"a multiple of {self.group.ranks} ranks x {self.parts} parts"
        require(kv_heads % states == 0, "kv_heads", dealt, kv_heads)
        require(heads % kv_heads == 0, "heads", f"a multiple of those of k, {kv_heads}", heads)
        self._prepare(heads, kv_heads, torch.empty(0, device=device).device)
        return heads // states, sum(spread(self.group, self.key_group, seq_len).lengths)

    def prepare_for(self, state: SiteState) -> None:
        """Get ready for calls with a state that was loaded, whose heads are not dealt."""
        heads = state.capacity[1] * self.group.ranks
        self._prepare(heads, heads, state.control.device)

    def _prepare(self, heads: int, kv_heads: int, device: torch.device) -> bool:
        """Return whether other heads were dealt before; they are dealt as they come then."""
        had_others = self.balance and len(self.order) > 0
        if (len(self.order), self.kv_heads, self.order.device) == (heads, kv_heads, device):
            return False
        self.kv_heads = kv_heads
        with torch.inference_mode(False):
            self.order, self.proposed = (self._told_order(heads).to(device) for _ in range(2))
            self.last_step = self.last_step.to(device)
            self.apart = self.apart.pin_memory() if device.type == "cuda" else self.apart
        return had_others

    # ---- which heads are here ---------------------------------------------------------------------------------------

    def check_costs(self, name: str, costs: Sequence[float]) -> None:
        """Raise ValueError unless heads are dealt here, and these are finite numbers, one for each of all heads."""
        require(self.balance, f"costs of {name}", "a site that is balanced", "one that is not")
        known = len(self.order) or len(costs)
        fits = len(costs) == known and len(costs) % (self.group.ranks * self.parts) == 0
        require(fits, f"costs of {name}", f"{len(self.order) or 'as many as'} heads", len(costs))
        require(all(math.isfinite(cost) for cost in costs), f"costs of {name}", "finite numbers", list(costs))

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
        if not self.balance:
            return None
        votes = [state for state in states if isinstance(state, SkipState)]
        if votes:
            self._adopt(votes)
        return self.order

    def _adopt(self, states: list[SkipState]) -> None:
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
            if self.thresholds is not None:
                state.threshold.copy_(self.thresholds.index_select(2, self._heads_of(part)))
            if self.initial_mask is not None and state.initial_mask is not None:
                state.initial_mask.copy_(self.initial_mask.index_select(1, self._heads_of(part)))

    def learn_from(self, states: Sequence[SiteState], q: torch.Tensor) -> None:
        """Propose a deal after some calls, of q; a collective then, which waits for nothing."""
        masks = [state.skip_mask for state in states if isinstance(state, SkipState)]
        if self.balance and masks and not self.is_held and not is_fake(q):
            counted = (self.proposed, self.calls, self.apart)
            propose_deal(*counted, masks, self.order, self.kv_heads, self.group, self.key_group)

    @property
    def shard(self) -> Shard:
        """How many ranks share heads and queries; which heads are here is `own_heads`, since they are dealt."""
        heads, keys = (Ranks(group.rank, group.ranks) for group in (self.group, self.key_group))
        return Shard(heads, keys, groups=(self.group.name, self.key_group.name))

    # ---- what is of the heads here ---------------------------------------------------------------------------------

    @property
    def own_heads(self) -> torch.Tensor:
        """The heads of this rank, int64 (heads / ranks,), in the order of its states."""
        return self.order.view(self.group.ranks, -1)[self.group.rank]

    def _heads_of(self, part: int) -> torch.Tensor:
        return self.own_heads.view(self.parts, -1)[part]

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
        state = states[0] if states else None
        if not self.balance or not isinstance(state, SkipState):
            return
        threshold, initial_mask = options.of_state["threshold"], options.of_state["initial_mask"]
        device = self.order.device
        with torch.inference_mode(False):
            self.thresholds = self.initial_mask = None
            if _is_by_head(threshold, -1):
                self.thresholds = state.threshold_table(threshold, len(self.order)).to(device).clone()
            if _is_by_head(initial_mask, 1):
                rows = self._own_rows(initial_mask, state.capacity[3], state.tile_m)
                self.initial_mask = pack_bits(rows).to(device)


_NUMBERS = 8


def _disagreement(names: list[str], rows: list[list[int]]) -> ValueError | None:
    """Return what is wrong with the numbers of all ranks; zeros are of one that refuses."""
    refused = [rank for rank, row in enumerate(rows) if not any(row)]
    if refused:
        return ValueError(f"q, k, v: expected calls that all ranks accept, got one that rank {refused[0]} refuses")
    for name, *values in zip(names, *rows, strict=True):
        if len(set(values)) > 1:
            return ValueError(f"{name}: expected the same on all ranks, or seq_len= of all of them, got {values}")
    return None


def _numbers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> dict[str, int]:
    """Return what must be the same on all ranks, by what it is called."""
    batch, _, heads, head_dim = q.shape
    return {
        "seq_len": tokens.whole, "batch of q": batch, "heads of q": heads, "heads of k": k.shape[2],
        "head_dim of q": head_dim, "head_dim of v": v.shape[3], "dtype of q": zlib.crc32(str(q.dtype).encode()),
        "dim": q.dim(),
    }  # fmt: skip


def _is_by_head(table: Any, dim: int) -> bool:
    return isinstance(table, torch.Tensor) and table.dim() > max(0, dim) and table.shape[dim] > 1
