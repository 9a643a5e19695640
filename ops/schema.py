"""The ops `lite_attention::skip_attention` and `::attention`: schemas, fake kernel, autograd guard, devices.

Contract (`docs/design.md` has it in full; `oracle.py` computes it sentence by sentence). All tensors are read, and
the first two state tensors written, on the device: a captured graph serves every step, branch and threshold.

* q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv] of one floating dtype; Hq is a multiple of Hkv.
* skip_mask int32 [slots, B, Hq, q_tiles, k_words], 1 = skipped; may be larger than the call needs.
* control int32, laid out in `control.py`.
* threshold float32 [slots or 1, steps or 1, Hq or 1], log2 units; past its end the last step holds. Declared mutable,
  though never written, so that AOTInductor does not bake it in as a constant.
* initial_mask int32 [B or 1, Hq or 1, q_tiles, k_words]: what a fresh step starts from.
* must_do int32 [k_words]: tiles that are always visited.
* key_mask bool [B or 1, Sk]: True = the key takes part, exact to the token.
* Returns out [B, Sq, Hq, Dv], dense with its dims in q's stride order, and lse float32 [B, Hq, Sq], natural log.

`skip_attention_reference` is the same op running the CPU algorithm on every device, for comparison.

`attention` is dense: it has no state, and visits every tile. The arguments that are left, and what it returns, are as
above. A row without an allowed key gives 0 and an LSE of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lite_attention.ops.dense import attention_cpu
from lite_attention.ops.reference import empty_output, skip_attention_reference
from lite_attention.ops.validate import check_inputs

__all__ = ["ATTENTION", "DENSE_SCHEMA", "IMPLEMENTATIONS", "SCHEMA"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) skip_mask, Tensor(b!) control, Tensor(c!) threshold,"
    " Tensor? initial_mask, Tensor? must_do, Tensor? key_mask,"
    " *, float? scale, int tile_m, int tile_n) -> (Tensor out, Tensor lse)"
)
DENSE_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, *, float? scale) -> (Tensor out, Tensor lse)"

_Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
_library = torch.library.Library("lite_attention", "DEF")


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_inputs(q, k, v)
    return empty_output(q, v), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _cuda(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from lite_attention.cute_kernels import (
        skip_attention_forward,  # on first use: nothing below imports cutlass
    )

    return skip_attention_forward(*args, **kwargs)


def _dense_cuda(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from lite_attention.cute_kernels import attention_forward

    return attention_forward(*args, **kwargs)


def _register(name: str, schema: str, kernels: dict[str, _Kernel]) -> Any:
    # Library.define, not custom_op: 3 to 6 us of overhead a call against 30.
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"lite_attention::{name}", _fake, lib=_library)
    op = getattr(torch.ops.lite_attention, name).default

    def refuse_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError(
                f"lite_attention::{name} has no backward, and q, k or v requires a gradient: "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(q, k, v, *args, **kwargs)

    _library.impl(name, refuse_gradients, "Autograd")
    return op


IMPLEMENTATIONS: dict[str | None, Any] = {
    None: _register("skip_attention", SCHEMA, {"CPU": skip_attention_reference, "CUDA": _cuda}),
    "reference": _register(
        "skip_attention_reference", SCHEMA, {"CPU": skip_attention_reference, "CUDA": skip_attention_reference}
    ),
}
ATTENTION: Any = _register("attention", DENSE_SCHEMA, {"CPU": attention_cpu, "CUDA": _dense_cuda})
