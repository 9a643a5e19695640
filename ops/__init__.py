"""The ops, their state, and their CPU kernels. Imports torch alone.

The contract: `docs/contract.md`, and `oracle` as a program.

* An op: `schema` registers it, with `guards` and `fakes`. `cpu`, `residual`, `dense` and `quantize` are CPU kernels,
  made of `rows`, with `choice` and `residual_store`; `allocate` makes their results, `dequantize` and `units` say what
  scores are in. `oracle` and `residual_oracle` are slow and right.
* A state: `state` of votes, `residual_state` of residuals, on `site_state` and `memory`; its words in `control`, its
  bits in `bitmask`, its steps in `plan`. `session` moves many, `clock` and `threads` say where to.
* A call: `functional` and `ranges`, checked by `check_calls`, `validate` and `arguments`; `signature` is what they see.
* Geometry and formats: `tiles`, `targets`, `quantization`, `site`, `shard`. `namespace`: what names begin with.
  `processors`: what kernels leave free.
* For all floors: `torch_internals` names what is private of torch, `option_names` checks what options are called, and
  `lazy_names` resolves names on first use.
"""

from __future__ import annotations

if __name__ == "ops":
    raise ImportError("import lite_attention.ops, not ops: the op must be registered once")

from lite_attention.ops.functional import attention, residual_attention, skip_attention
from lite_attention.ops.plan import step_plan
from lite_attention.ops.residual_state import ResidualState
from lite_attention.ops.session import Session, default_session
from lite_attention.ops.state import DEFAULT_SLOTS, DEFAULT_THRESHOLD, SkipState
from lite_attention.ops.tiles import tile_shape

__all__ = [
    "DEFAULT_SLOTS",
    "DEFAULT_THRESHOLD",
    "ResidualState",
    "Session",
    "SkipState",
    "attention",
    "default_session",
    "residual_attention",
    "skip_attention",
    "step_plan",
    "tile_shape",
]
