"""Compiling a kernel for its target. Needs the DSL, but neither a GPU nor a driver.

Sizes are symbolic: one compile serves every batch, length and number of heads.
"""

from __future__ import annotations

import pkgutil
import warnings
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from lite_attention.cute_kernels.config import DTYPES, Config, KernelConfig, Masks, QuantizeConfig, Scales, State
from lite_attention.cute_kernels.ptx import TYPES
from lite_attention.cute_kernels.quantizers import ChannelReduce, Quantize, QuantizeValue

__all__ = ["compile_kernel"]

_QUANTIZERS = {
    "key_sums": ChannelReduce,
    "quantize_query": Quantize,
    "quantize_key": Quantize,
    "value_max": ChannelReduce,
    "quantize_value": QuantizeValue,
}


def _stride(divisor: int = 1) -> Any:
    return cute.sym_int64(divisibility=divisor)


def _table(dtype: Any, *shape: Any) -> Any:
    """A fake tensor of numbers that are read one by one."""
    strides = (*(_stride() for _ in shape[1:]), 1)
    return make_fake_tensor(dtype, shape, strides, assumed_align=dtype.width // 8)


def _vectors(dtype: Any, *shape: Any) -> Any:
    """A fake tensor whose rows are read 16 bytes at a time, as TMA wants them."""
    strides = (*(_stride(128 // dtype.width) for _ in shape[1:]), 1)
    return make_fake_tensor(dtype, shape, strides, assumed_align=16)


def _attention_arguments(config: KernelConfig) -> list[Any]:
    batch, seq_q, seq_k, heads, kv_heads = (cute.sym_int() for _ in range(5))
    dtype: Any = TYPES[DTYPES[config.dtype]]
    quantization = config.quantization
    state, masks, scales = State(), Masks(), Scales()
    if config.skip:
        skip_mask = _table(Int32, *(cute.sym_int() for _ in range(5)))
        control = _table(Int32, cute.sym_int())
        sizes = tuple(cute.sym_int() for _ in range(3))
        threshold = make_fake_tensor(Float32, sizes, (_stride(), _stride(), _stride()), assumed_align=4)
        initial_mask = _table(Int32, *(cute.sym_int() for _ in range(4))) if config.initial_mask else None
        must_do = _table(Int32, cute.sym_int()) if config.must_do else None
        state = State(skip_mask, control, threshold, initial_mask, must_do)
    if config.key_mask:
        masks = Masks(_table(Int32, batch, 2, cute.sym_int()), _table(Int32, batch, cute.sym_int()))
    if quantization.scores is not None:
        of_q, of_k = (batch, heads, cute.sym_int()), (batch, kv_heads, cute.sym_int())
        scales = Scales(
            _table(Float32, *of_q), _table(Float32, *of_q), _table(Float32, *of_k), _table(Float32, *of_k),
            _table(Float32, batch, heads, seq_q),
            _table(Float32, batch, kv_heads, config.head_dim) if quantization.values is not None else None,
        )  # fmt: skip
    v = _vectors(dtype, batch, seq_k, kv_heads, config.head_dim)
    if quantization.values is not None:
        v = _vectors(cutlass.Uint8, batch, kv_heads, config.head_dim, cute.sym_int())  # e4m3 as bytes
    return [
        _vectors(TYPES[config.score_dtype], batch, seq_q, heads, config.head_dim),
        _vectors(TYPES[config.score_dtype], batch, seq_k, kv_heads, config.head_dim),
        v,
        _vectors(dtype, batch, seq_q, heads, config.head_dim),
        _table(Float32, batch, heads, seq_q), state, masks, scales, Float32(1.0), Int32(1),
    ]  # fmt: skip


def _quantize_arguments(config: QuantizeConfig) -> list[Any]:
    batch, seq, heads, groups = (cute.sym_int() for _ in range(4))
    x = _vectors(TYPES[DTYPES[config.dtype]], batch, seq, heads, config.head_dim)
    key_mask = _table(cutlass.Uint8, cute.sym_int(), seq) if config.key_mask else None
    if config.op in ("key_sums", "value_max"):
        return [x, key_mask, _table(Float32, batch, heads, groups, config.head_dim)]
    if config.op == "quantize_value":
        largest = _vectors(Float32, batch, heads, config.head_dim)
        return [x, largest, key_mask, _vectors(cutlass.Uint8, batch, heads, config.head_dim, cute.sym_int())]
    mean = _vectors(Float32, batch, cute.sym_int(), config.head_dim)
    values = _vectors(cutlass.Int8, batch, seq, heads, config.head_dim)
    lse_shift = _table(Float32, batch, heads, seq) if config.op == "quantize_query" else None
    scales, norms = (_table(Float32, batch, heads, groups) for _ in range(2))
    return [x, mean, key_mask, values, scales, norms, lse_shift, Float32(1.0)]


def compile_kernel(config: Config, *, options: str = "") -> Any:
    """Compile one kernel, and return what can be called with tensors or exported.

    Args:
        config: what to build.
        options: more options of the DSL's compiler.
    """
    kernel: Any
    if isinstance(config, KernelConfig):
        kernel = pkgutil.resolve_name(config.target.kernel)(config)
        arguments = _attention_arguments(config)
    else:
        kernel, arguments = _QUANTIZERS[config.op](config), _quantize_arguments(config)
    with warnings.catch_warnings():
        # Of a group of which nothing is there.
        warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument")
        return cute.compile(
            kernel,
            *arguments,
            make_fake_stream(use_tvm_ffi_env_stream=True),  # torch's current stream at the time of a call
            options=f"--gpu-arch {config.target.name} --enable-tvm-ffi {options}".strip(),
        )
