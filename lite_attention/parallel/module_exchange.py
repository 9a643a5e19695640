"""`ModuleExchange`: what a `LiteAttention` with process groups knows of the other ranks, and what of it all is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from lite_attention.parallel.agreed_calls import agreed_tokens, done_by_all
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
        ModuleExchange.__init__(twin, self.group, self.key_group, self.parts, self.balance, self.learns)
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
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens,
        states: Sequence[SiteState], return_lse: bool,
    ) -> Any:  # fmt: skip
        """Exchange, attend, exchange; learn what heads cost, from a call that fails, too: the other ranks do.

        Args:
            attend: attention by the module's states, which is told `part`, and `keys` where they are gathered.
            q: of the tokens here, as are the others.
            k: keys.
            v: values.
            tokens: as `tokens` has returned them of this call.
            states: one of each part of the heads of this rank.
            return_lse: also return the log-sum-exp.
        """
        order = None if is_fake(q) else self.order_for(states)
        attends = [partial(attend, part=part, keys=tokens.keys) for part in range(self.parts)]
        failures: list[Exception] = []
        result = exchanged_attention(attends, q, k, v, tokens, order, return_lse, failures)
        self._learn_from(states, q)
        if failures:
            raise failures[0]
        return result

    def tokens(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_len: int | None, states: Sequence[SiteState],
        room_for: Callable[[Sequence[torch.Tensor]], Callable[[], None]],
    ) -> Tokens:  # fmt: skip
        """Return where the tokens of a call are; one of a new size is compared with those of the other ranks.

        Args:
            q: of the tokens here, as are the others.
            k: keys.
            v: values.
            seq_len: tokens of all ranks; None = as many on each.
            states: what there are before the call.
            room_for: makes states that fit q, k and v of the heads of this rank, and returns what puts them to use.

        Raises:
            ValueError: the call does not fit, here or on another rank.
            RuntimeError: there is no memory for its states, here or on another rank.
        """
        if torch.compiler.is_compiling():
            self._check_traced(q.shape[2], k.shape[2])
        if torch.compiler.is_compiling() or not isinstance(q, torch.Tensor) or is_fake(q):
            return tokens_of(q, k, v, self.group, self.key_group, seq_len, self.parts)
        call = (*(getattr(x, "shape", None) for x in (q, k, v)), q.dtype, q.device, seq_len)
        tokens = self._agreed.get(call)
        is_new = tokens is None
        if tokens is None:
            tokens = agreed_tokens(q, k, v, self.group, self.key_group, seq_len, self.parts)
        if self._prepare(q.shape[2], k.shape[2], q.device):
            for state in states:
                state.start_fresh()  # its heads are others now
        if is_new:
            shapes = tokens.shapes((q, k, v), self.parts)
            alike = [q.new_empty(shape[-1]).expand(shape) for shape in shapes]  # of no size
            done_by_all(partial(room_for, alike), (self.group, self.key_group), q.device)()
            self._agreed[call] = tokens
        return tokens

    def _check_traced(self, heads: int, kv_heads: int) -> None:
        """Raise RuntimeError unless heads are dealt as a traced call has them, which cannot deal others."""
        dealt = (len(self.order), self.kv_heads)
        if self.is_dealt and dealt != (heads, kv_heads):
            raise RuntimeError(
                f"heads: expected {dealt[0]} that share {dealt[1]} of the keys, which are dealt here, got {heads} and "
                f"{kv_heads}: call .allocate(..., kv_heads={kv_heads}) before this is traced"
            )

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
        self._agreed = {}
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

    def _learn_from(self, states: Sequence[SiteState], q: torch.Tensor) -> None:
        """Propose a deal after some calls, of q; a collective then, which waits for nothing."""
        masks = [state.skip_mask for state in states]
        if self.balance and self.learns and masks and not self.is_held and not is_fake(q):
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

    def adopt(self, options: ModuleOptions, states: Sequence[SiteState]) -> None:
        """Serve new states, which calls of other sizes may not fit."""
        self._agreed = {}
        self.hold(options, states)

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
