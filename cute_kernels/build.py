"""Compiling a kernel for sm_90a. Needs the DSL, but neither a GPU nor a driver."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.forward import DTYPES, SkipAttentionForward

__all__ = ["compile_kernel"]


def _arguments(config: KernelConfig) -> list[Any]:
    """Fake arguments with symbolic sizes: one compile serves every batch, length and number of heads."""

    def stride(divisor: int = 1) -> Any:
        return cute.sym_int64(divisibility=divisor)

    def ints(*shape: Any) -> Any:
        return make_fake_tensor(Int32, shape, (*(stride() for _ in shape[1:]), 1), assumed_align=4)

    batch, seq_q, seq_k, heads, kv_heads = (cute.sym_int() for _ in range(5))
    dtype: Any = getattr(cutlass, DTYPES[config.dtype])

    def rows(seq: Any, heads: Any) -> Any:  # 16-byte strides, as TMA wants them
        shape, strides = (batch, seq, heads, config.head_dim), (stride(8), stride(8), stride(8), 1)
        return make_fake_tensor(dtype, shape, strides, assumed_align=16)

    lse = make_fake_tensor(Float32, (batch, heads, seq_q), (stride(), stride(), 1), assumed_align=4)
    state: list[Any] = [None] * 5
    if config.skip:
        skip_mask = ints(*(cute.sym_int() for _ in range(5)))
        control = ints(cute.sym_int())
        table = tuple(cute.sym_int() for _ in range(3))
        threshold = make_fake_tensor(Float32, table, (stride(), stride(), stride()), assumed_align=4)
        initial_mask = ints(*(cute.sym_int() for _ in range(4))) if config.initial_mask else None
        must_do = ints(cute.sym_int()) if config.must_do else None
        state = [skip_mask, control, threshold, initial_mask, must_do]
    keys: list[Any] = [None, None]
    if config.key_mask:
        keys = [ints(batch, 2, cute.sym_int()), ints(batch, cute.sym_int())]
    return [
        rows(seq_q, heads), rows(seq_k, kv_heads), rows(seq_k, kv_heads), rows(seq_q, heads), lse, *state, *keys,
        Float32(1.0), Int32(1),
    ]  # fmt: skip


def compile_kernel(config: KernelConfig, *, options: str = "") -> Any:
    """Compile one kernel, and return what can be called with tensors or exported.

    Args:
        config: what to build.
        options: more options of the DSL's compiler.
    """
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)  # torch's current stream at the time of a call
    return cute.compile(
        SkipAttentionForward(config),
        *_arguments(config),
        stream,
        options=f"--gpu-arch sm_90a --enable-tvm-ffi {options}".strip(),
    )
