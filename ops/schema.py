"""The ops `lite_attention::skip_attention`, `::attention` and those of `quantize.py`: schemas, fakes, devices.

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
* quantization: what scores, and so votes, are computed from: "none" (q and k as they are) or "int8"; "int8_fp8" are the
  scores of "int8", and weights and values in FP8; see `quantize.py`.
* Returns out [B, Sq, Hq, Dv], dense with its dims in q's stride order, and lse float32 [B, Hq, Sq], natural log.

`skip_attention_reference` is the same op running the CPU algorithm on every device, for comparison.

`attention` is dense: it has no state, and visits every tile. The arguments that are left, and what it returns, are as
above. A row without an allowed key gives 0 and an LSE of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lite_attention.ops.allocate import empty_output
from lite_attention.ops.cpu import skip_attention_reference
from lite_attention.ops.dense import attention_cpu
from lite_attention.ops.quantize import (
    KEY_MEAN_SCHEMA,
    QUANTIZE_KEY_SCHEMA,
    QUANTIZE_QUERY_SCHEMA,
    QUANTIZE_VALUE_SCHEMA,
    key_mean,
    key_mean_fake,
    quantize_key,
    quantize_key_fake,
    quantize_query,
    quantize_query_fake,
    quantize_value,
    quantize_value_fake,
)
from lite_attention.ops.tiles import check_quantization
from lite_attention.ops.validate import check_inputs

__all__ = ["ATTENTION", "DENSE_SCHEMA", "IMPLEMENTATIONS", "SCHEMA"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) skip_mask, Tensor(b!) control, Tensor(c!) threshold,"
    " Tensor? initial_mask, Tensor? must_do, Tensor? key_mask,"
    " *, float? scale, int tile_m, int tile_n, str quantization='none') -> (Tensor out, Tensor lse)"
)
DENSE_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, *, float? scale) -> (Tensor out, Tensor lse)"

_Kernel = Callable[..., Any]
_library = torch.library.Library("lite_attention", "DEF")


def _skip_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, quantization: str = "none", **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantization(quantization)
    return _fake(q, k, v)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_inputs(q, k, v)
    return empty_output(q, v), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _cuda(name: str) -> _Kernel:
    """Return an entry of the CUDA kernels, imported on first use: nothing below imports cutlass."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        from lite_attention import cute_kernels

        return getattr(cute_kernels, name)(*args, **kwargs)

    return kernel


def _register(
    name: str, schema: str, kernels: dict[str, _Kernel], fake: _Kernel, inputs: tuple[str, ...] = ("q", "k", "v")
) -> Any:
    """Define an op; its first arguments, `inputs`, must not require a gradient."""
    # Library.define, not custom_op: 3 to 6 us of overhead a call against 30.
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"lite_attention::{name}", fake, lib=_library)
    op = getattr(torch.ops.lite_attention, name).default

    def refuse_gradients(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in args[: len(inputs)]):
            raise RuntimeError(
                f"lite_attention::{name} has no backward, and {' or '.join(inputs)} requires a gradient: "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    _library.impl(name, refuse_gradients, "Autograd")
    return op


IMPLEMENTATIONS: dict[str | None, Any] = {
    None: _register(
        "skip_attention", SCHEMA, {"CPU": skip_attention_reference, "CUDA": _cuda("skip_attention_forward")}, _skip_fake
    ),
    "reference": _register(
        "skip_attention_reference",
        SCHEMA,
        {"CPU": skip_attention_reference, "CUDA": skip_attention_reference},
        _skip_fake,
    ),
}
ATTENTION: Any = _register("attention", DENSE_SCHEMA, {"CPU": attention_cpu, "CUDA": _cuda("attention_forward")}, _fake)

for _name, _schema, _kernel, _empty, _inputs in (
    ("key_mean", KEY_MEAN_SCHEMA, key_mean, key_mean_fake, ("k",)),
    ("quantize_query", QUANTIZE_QUERY_SCHEMA, quantize_query, quantize_query_fake, ("q", "mean")),
    ("quantize_key", QUANTIZE_KEY_SCHEMA, quantize_key, quantize_key_fake, ("k", "mean")),
    ("quantize_value", QUANTIZE_VALUE_SCHEMA, quantize_value, quantize_value_fake, ("v",)),
):
    _register(_name, _schema, {"CPU": _kernel, "CUDA": _cuda(_name)}, _empty, _inputs)
