"""From the sums of a row to memory, with the residual: what a full step leaves, and a sparse one takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from lite_attention.cute_kernels import residual_call as call
from lite_attention.cute_kernels.config import DTYPES, RESIDUAL_DTYPES, KernelConfig, Residual
from lite_attention.cute_kernels.fragments import element
from lite_attention.cute_kernels.ptx import (
    PACKS,
    PACKS_BEFORE_ADA,
    UNPACKS,
    UNPACKS_BEFORE_ADA,
    as_float,
    prefetch_to_l2,
    quad_max,
    quad_sum,
)
from lite_attention.cute_kernels.softmax import Rows
from lite_attention.ops.quantize import LARGEST_FP8

_LN2 = math.log(2)
_LARGEST = float(LARGEST_FP8)
_LEAST = 2.0**-110  # of a row's largest magnitude: what it is divided by would overflow, and none of it matters


class Left(NamedTuple):
    """What a sparse step adds to a row of the output of the kept tiles, and to its log-sum-exp."""

    last: Any  # residuals as stored
    before: Any
    of_last: Any  # factors
    of_before: Any
    difference: Any  # of the log-sum-exp
    change: Any  # of that since; not finite where there was none


class ResidualEpilogue:
    """What the threads of a warp do with the output of their rows; each holds a quarter of two rows.

    Of a row of residuals, and of what is stored of the kept tiles meanwhile, a quarter lies after the other, so that a
    thread writes and reads 16 bytes at a time.
    """

    def __init__(self, config: KernelConfig) -> None:
        self.values = config.head_dim // 4  # of a row in one thread
        self.whole_sums = config.quantization.short_sums
        self.pack, self.unpack = PACKS[DTYPES[config.dtype]], UNPACKS[DTYPES[config.dtype]]
        stored = RESIDUAL_DTYPES[config.residual]
        packs, unpacks = (PACKS, UNPACKS) if config.target.converts_fp8 else (PACKS_BEFORE_ADA, UNPACKS_BEFORE_ADA)
        self.pack_residual, self.unpack_residual = packs[stored], unpacks[stored]
        self.each = 4 // stored.itemsize  # values of a register
        self.words = self.values // self.each
        self.scaled = config.residual == "fp8"
        # Of 256 columns in 16 bits, both rows take as many registers as the output, which the portable kernel has not.
        self.loads_both = self.words < 32 or not config.target.portable

    @cute.jit
    def quarter(self, row):
        """A thread's part of a row, in registers of 32 bits."""
        words = cute.recast_tensor(row, Int32)
        each = cute.size(words) // 4
        return cute.make_tensor(words.iterator, cute.make_layout((4, each), stride=(each, 1)))[
            cute.arch.lane_idx() % 4, None
        ]

    @cute.jit
    def divisor(self, rows: Rows, half: cutlass.Constexpr, lse_shift, place):
        """Return what makes outputs of a row's sums, and its log-sum-exp."""
        row_sum = rows.row_sum[half] if const_expr(self.whole_sums) else quad_sum(rows.row_sum[half])
        inverse = cute.arch.rcp_approx(row_sum)
        value = (rows.row_shift[half] + cute.math.log2(row_sum, fastmath=True)) * _LN2
        if const_expr(lse_shift is not None):
            value += lse_shift[place]
        if row_sum == 0.0:
            inverse, value = Float32(0.0), -Float32.inf
        return inverse, value

    @cute.jit
    def store_kept(
        self, gout, lse, lse_shift, out, rows: Rows, first_row: Int32, seq_q: Int32, head: Int32, batch: Int32
    ):  # fmt: skip
        """Store what the kept tiles give by themselves, for the same threads to read."""
        for half in cutlass.range_constexpr(2):
            row = first_row + 8 * half
            place = (batch, head, cutlass.min(row, seq_q - 1))
            inverse, value = self.divisor(rows, half, lse_shift, place)
            if row < seq_q:
                kept = cute.make_rmem_tensor(self.values // 2, Int32)
                for i in cutlass.range_constexpr(0, self.values, 2):
                    kept[i // 2] = self.pack(out[element(half, i)] * inverse, out[element(half, i + 1)] * inverse)
                cute.autovec_copy(kept, self.quarter(gout[row, None, head, batch]))
                if cute.arch.lane_idx() % 4 == 0:
                    lse[place] = value

    @cute.jit
    def store(
        self, gout, lse, lse_shift, out, rows: Rows, residual: Residual, words, first_row: Int32, seq_q: Int32,
        head: Int32, batch: Int32,
    ):  # fmt: skip
        """Divide by the sums, and write output, log-sum-exp and residual; `words` are those of the call."""
        places = [(batch, head, cutlass.min(first_row + 8 * half, seq_q - 1)) for half in range(2)]
        if words[call.FULL] == 0:
            if const_expr(self.loads_both):  # before anything waits for one
                left = [self.fetch(residual, words, half, places[half]) for half in range(2)]
            for half in cutlass.range_constexpr(2):
                if const_expr(not self.loads_both):
                    left = {half: self.fetch(residual, words, half, places[half])}
                value = self.divide(out, rows, half, lse_shift, places[half])
                value = self.add_residual(out, half, value, left[half])
                self.write(gout, lse, out, half, value, residual, words, places[half], first_row + 8 * half < seq_q)
        else:
            for half in cutlass.range_constexpr(2):
                value = self.divide(out, rows, half, lse_shift, places[half])
                is_row = first_row + 8 * half < seq_q
                if words[call.MASKED] != 0:
                    self.keep_residual(gout, lse, out, half, value, residual, words, places[half], is_row)
                else:
                    self.write(gout, lse, out, half, value, residual, words, places[half], is_row)

    @cute.jit
    def divide(self, out, rows: Rows, half: cutlass.Constexpr, lse_shift, place) -> Float32:
        """Make outputs of the sums of a row, and return its log-sum-exp."""
        inverse, value = self.divisor(rows, half, lse_shift, place)
        for i in cutlass.range_constexpr(self.values):
            out[element(half, i)] = out[element(half, i)] * inverse
        return value

    @cute.jit
    def prefetch(self, residual: Residual, words, batch: Int32, head: Int32, first_row: Int32, seq_q: Int32):
        """Bring what `store` will add nearer."""
        for half in cutlass.range_constexpr(2):
            place = (batch, head, cutlass.min(first_row + 8 * half, seq_q - 1))
            last = self.quarter(residual.values[(words[call.SLOT], words[call.PLANE], *place, None)])
            prefetch_to_l2(last.iterator.toint())
            if as_float(words[call.FACTOR]) != 0.0:
                before = self.quarter(residual.values[(words[call.SLOT], 1 - words[call.PLANE], *place, None)])
                prefetch_to_l2(before.iterator.toint())

    @cute.jit
    def fetch(self, residual: Residual, words, half: cutlass.Constexpr, place):
        """Load what a sparse step adds to a row: values, their factors, and what the LSE lacks."""
        slot, plane, factor = words[call.SLOT], words[call.PLANE], as_float(words[call.FACTOR])
        other = plane
        if factor != 0.0:
            other = 1 - plane
        last, before = (cute.make_rmem_tensor(self.words, Int32) for _ in range(2))
        cute.autovec_copy(self.quarter(residual.values[(slot, plane, *place, None)]), last)
        cute.autovec_copy(self.quarter(residual.values[(slot, other, *place, None)]), before)
        difference, difference_before = (residual.row_lse[(slot, 1 + p, *place)] for p in (plane, other))
        of_last, of_before = 1.0 + factor, -factor
        if const_expr(self.scaled):
            of_last = of_last * residual.scales[(slot, plane, *place)]
            of_before = of_before * residual.scales[(slot, other, *place)]
        change = factor * (difference - difference_before)
        return Left(last, before, of_last, of_before, difference, change)

    @cute.jit
    def write(
        self, gout, lse, out, half: cutlass.Constexpr, value: Float32, residual: Residual, words, place, is_row
    ):  # fmt: skip
        """Write a row of the output, and its log-sum-exp."""
        batch, head, row = place
        lane = cute.arch.lane_idx()
        if is_row:
            pairs = cute.recast_tensor(gout[row, None, head, batch], Int32)
            for i in cutlass.range_constexpr(0, self.values, 2):
                pair = self.pack(out[element(half, i)], out[element(half, i + 1)])
                pairs[(i // 2) * 4 + lane % 4] = pair
            if lane % 4 == 0:
                lse[place] = value
                if words[call.DENSE] == 0:
                    residual.row_lse[(words[call.SLOT], 0, *place)] = value

    @cute.jit
    def add_residual(self, out, half: cutlass.Constexpr, value: Float32, left) -> Float32:
        """Add what the other tiles gave, as far as it has gone on since, and return the log-sum-exp of all."""
        for w in cutlass.range_constexpr(self.words):
            values = zip(self.unpack_residual(left.last[w]), self.unpack_residual(left.before[w]), strict=True)
            for i, (x, y) in enumerate(values):
                e = element(half, w * self.each + i)
                out[e] = out[e] + x * left.of_last + y * left.of_before
        total = left.difference
        if value > -Float32.inf:
            total += value
            if left.change - left.change == 0.0:
                total += left.change
        return total

    @cute.jit
    def keep_residual(
        self, gout, lse, out, half: cutlass.Constexpr, value: Float32, residual: Residual, words, place, is_row
    ):  # fmt: skip
        """Write a row of the output, and of what it has beyond that of the kept tiles, which lies in its place."""
        batch, head, row = place
        slot, plane = words[call.SLOT], words[call.PLANE]
        kept = cute.make_rmem_tensor(self.values // 2, Int32)
        cute.autovec_copy(self.quarter(gout[row, None, head, batch]), kept)
        kept_lse, difference, largest = lse[place], value, Float32(0.0)
        if kept_lse > -Float32.inf:
            difference = value - kept_lse
        cute.arch.sync_warp()  # a row's threads write over what the others have read
        self.write(gout, lse, out, half, value, residual, words, place, is_row)
        for i in cutlass.range_constexpr(self.values // 2):
            a, b = self.unpack(kept[i])
            e, f = element(half, 2 * i), element(half, 2 * i + 1)
            out[e], out[f] = out[e] - a, out[f] - b
            largest = cutlass.max(largest, cutlass.max(cute.math.absf(out[e]), cute.math.absf(out[f])))
        factor = Float32(1.0)
        if const_expr(self.scaled):
            largest = quad_max(largest)
            factor = _LARGEST / largest if largest > _LEAST else Float32(0.0)
        if is_row:
            stored = cute.make_rmem_tensor(self.words, Int32)
            for w in cutlass.range_constexpr(self.words):
                each = [out[element(half, w * self.each + i)] * factor for i in range(self.each)]
                stored[w] = self.pack_residual(*each)
            cute.autovec_copy(stored, self.quarter(residual.values[(slot, plane, *place, None)]))
            if cute.arch.lane_idx() % 4 == 0:
                residual.row_lse[(slot, 1 + plane, *place)] = difference
                if const_expr(self.scaled):
                    residual.scales[(slot, plane, *place)] = largest / _LARGEST
