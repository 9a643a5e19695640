"""What is fixed when a kernel is built."""

from __future__ import annotations

import functools
import pkgutil
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lite_attention.ops.quantization import NONE, Quantization
from lite_attention.ops.targets import DTYPE_NAMES, SM90A, Target

__all__ = [
    "DTYPES",
    "KEY_BITS_PAD",
    "KEY_CHUNK",
    "PROMOTED_KEYS",
    "REDUCE_DEPTH",
    "RESIDUAL_DTYPES",
    "VALUE_BLOCK",
    "ChoiceConfig",
    "Config",
    "KernelConfig",
    "Masks",
    "QuantizeConfig",
    "Residual",
    "Scales",
    "State",
]

KEY_BITS_PAD = 8  # words of 0 at the end of the bits of the keys: the last tile reads past the last key
KEY_CHUNK = 256  # keys that one thread block adds up for their mean, or whose largest values it finds
PROMOTED_KEYS = 1536  # that products of short sums add up before the sum goes on in float32
REDUCE_DEPTH = 8  # rows that a thread of `ChannelReduce` has on their way
VALUE_BLOCK = 128  # keys whose values one thread block transposes

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
RESIDUAL_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class KernelConfig:
    """One compiled attention kernel. Everything that is not here is read at run time.

    Args:
        dtype: "bf16" or "fp16", of the output, and of what is not quantized.
        head_dim: of queries, keys and values.
        tile_m: query rows of a CTA.
        tile_n: keys of a tile.
        skip: read and write the skip state; False is dense attention without state.
        initial_mask: a fresh step starts from an initial mask.
        must_do: some tiles are always visited.
        key_mask: some keys are excluded.
        quantization: what scores and products with values are computed from.
        residual: what residuals are stored in, "fp8" or "bf16", where there are any; "" = tiles are voted out.
        target: what it is compiled for.

    Raises:
        ValueError: it does not fit the target, tile_n the quantization, or there is a residual without a state.
    """

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int
    skip: bool = True
    initial_mask: bool = False
    must_do: bool = False
    key_mask: bool = False
    quantization: Quantization = NONE
    residual: str = ""
    target: Target = SM90A

    def __post_init__(self) -> None:
        if self.residual not in ("", *RESIDUAL_DTYPES) or (self.residual and not self.skip):
            raise ValueError(f"residual: expected one of {tuple(RESIDUAL_DTYPES)}, with a state, got {self.residual!r}")
        multiple = self.quantization.key_multiple
        if self.tile_n % multiple:
            raise ValueError(
                f"tile_n: expected a multiple of {multiple} for {self.quantization.name!r}, got {self.tile_n}"
            )
        self.budget.check()

    @property
    def votes(self) -> bool:
        """Whether tiles are voted out while they are computed."""
        return self.skip and not self.residual

    @functools.cached_property
    def budget(self) -> Any:
        """What it takes of a multiprocessor; a class of the target's."""
        return pkgutil.resolve_name(self.target.budget)(self)

    @property
    def score_dtype(self) -> torch.dtype:
        """Of queries and keys."""
        return self.quantization.scores or DTYPES[self.dtype]

    @property
    def value_dtype(self) -> torch.dtype:
        """Of weights and values."""
        return self.quantization.values or DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Name of the exported function."""
        kind = "skip" if self.skip else "dense"
        parts = [
            f"residual_{self.residual}" if self.residual else kind,
            self.dtype,
            f"d{self.head_dim}",
            f"{self.tile_m}x{self.tile_n}",
        ]
        parts += [] if self.quantization == NONE else [self.quantization.name]
        options = (("i", self.initial_mask), ("d", self.must_do), ("k", self.key_mask))
        flags = "".join(letter for letter, on in options if on)
        return "_".join(["lite_attention", self.target.symbol, *parts, *([flags] if flags else [])])


@dataclass(frozen=True)
class QuantizeConfig:
    """One compiled kernel of those that make queries, keys and values ready for attention in 8 bits.

    Args:
        op: "key_sums", "quantize_query", "quantize_key", "value_max" or "quantize_value".
        dtype: "bf16" or "fp16".
        head_dim: of queries, keys and values.
        rows: that share a scale; otherwise those of one thread block.
        key_mask: some keys are excluded.
        target: what it is compiled for.

    Raises:
        ValueError: threads cannot share out rows of this width, or so many of them.
    """

    op: str
    dtype: str
    head_dim: int
    rows: int
    key_mask: bool = False
    target: Target = SM90A

    def __post_init__(self) -> None:
        least = 32 if self.op == "quantize_value" else 8  # channels of a warp, and of a thread
        if self.head_dim not in (8 << i for i in range(5)) or self.head_dim < least:
            raise ValueError(
                f"head_dim: expected a power of two from {least} to 128 for {self.op}, got {self.head_dim}"
            )
        if self.rows < 1 or self.rows % self.rows_at_once:
            raise ValueError(f"rows: expected a multiple of {self.rows_at_once} for {self.op}, got {self.rows}")

    @property
    def rows_at_once(self) -> int:
        """Rows that the threads which share them have on their way together."""
        if self.op == "quantize_value":
            return VALUE_BLOCK
        rows = (32 if self.op == "quantize_query" else 128) // (self.head_dim // 8)  # a thread has 8 channels
        return rows * REDUCE_DEPTH if self.op in ("key_sums", "value_max") else rows

    @property
    def name(self) -> str:
        """Name of the exported function."""
        name = f"lite_attention_{self.target.symbol}_{self.op}_{self.dtype}_d{self.head_dim}_{self.rows}"
        return f"{name}_k" if self.key_mask else name


@dataclass(frozen=True)
class ChoiceConfig:
    """One compiled kernel of those that choose which tiles stay, by their mass.

    Args:
        op: "count_masses" or "choose_tiles".
        must_do: some tiles always stay.
        target: what it is compiled for.
    """

    op: str
    must_do: bool = False
    target: Target = SM90A

    @property
    def name(self) -> str:
        """Name of the exported function."""
        return f"lite_attention_{self.target.symbol}_{self.op}" + ("_d" if self.must_do else "")


Config = KernelConfig | QuantizeConfig | ChoiceConfig


# Arguments of an attention kernel, in order, that not all have; None = it has no such.


class State(NamedTuple):
    """The skip state, and masks of tiles."""

    skip_mask: Any = None
    control: Any = None
    threshold: Any = None
    initial_mask: Any = None
    must_do: Any = None


class Residual(NamedTuple):
    """What the residual has besides: `ops/schema.py` says what the first six are; and scratch of one call."""

    plan: Any = None
    keep: Any = None
    times: Any = None
    values: Any = None
    scales: Any = None
    row_lse: Any = None
    mass: Any = None  # int32 [B, Hq, q_tiles, k_tiles], of the tiles in a deciding step, 2^-18; 0 = not visited
    decision: Any = None  # int32 [4], written at the end of such a step: 1, slot, half of the mask, step


class Masks(NamedTuple):
    """Of keys: bits a tile int32 [B, 2, words] (some key allowed; some key excluded), and bits a key, padded."""

    tile_flags: Any = None
    key_bits: Any = None


class Scales(NamedTuple):
    """What quantizing gives besides values: scales and norms of queries and keys, LSE shift, scales of FP8 values."""

    q: Any = None
    q_norms: Any = None
    k: Any = None
    k_norms: Any = None
    lse_shift: Any = None
    v: Any = None
