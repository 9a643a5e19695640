"""The ops `lite_attention::skip_attention`, `::residual_attention`, `::attention` and those of `quantize.py`.

Schemas, kernels, guards.

Contract (`docs/contract.md` has it in full; `oracle.py` computes it sentence by sentence). All tensors are read, and
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

`skip_attention_reference` is the same op running the CPU kernel on every device, for comparison, and
`skip_attention_portable` one that runs the portable kernel on every GPU, also where there is another.

`residual_attention` keeps what skipped tiles gave, and has a state of its own; the rest is as above.

* skip_mask int32 [slots, 2, B, Hq, q_tiles, k_words]: mask n in half n % 2, see `control.py`.
* plan int32 [steps], keep float32 [steps], times float32 [slots, 3]; declared mutable as threshold is.
* residual [slots, planes, B, Hq, Sq, Dv]; residual_scale float32 [slots, planes, B, Hq, Sq] if that is e4m3, else None.
* row_lse float32 [slots, 1 + planes, B, Hq, Sq]: the LSE of the step before, then what each mask leaves out of the LSE.

`attention` is dense: it has no state, and visits every tile. The arguments that are left, and what it returns, are as
above. A row without an allowed key gives 0 and an LSE of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lite_attention.ops.cpu import skip_attention_reference
from lite_attention.ops.dense import attention_cpu
from lite_attention.ops.fakes import (
    attention_fake,
    key_mean_fake,
    quantize_key_fake,
    quantize_query_fake,
    quantize_value_fake,
    stateful_attention_fake,
)
from lite_attention.ops.guards import refuse_vmap, without_autocast, without_derivatives
from lite_attention.ops.namespace import NAMESPACE
from lite_attention.ops.quantize import key_mean, quantize_key, quantize_query, quantize_value
from lite_attention.ops.residual import residual_attention_reference
from lite_attention.ops.torch_internals import writes

__all__ = ["ATTENTION", "DENSE_SCHEMA", "IMPLEMENTATIONS", "RESIDUAL_IMPLEMENTATIONS", "RESIDUAL_SCHEMA", "SCHEMA"]

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) skip_mask, Tensor(b!) control, Tensor(c!) threshold,"
    " Tensor? initial_mask, Tensor? must_do, Tensor? key_mask,"
    " *, float? scale, int tile_m, int tile_n, str quantization='none') -> (Tensor out, Tensor lse)"
)
RESIDUAL_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) skip_mask, Tensor(b!) control, Tensor(c!) plan, Tensor(d!) keep,"
    " Tensor(e!) times, Tensor(f!) residual, Tensor(g!)? residual_scale, Tensor(h!) row_lse,"
    " Tensor? initial_mask, Tensor? must_do, Tensor? key_mask,"
    " *, float? scale, int tile_m, int tile_n, str quantization='none') -> (Tensor out, Tensor lse)"
)
DENSE_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, *, float? scale) -> (Tensor out, Tensor lse)"
_KEY_MEAN_SCHEMA = "(Tensor k, Tensor? key_mask) -> Tensor"
_QUANTIZE_QUERY_SCHEMA = (
    "(Tensor q, Tensor mean, *, float? scale) -> (Tensor values, Tensor scales, Tensor norms, Tensor lse_shift)"
)
_QUANTIZE_KEY_SCHEMA = (
    "(Tensor k, Tensor mean, Tensor? key_mask, *, int tile_n) -> (Tensor values, Tensor scales, Tensor norms)"
)
_QUANTIZE_VALUE_SCHEMA = "(Tensor v, Tensor? key_mask) -> (Tensor values, Tensor scales)"

_Kernel = Callable[..., Any]
_library = torch.library.Library(NAMESPACE, "DEF")


def _cuda(name: str, **options: Any) -> _Kernel:
    """Return an entry of the CUDA kernels, imported on first use: nothing below imports cutlass."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        from lite_attention import cute_kernels

        return getattr(cute_kernels, name)(*args, **kwargs, **options)

    return kernel


def _register(
    name: str, schema: str, cpu: _Kernel, cuda: _Kernel, fake: _Kernel, inputs: tuple[str, ...] = ("q", "k", "v")
) -> Any:
    """Define an op; its first arguments, `inputs`, are those that a derivative would be of."""
    # Library.define, not custom_op: 3 to 6 us of overhead a call against 30.
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    _library.impl(name, without_derivatives(op, inputs), "Autograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, without_autocast(op, key), key)
    if writes(op):
        _library.impl(name, refuse_vmap(op), "FuncTorchBatched")
    return op


def _register_stateful(name: str, schema: str, reference: _Kernel) -> dict[str | None, Any]:
    """Define an op with a state, and beside it the same with the CPU kernel on all devices, and the portable one on all
    GPUs."""
    cuda, portable = _cuda(f"{name}_forward"), _cuda(f"{name}_forward", implementation="portable")
    return {
        None: _register(name, schema, reference, cuda, stateful_attention_fake),
        "reference": _register(f"{name}_reference", schema, reference, reference, stateful_attention_fake),
        "portable": _register(f"{name}_portable", schema, reference, portable, stateful_attention_fake),
    }


IMPLEMENTATIONS = _register_stateful("skip_attention", SCHEMA, skip_attention_reference)
RESIDUAL_IMPLEMENTATIONS = _register_stateful("residual_attention", RESIDUAL_SCHEMA, residual_attention_reference)
ATTENTION: Any = _register("attention", DENSE_SCHEMA, attention_cpu, _cuda("attention_forward"), attention_fake)

for _name, _schema, _cpu, _fake, _inputs in (
    ("key_mean", _KEY_MEAN_SCHEMA, key_mean, key_mean_fake, ("k",)),
    ("quantize_query", _QUANTIZE_QUERY_SCHEMA, quantize_query, quantize_query_fake, ("q", "mean")),
    ("quantize_key", _QUANTIZE_KEY_SCHEMA, quantize_key, quantize_key_fake, ("k", "mean")),
    ("quantize_value", _QUANTIZE_VALUE_SCHEMA, quantize_value, quantize_value_fake, ("v",)),
):
    _register(_name, _schema, _cpu, _cuda(_name), _fake, _inputs)
