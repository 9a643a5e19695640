"""Attention that several processes share.

`shard` says which part of it is here; `context_parallel` gathers the keys of diffusers' ring, in models that have the
backend `diffusers_member`. The library's own exchange is for attention by hand: `ulysses` calls the op between two of
`exchange`, among the ranks of a `group`. What a `LiteAttention` with a process group has of it is `module_exchange`,
whose calls are compared in `agreed_calls`, and whose heads are `dealt_heads`: `balance` deals them by what they cost in
this run, or, by `costs`, in another. `states` joins what ranks learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite_attention.ops.lazy_names import on_first_use
from lite_attention.ops.processors import leave_processors

if TYPE_CHECKING:
    from lite_attention.parallel.costs import deal_heads, head_costs
    from lite_attention.parallel.states import joined_state_dict
    from lite_attention.parallel.ulysses import ulysses_attention

__all__ = ["deal_heads", "head_costs", "joined_state_dict", "leave_processors", "ulysses_attention"]

_LAZY = {  # most run in one process
    "deal_heads": "lite_attention.parallel.costs",
    "head_costs": "lite_attention.parallel.costs",
    "joined_state_dict": "lite_attention.parallel.states",
    "ulysses_attention": "lite_attention.parallel.ulysses",
}

__getattr__, __dir__ = on_first_use(__name__, _LAZY)
