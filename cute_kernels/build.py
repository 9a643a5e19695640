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

from lite_attention.cute_kernels.choice import ChooseTiles, CountMasses
from lite_attention.cute_kernels.config import (
    DTYPES,
    RESIDUAL_DTYPES,
    ChoiceConfig,
    Config,
    KernelConfig,
    Masks,
    QuantizeConfig,
    Residual,
    Scales,
    State,
)
from lite_attention.cute_kernels.ptx import TYPES
from lite_attention.cute_kernels.quantizers import ChannelReduce, Quantize, QuantizeValue

__all__ = ["compile_kernel"]

_OTHERS = {
    "key_sums": ChannelReduce,
    "quantize_query": Quantize,
    "quantize_key": Quantize,
    "value_max": ChannelReduce,
    "quantize_value": QuantizeValue,
    "count_masses": CountMasses,
    "choose_tiles": ChooseTiles,
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
    state, masks, scales, residual = State(), Masks(), Scales(), Residual()
    if config.skip:
        skip_mask = _table(Int32, *(cute.sym_int() for _ in range(6 if config.residual else 5)))
        control = _table(Int32, cute.sym_int())
        sizes = tuple(cute.sym_int() for _ in range(3))
        threshold = None
        if config.votes:
            threshold = make_fake_tensor(Float32, sizes, (_stride(), _stride(), _stride()), assumed_align=4)
        initial_mask = _table(Int32, *(cute.sym_int() for _ in range(4))) if config.initial_mask else None
        must_do = _table(Int32, cute.sym_int()) if config.must_do else None
        state = State(skip_mask, control, threshold, initial_mask, must_do)
    if config.residual:
        residual = _residual_arguments(config)
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
        _table(Float32, batch, heads, seq_q), state, masks, scales, residual, Float32(1.0), Int32(1),
    ]  # fmt: skip


def _residual_arguments(config: KernelConfig) -> Residual:
    rows = tuple(cute.sym_int() for _ in range(5))  # slots, planes, batch, heads, queries: of the state
    stored = cutlass.Uint8 if config.residual == "fp8" else TYPES[RESIDUAL_DTYPES[config.residual]]
    return Residual(
        _table(Int32, cute.sym_int()),
        _table(Float32, cute.sym_int()),
        _table(Float32, cute.sym_int(), 3),
        _vectors(stored, *rows, config.head_dim),  # e4m3 as bytes
        _table(Float32, *rows) if config.residual == "fp8" else None,
        _table(Float32, *(cute.sym_int() for _ in range(5))),
        _table(Int32, *(cute.sym_int() for _ in range(4))),
        _table(Int32, 4),
    )


def _choice_arguments(config: ChoiceConfig) -> list[Any]:
    masses = _table(Int32, *(cute.sym_int() for _ in range(4)))
    counts, decision = _table(Int32, cute.sym_int(), cute.sym_int()), _table(Int32, 4)
    if config.op == "count_masses":
        must_do = _table(Int32, cute.sym_int()) if config.must_do else None
        return [masses, counts, decision, _table(Int32, cute.sym_int()), must_do, tuple(Int32(1) for _ in range(4))]
    return [
        masses,
        counts,
        decision,
        _table(Float32, cute.sym_int()),
        _table(Int32, *(cute.sym_int() for _ in range(6))),
    ]


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
        kernel = _OTHERS[config.op](config)
        arguments = _quantize_arguments(config) if isinstance(config, QuantizeConfig) else _choice_arguments(config)
    with warnings.catch_warnings():
        # Of a group of which nothing is there.
        warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument")
        return cute.compile(
            kernel,
            *arguments,
            make_fake_stream(use_tvm_ffi_env_stream=True),  # torch's current stream at the time of a call
            options=f"--gpu-arch {config.target.name} --enable-tvm-ffi {options}".strip(),
        )
