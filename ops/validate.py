"""What the arguments of a call must look like. Every message names one, what was expected and what came."""

from __future__ import annotations

import math

import torch

from lite_attention.ops.arguments import require, threshold_values
from lite_attention.ops.signature import TensorSignature
from lite_attention.ops.torch_internals import under_mode

__all__ = [
    "check_dense_call",
    "check_inputs",
    "check_key_lengths",
    "check_key_mask",
    "check_keys",
    "check_quantize_key",
    "check_queries",
    "check_threshold",
    "check_values",
    "is_bshd",
    "is_traced",
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_bshd(x: object) -> bool:
    """Whether it is a tensor of four dimensions."""
    return isinstance(x, torch.Tensor) and x.dim() == 4


def _check_tensor(name: str, x: torch.Tensor | TensorSignature) -> None:
    require(isinstance(x, (torch.Tensor, TensorSignature)), name, "a tensor", type(x).__name__)


def _check_rank(name: str, x: torch.Tensor | TensorSignature) -> None:
    _check_tensor(name, x)
    require(len(x.shape) == 4, name, "(batch, seq_len, heads, head_dim)", f"{len(x.shape)} dimensions")


def _check_dtype(name: str, x: torch.Tensor | TensorSignature) -> None:
    require(x.dtype in _DTYPES, f"dtype of {name}", "float16, bfloat16, float32 or float64", x.dtype)


def check_inputs(
    q: torch.Tensor | TensorSignature, k: torch.Tensor | TensorSignature, v: torch.Tensor | TensorSignature
) -> None:
    """Check rank, dtype, device and sizes of q, k and v, which may be fake or symbolic.

    Raises:
        ValueError: naming the argument at fault.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, t)
        require(t.dtype == q.dtype, f"dtype of {name}", f"that of q, {q.dtype}", t.dtype)
        require(t.device == q.device, f"device of {name}", f"that of q, {q.device}", t.device)
    _check_dtype("q", q)
    batch, seq_q, heads, head_dim = q.shape
    _, seq_k, kv_heads, _ = k.shape
    require(k.shape[0] == batch, "batch of k", f"that of q, {batch}", k.shape[0])
    require(k.shape[3] == head_dim, "head_dim of k", f"that of q, {head_dim}", k.shape[3])
    require(v.shape[0] == batch, "batch of v", f"that of q, {batch}", v.shape[0])
    require(v.shape[1] == seq_k, "seq_len of v", f"that of k, {seq_k}", v.shape[1])
    require(v.shape[2] == kv_heads, "heads of v", f"those of k, {kv_heads}", v.shape[2])
    for name, size in (
        ("batch of q", batch),
        ("seq_len of q", seq_q),
        ("seq_len of k", seq_k),
        ("heads of k", kv_heads),
        ("head_dim of q", head_dim),
        ("head_dim of v", v.shape[3]),
    ):
        require(size >= 1, name, "at least 1", size)
    require(heads >= 1 and heads % kv_heads == 0, "heads of q", f"a multiple of those of k, {kv_heads}", heads)


def check_threshold(threshold: float | torch.Tensor, *, allow_positive: bool) -> None:
    """Check threshold values, in log2 units: reads them, so not for the hot path.

    Raises:
        ValueError: not numbers, NaN, or a positive value without `allow_positive`.
    """
    values = threshold_values("threshold", threshold)
    require(not bool(values.isnan().any()), "threshold", "numbers", "NaN")
    highest = float(values.max()) if values.numel() else -math.inf
    require(
        allow_positive or highest <= 0,
        "threshold",
        "at most 0 (log2 units; a positive one drops tiles that raise the maximum, allow_positive=True insists)",
        highest,
    )


def _check_scale(scale: float | None) -> None:
    require(scale is None or 0 < scale < math.inf, "scale", "a number above 0", scale)


def check_key_mask(key_mask: torch.Tensor | TensorSignature, q: torch.Tensor | TensorSignature, seq_k: int) -> None:
    """Check that a key mask is bool, on the device of q, and (batch or 1, seq_k).

    Raises:
        ValueError: naming what was expected and what came.
    """
    _check_tensor("key_mask", key_mask)
    batch, got = q.shape[0], tuple(key_mask.shape)
    require(len(got) == 2, "key_mask", "2 dimensions", len(got))
    require(key_mask.dtype == torch.bool, "dtype of key_mask", "torch.bool", key_mask.dtype)
    require(key_mask.device == q.device, "device of key_mask", f"that of q, {q.device}", key_mask.device)
    require(got in ((batch, seq_k), (1, seq_k)), "key_mask", f"(1 or {batch}, {seq_k})", got)


def check_key_lengths(key_lengths: torch.Tensor, q: torch.Tensor, seq_k: int) -> None:
    """Check that lengths are integers (batch,) on the device of q, and, where that waits for nothing, 0 to seq_k.

    Raises:
        ValueError: naming what was expected and what came.
    """
    is_tensor = isinstance(key_lengths, torch.Tensor)
    require(is_tensor, "key_lengths", f"an integer tensor ({q.shape[0]},)", type(key_lengths).__name__)
    dtype, device = key_lengths.dtype, key_lengths.device
    require(dtype in _INTEGERS, "dtype of key_lengths", "an integer one", dtype)
    require(key_lengths.shape == q.shape[:1], "key_lengths", f"shape ({q.shape[0]},)", tuple(key_lengths.shape))
    require(device == q.device, "device of key_lengths", f"that of q, {q.device}", device)
    if device.type == "cpu" and not is_traced():
        outside = [length for length in key_lengths.tolist() if not 0 <= length <= seq_k]
        require(not outside, "key_lengths", f"0 to {seq_k}", outside)


def is_traced() -> bool:
    """Whether tensors may have no values, or belong to a mode: a compiler, fake tensors, `torch.func`."""
    return torch.compiler.is_compiling() or under_mode()


def check_dense_call(
    q: torch.Tensor | TensorSignature,
    k: torch.Tensor | TensorSignature,
    v: torch.Tensor | TensorSignature,
    key_mask: torch.Tensor | TensorSignature | None,
    scale: float | None,
) -> None:
    """Check a call of `lite_attention::attention`; the arguments are those of the op.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    check_inputs(q, k, v)
    _check_scale(scale)
    if key_mask is not None:
        check_key_mask(key_mask, q, k.shape[1])


def check_keys(k: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """Check a call of `lite_attention::key_mean`; the arguments are those of the op.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    _check_one("k", k, key_mask)


def check_values(v: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """Check a call of `lite_attention::quantize_value`; the arguments are those of the op.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    _check_one("v", v, key_mask)


def check_queries(q: torch.Tensor, mean: torch.Tensor, scale: float | None) -> None:
    """Check a call of `lite_attention::quantize_query`; the arguments are those of the op.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    _check_one("q", q)
    _check_mean(mean, "q", q)
    heads, kv_heads = q.shape[2], mean.shape[1]
    require(kv_heads >= 1 and heads % kv_heads == 0, "heads of q", f"a multiple of those of mean, {kv_heads}", heads)
    _check_scale(scale)


def check_quantize_key(k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, tile_n: int) -> None:
    """Check a call of `lite_attention::quantize_key`; the arguments are those of the op.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    check_keys(k, key_mask)
    _check_mean(mean, "k", k)
    require(mean.shape[1] == k.shape[2], "heads of mean", f"those of k, {k.shape[2]}", mean.shape[1])
    require(tile_n >= 1, "tile_n", "at least 1", tile_n)


def _check_one(name: str, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> None:
    """Check queries, keys or values alone; the mask is that of the keys."""
    _check_rank(name, x)
    _check_dtype(name, x)
    for axis, size in zip(("batch", "seq_len", "heads", "head_dim"), x.shape, strict=True):
        require(size >= 1, f"{axis} of {name}", "at least 1", size)
    if key_mask is not None:
        check_key_mask(key_mask, x, x.shape[1])


def _check_mean(mean: torch.Tensor, name: str, x: torch.Tensor) -> None:
    """Check the mean of the keys beside the queries or keys of that name."""
    require(len(mean.shape) == 3, "mean", "(batch, kv_heads, head_dim)", f"{len(mean.shape)} dimensions")
    require(mean.dtype == torch.float32, "dtype of mean", "torch.float32", mean.dtype)
    require(mean.device == x.device, "device of mean", f"that of {name}, {x.device}", mean.device)
    require(mean.shape[0] == x.shape[0], "batch of mean", f"that of {name}, {x.shape[0]}", mean.shape[0])
    require(mean.shape[2] == x.shape[3], "head_dim of mean", f"that of {name}, {x.shape[3]}", mean.shape[2])
