"""Whether a state fits a call, before anything is touched. Calls that passed are remembered by their signatures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lite_attention.ops.arguments import require
from lite_attention.ops.bitmask import WORD_BITS
from lite_attention.ops.control import control_words
from lite_attention.ops.signature import CallSignature, TensorSignature, named_signatures, split_signature
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.validate import check_dense_call

__all__ = ["RESIDUAL_ARGUMENTS", "check_call", "check_residual_call", "given"]

RESIDUAL_ARGUMENTS = (
    "q", "k", "v", "skip_mask", "control", "plan", "keep", "times", "residual", "residual_scale", "row_lse",
    "initial_mask", "must_do", "key_mask",
)  # fmt: skip
_RESIDUAL_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)

_Expected = Sequence[tuple[str, TensorSignature | None, torch.dtype, int]]


@functools.lru_cache(maxsize=4096)
def check_call(call: CallSignature) -> None:
    """Check a call of `lite_attention::skip_attention`.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    (q, k, v, skip_mask, control, threshold), (initial_mask, must_do, key_mask), scale, tile_m, tile_n = (
        split_signature(call)
    )
    check_dense_call(q, k, v, key_mask, scale)
    tiles = _Tiles.of(q, k, tile_m, tile_n)
    _check_tensors(q, (
        ("skip_mask", skip_mask, torch.int32, 5), ("control", control, torch.int32, 1),
        ("threshold", threshold, torch.float32, 3), ("initial_mask", initial_mask, torch.int32, 4),
        ("must_do", must_do, torch.int32, 1),
    ))  # fmt: skip
    _check_contiguous(("skip_mask", skip_mask), ("control", control))
    tiles.check_skip_mask(skip_mask)
    slots = _check_slots(skip_mask, control)
    for dim, (axis, size) in enumerate((("slots", slots), ("steps", None), ("heads", tiles.heads))):
        got = threshold.shape[dim]
        fits = got >= 1 if size is None else got in (1, size)
        require(fits, f"{axis} of threshold", f"1 or {size}" if size is not None else "at least 1", got)
    tiles.check_given(initial_mask, must_do)


@functools.lru_cache(maxsize=4096)
def check_residual_call(call: CallSignature) -> None:
    """Check a call of `lite_attention::residual_attention`.

    Raises:
        ValueError: naming the argument at fault, what was expected and what came.
    """
    t, scale, tile_m, tile_n = named_signatures(call, RESIDUAL_ARGUMENTS)
    q, k, v, skip_mask, control, residual, row_lse = (
        given(t, name) for name in ("q", "k", "v", "skip_mask", "control", "residual", "row_lse")
    )
    check_dense_call(q, k, v, t["key_mask"], scale)
    tiles = _Tiles.of(q, k, tile_m, tile_n, masks=(2,))
    dtypes = ", ".join(map(str, _RESIDUAL_DTYPES))
    require(residual.dtype in _RESIDUAL_DTYPES, "dtype of residual", f"one of {dtypes}", residual.dtype)
    _check_tensors(q, (
        ("skip_mask", skip_mask, torch.int32, 6), ("control", control, torch.int32, 1),
        ("plan", t["plan"], torch.int32, 1), ("keep", t["keep"], torch.float32, 1),
        ("times", t["times"], torch.float32, 2), ("residual", residual, residual.dtype, 6),
        ("residual_scale", t["residual_scale"], torch.float32, 5), ("row_lse", row_lse, torch.float32, 5),
        ("initial_mask", t["initial_mask"], torch.int32, 4), ("must_do", t["must_do"], torch.int32, 1),
    ))  # fmt: skip
    written = RESIDUAL_ARGUMENTS[RESIDUAL_ARGUMENTS.index("skip_mask") : RESIDUAL_ARGUMENTS.index("initial_mask")]
    _check_contiguous(*((name, t[name]) for name in written))
    tiles.check_skip_mask(skip_mask)
    slots = _check_slots(skip_mask, control)
    for name in ("plan", "keep"):
        require(given(t, name).shape[0] >= 1, f"steps of {name}", "at least 1", 0)
    times = tuple(given(t, "times").shape)
    require(times == (slots, 3), "times", f"({slots}, 3)", times)
    _check_residual(tiles, slots, residual, t["residual_scale"], row_lse, (*q.shape[:2], v.shape[3]))
    tiles.check_given(t["initial_mask"], t["must_do"])


def _check_residual(
    tiles: _Tiles,
    slots: int,
    residual: TensorSignature,
    residual_scale: TensorSignature | None,
    row_lse: TensorSignature,
    sizes: tuple[int, ...],
) -> None:
    """Check the residuals and their scales and LSEs for a call of (batch, seq_q, value_dim)."""
    batch, seq_q, value_dim = sizes
    got = tuple(residual.shape)
    rows = f"{batch}, {tiles.heads}, {seq_q}"
    require(
        got[0] == slots and got[1] in (1, 2) and got[2] >= batch and got[3] == tiles.heads and got[4] >= seq_q
        and got[5] == value_dim,
        "residual", f"room for ({slots}, 1 or 2, {rows}, {value_dim})", got,
    )  # fmt: skip
    for name, t, planes in (("residual_scale", residual_scale, got[1]), ("row_lse", row_lse, 1 + got[1])):
        if t is not None:
            fits = t.shape[:2] == (slots, planes) and t.shape[2] >= batch and t.shape[3] == tiles.heads
            expected = f"room for ({slots}, {planes}, {rows})"
            require(fits and t.shape[4] >= seq_q, name, expected, tuple(t.shape))
    scaled = residual.dtype == torch.float8_e4m3fn
    expected = f"{'a tensor' if scaled else 'None'} beside residuals in {residual.dtype}"
    require((residual_scale is not None) == scaled, "residual_scale", expected, "None" if scaled else "a tensor")


def given(tensors: dict[str, TensorSignature | None], name: str) -> TensorSignature:
    """Return the signature of a tensor that may not be None."""
    signature = tensors[name]
    assert signature is not None  # the schema of the op says so
    return signature


def _check_tensors(q: TensorSignature, tensors: _Expected) -> None:
    """Check number of dimensions, dtype and device of what is there."""
    for name, t, dtype, dim in tensors:
        if t is not None:
            require(len(t.shape) == dim, name, f"{dim} dimensions", len(t.shape))
            require(t.dtype == dtype, f"dtype of {name}", str(dtype), t.dtype)
            require(t.device == q.device, f"device of {name}", f"that of q, {q.device}", t.device)


def _check_contiguous(*tensors: tuple[str, TensorSignature | None]) -> None:
    for name, t in tensors:
        require(t is None or t.contiguous, name, "a contiguous tensor", "one that is not")


def _check_slots(skip_mask: TensorSignature, control: TensorSignature) -> int:
    slots = skip_mask.shape[0]
    words = control_words(slots)
    require(control.shape[0] == words, "control", f"{words} words for {slots} slots", f"{control.shape[0]} words")
    return slots


class _Tiles(NamedTuple):
    """What masks must have room for."""

    masks: tuple[int, ...]  # of a slot, where there are several
    batch: int
    heads: int
    q_tiles: int
    k_words: int
    call: str  # in words

    @classmethod
    def of(
        cls, q: TensorSignature, k: TensorSignature, tile_m: int, tile_n: int, masks: tuple[int, ...] = ()
    ) -> _Tiles:
        require(tile_m > 0 and tile_n > 0, "tile_m, tile_n", "positive sizes", (tile_m, tile_n))
        (batch, seq_q, heads, _), seq_k = q.shape, k.shape[1]
        words = ceil_div(ceil_div(seq_k, tile_n), WORD_BITS)
        call = f"for q {tuple(q.shape)}, {seq_k} keys and tiles of {tile_m} x {tile_n}"
        return cls(masks, batch, heads, ceil_div(seq_q, tile_m), words, call)

    def check_skip_mask(self, skip_mask: TensorSignature) -> None:
        got = tuple(skip_mask.shape)
        room = got[1 + len(self.masks) :]
        fits = room[0] >= self.batch and room[1] == self.heads and room[2] >= self.q_tiles and room[3] >= self.k_words
        sizes = ", ".join(map(str, ("slots", *self.masks, self.batch, self.heads, self.q_tiles, self.k_words)))
        fits = fits and got[1 : 1 + len(self.masks)] == self.masks
        require(fits, "skip_mask", f"room for ({sizes}) {self.call}", got)

    def check_given(self, initial_mask: TensorSignature | None, must_do: TensorSignature | None) -> None:
        """Check the masks that a call may bring."""
        batch, heads, q_tiles, k_words = self.batch, self.heads, self.q_tiles, self.k_words
        if initial_mask is not None:
            got = tuple(initial_mask.shape)
            fits = (got[0] == 1 or got[0] >= batch) and got[1] in (1, heads) and got[2] >= q_tiles
            expected = f"(1 or {batch}, 1 or {heads}, {q_tiles}, {k_words}) {self.call}"
            require(fits and got[3] >= k_words, "initial_mask", expected, got)
        if must_do is not None:
            require(must_do.shape[0] >= k_words, "must_do", f"{k_words} words {self.call}", must_do.shape[0])
