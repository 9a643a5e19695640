"""Number formats of attention: one record each, by the name that the ops' schemas and users have for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lite_attention.ops.arguments import check_switch
from lite_attention.ops.namespace import KERNELS

__all__ = ["NONE", "QUANTIZATIONS", "Quantization", "QuantizationName", "check_quantization", "quantization_of"]

QuantizationName = Literal["none", "int8", "int8_fp8"]  # for editors


@dataclass(frozen=True, repr=False)
class Quantization:
    """What scores, and products with values, are computed from. `ops/quantize.py` says how inputs get there.

    Args:
        name: of scores, and after the underscore of weights and values.
        scores: dtype of queries and keys, which come with scales; None = as they are.
        values: dtype of weights and values, of which values come with scales; None = the dtype of the call.
        key_multiple: keys that one product of weights and values takes at a time: a tile's are a multiple.
        softmax: "module:Class", how kernels make weights of scores.
        weighs_excluded: weights of excluded keys may be a little above 0, so their values must be 0.
        short_sums: what products with values add up loses its low bits, so sums go on elsewhere, in float32.
    """

    name: str
    scores: torch.dtype | None
    values: torch.dtype | None
    key_multiple: int
    softmax: str
    weighs_excluded: bool = False
    short_sums: bool = False

    def __repr__(self) -> str:
        return f"<quantization {self.name}>"


NONE = Quantization("none", None, None, key_multiple=16, softmax=f"{KERNELS}.softmax:FloatSoftmax")

QUANTIZATIONS = {
    quantization.name: quantization
    for quantization in (
        NONE,
        Quantization(
            "int8", torch.int8, None, key_multiple=16, softmax=f"{KERNELS}.softmax_int8:Int8Softmax",
            weighs_excluded=True,
        ),
        Quantization(
            "int8_fp8", torch.int8, torch.float8_e4m3fn, key_multiple=32,
            softmax=f"{KERNELS}.softmax_int8:Int8Fp8Softmax", weighs_excluded=True,
            short_sums=True,
        ),
    )
}  # fmt: skip


def check_quantization(quantization: str) -> Quantization:
    """Return the quantization of a name.

    Raises:
        ValueError: it is none of `QUANTIZATIONS`.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected {' or '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}")
    return QUANTIZATIONS[quantization]


def quantization_of(use_int8: bool, use_fp8: bool, name: str = "none") -> str:
    """Return the name of the quantization that users' switches stand for, or that they give by name.

    Raises:
        ValueError: a switch that is neither True nor False, `use_fp8` alone, no such name, or one that the switches do
            not stand for.
    """
    for switch_name, switch in (("use_int8", use_int8), ("use_fp8", use_fp8)):
        check_switch(switch_name, switch)
    if use_fp8 and not use_int8:
        raise ValueError("use_fp8: expected use_int8=True beside it, got use_int8=False")
    check_quantization(name)
    by_switches = "int8_fp8" if use_fp8 else "int8" if use_int8 else "none"
    if "none" not in (by_switches, name) and by_switches != name:
        raise ValueError(f"quantization: expected {by_switches!r}, which use_int8 and use_fp8 ask for, got {name!r}")
    return name if by_switches == "none" else by_switches
