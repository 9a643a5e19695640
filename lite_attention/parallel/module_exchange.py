"""`ModuleExchange`: what a `LiteAttention` with process groups does around attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lite_attention.module_options import ModuleOptions
from lite_attention.ops.arguments import require
from lite_attention.ops.part import Part
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import is_fake
from lite_attention.parallel.agreed_calls import agreed_tokens, done_by_all
from lite_attention.parallel.dealt_heads import DealtHeads
from lite_attention.parallel.exchange import Tokens, spread, tokens_of
from lite_attention.parallel.ulysses import Attend, exchanged_attention

__all__ = ["ModuleExchange"]


class ModuleExchange(DealtHeads):
    """Exchanges the tokens of this rank for heads, or gathers keys, in calls that all ranks agree upon.

    Its arguments are those of `DealtHeads`.
    """

    def __init__(self, process_group: Any, key_group: Any, parts: int, balance: bool, learns: bool = True) -> None:
        super().__init__(process_group, key_group, parts, balance, learns)
        self._agreed: dict[Any, Tokens] = {}

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

    def attend(
        self, attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens,
        states: Sequence[SiteState], return_lse: bool,
    ) -> Any:  # fmt: skip
        """Exchange, attend, exchange, and learn what heads cost.

        A call that fails here counts, where the others go on: else ranks and parts would be at other steps. One that
        fails on all ranks changes nothing.

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
        failures: dict[int, Exception] = {}
        result = exchanged_attention(attends, q, k, v, tokens, order, return_lse, failures)
        self.learn_from(states, q)
        if failures and not is_fake(q) and not _is_of_none(result[0] if return_lse else result):
            for part in failures:
                states[part].pass_over()
        for error in failures.values():
            raise error
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
        if torch.compiler.is_compiling() or (isinstance(q, torch.Tensor) and is_fake(q)):
            return tokens_of(q, k, v, self.group, self.key_group, seq_len, self.parts)
        of_tensors = [(x.shape, x.dtype, x.device) for x in (q, k, v) if isinstance(x, torch.Tensor)]
        device = of_tensors[0][2] if of_tensors else self.order.device
        call = (*of_tensors, repr(seq_len))  # whatever these are
        tokens = self._agreed.get(call)
        is_new = tokens is None
        if tokens is None:
            others = {"balance": (self.balance, self.learns), "costs": self._costs}
            tokens = agreed_tokens(q, k, v, self.group, self.key_group, seq_len, self.parts, others, device)
        if self.deal_out(q.shape[2], k.shape[2], q.device):
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
        self.deal_out(heads, kv_heads, torch.empty(0, device=device).device)
        return heads // states, sum(spread(self.group, self.key_group, seq_len).lengths)

    def prepare_for(self, heads: int, seq_len: int, device: torch.device | None) -> Part | None:
        """Get ready for calls with a state of so many heads and tokens that was saved; return which part is here.

        Raises:
            ValueError: heads do not divide.
        """
        self._agreed = {}
        _, queries = self.prepare(heads, heads, seq_len, device or torch.get_default_device())
        words = self.part_words(0, seq_len)
        return None if words is None else Part.of_words(words, queries)

    def set_costs(self, costs: Sequence[float]) -> None:
        """Deal heads by these costs, where the next generation begins; the next call compares them over the ranks."""
        super().set_costs(costs)
        self._agreed = {}

    def adopt(self, options: ModuleOptions, states: Sequence[SiteState]) -> None:
        """Serve new states, which calls of other sizes may not fit."""
        self._agreed = {}
        self.hold(options, states)


def _is_of_none(out: torch.Tensor) -> bool:
    """Return whether all ranks have failed, of whose heads NaN come."""
    return bool(out.isnan().all())
