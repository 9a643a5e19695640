"""Online softmax of one warpgroup's 64 rows, with the vote on each tile."""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.device import (
    as_float,
    column,
    element,
    fma_saturated,
    four_weights,
    max_nan,
    pack_bytes,
    pack_e4m3,
    quad_max,
)

RESCALE_ABOVE = 8.0  # log2 units: weights may grow to 2^8 before the output and the sums are rescaled
# FP8 weights start there, since e4m3 ends at 2^-9, and are rescaled before they pass 448, where it ends too.
FP8_TOP = 8.0
FP8_RESCALE_ABOVE = 8.8
# Codes of e4m3 are 8 an octave, and linear between the powers of two. So 2^x is the code 8 (x + 7), at most 6 % too
# much, and less what that is on average (log2 units) at most 4 % off, e4m3 itself being up to 6 % off. Below 2^-6,
# where e4m3 gets coarse, this is too little, and 0 from 2^-7 on. That matters only where no weight is much larger.
CODE_ZERO = 7.0 - 0.0576
OCTAVES = 128 // 8  # of all codes of one sign
CODES_FROM = 0.0
CODES_UNIT = 2.0**-6  # at most, of a step of the scores: what is rounded then leaves FP8_RESCALE_ABOVE at code 126, 448
# INT8 scores are summed up on top of this float's bits. A sum moves the mantissa only, so the bits are then those of
# ZERO + sum, exactly, and no integer is converted.
ZERO = 12582912.0


class OnlineSoftmax:
    """State of two rows a thread, in rmem tensors of two: top (maximum so far), shift (what is subtracted, log2 units,
    at most `most` below the top), total (sum of this thread's weights; in FP8 the product with V sums up what is
    really multiplied), factor (what the output is scaled by).

    A score times `unit` is in log2 units. The unit of INT8 scores differs from tile to tile, so their maxima and the
    reach are in log2 units; those of other scores are not scaled.
    """

    def __init__(self, config: KernelConfig, pack: Callable[..., Int32]) -> None:
        self.columns = config.tile_n // 4  # of one row in one thread
        self.output_columns = config.value_columns // 4
        self.pack = pack
        self.vote = config.skip
        self.int8 = config.int8
        self.fp8 = config.fp8
        self.first, self.most = (FP8_TOP, FP8_RESCALE_ABOVE) if config.fp8 else (0.0, RESCALE_ABOVE)

    @cute.jit
    def exclude(self, x, first_key: Int32, seq_k: Int32, key_bits, batch: Int32):
        """Set the scores of excluded keys to -inf. key_bits: a bit a key, padded."""
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(key_bits is not None):
            word, shift = first_key // 32, Uint32(first_key % 32)
            low = Uint32(key_bits[batch, word])
            for w in cutlass.range_constexpr((self.columns + 7) // 8):
                high = Uint32(key_bits[batch, word + w + 1])
                # 32 keys of the tile, this thread's first column lowest. Two shifts, since one by 32 is undefined.
                bits = ((low >> shift) | ((high << 1) << (Uint32(31) - shift))) >> Uint32((lane % 4) * 2)
                low = high
                for i in cutlass.range_constexpr(8 * w, min(8 * w + 8, self.columns)):
                    if (bits >> Uint32(column(i % 8, 0))) & Uint32(1) == 0:
                        x[element(0, i)] = -Float32.inf
                        x[element(1, i)] = -Float32.inf
        else:
            for i in cutlass.range_constexpr(self.columns):
                if first_key + column(i, lane) >= seq_k:
                    x[element(0, i)] = -Float32.inf
                    x[element(1, i)] = -Float32.inf

    @cute.jit
    def step(self, x, top, shift, total, factor, unit: Float32, reach: Float32, votes_0: Boolean, votes_1: Boolean):
        """Replace scores by weights, in place.

        The common path has no shuffle: only when some thread of the warp sees a new maximum is the row's agreed on.
        In FP8, tiles with a large weight in each row are left as they are, for `convert`.

        Returns:
            Whether the output must be rescaled by `factor`; whether a row of this thread votes to keep the tile;
            whether the scores are still there, to become codes.
        """
        high_0, high_1 = self.row_high(x, 0, unit), self.row_high(x, 1, unit)
        keep = Boolean(True)
        if cutlass.const_expr(self.vote):
            # Negated, so that a NaN keeps. `reach` is NaN where nothing may be skipped.
            keep = (votes_0 & ~(high_0 - top[0] <= reach)) | (votes_1 & ~(high_1 - top[1] <= reach))
        moved, as_codes = Boolean(False), Boolean(False)
        if cutlass.const_expr(self.fp8):
            factor.fill(1.0)
        if cute.arch.vote_any_sync(~(high_0 <= top[0]) | ~(high_1 <= top[1])):
            grown = Boolean(False)
            for half in cutlass.range_constexpr(2):
                top[half] = max_nan(top[half], quad_max(high_0 if half == 0 else high_1))
                scaled = top[half] if cutlass.const_expr(self.int8) else top[half] * unit
                over = scaled - shift[half] > self.most
                grown = grown | over
                fresh = scaled - self.first if over else shift[half]
                factor[half] = cute.math.exp2(shift[half] - fresh, fastmath=True)
                total[half] = total[half] * factor[half]
                shift[half] = fresh
            moved = cute.arch.vote_any_sync(grown)
        if cutlass.const_expr(self.fp8):
            # In each row of the warp, four threads, some weight is large. False for NaN, which a whole row is.
            rows_0 = self.fold(cute.arch.vote_ballot_sync(high_0 - shift[0] >= CODES_FROM))
            rows_1 = self.fold(cute.arch.vote_ballot_sync(high_1 - shift[1] >= CODES_FROM))
            as_codes = ((rows_0 & rows_1 & 0x11111111) == 0x11111111) & (unit <= CODES_UNIT)
        if ~as_codes:
            self.exponentials(x, shift, total, unit)
        return moved, keep, as_codes

    @cute.jit
    def fold(self, bits):
        """Or of each four bits, in the lowest of them."""
        bits = bits | (bits >> 1)
        return bits | (bits >> 2)

    @cute.jit
    def exponentials(self, x, shift, total, unit: Float32):
        """Replace scores by weights, and add up the weights where the product with V does not."""
        for half in cutlass.range_constexpr(2):
            offset = self.offset(shift[half], unit)
            a, b = total[half], Float32(0.0)
            for i in cutlass.range_constexpr(0, self.columns, 2):
                e, f = element(half, i), element(half, i + 1)
                x[e] = cute.math.exp2(x[e] * unit - offset, fastmath=True)
                x[f] = cute.math.exp2(x[f] * unit - offset, fastmath=True)
                if cutlass.const_expr(not self.fp8):
                    a, b = a + x[e], b + x[f]
            if cutlass.const_expr(not self.fp8):
                total[half] = a + b

    @cute.jit
    def offset(self, shift: Float32, unit: Float32) -> Float32:
        """What a score times `unit` is too large by, in log2 units."""
        if cutlass.const_expr(self.int8):
            shift = shift + ZERO * unit  # rounds to less than one step of the sums
        return shift

    @cute.jit
    def row_high(self, x, half: cutlass.Constexpr, unit: Float32):
        """Maximum over this thread's columns of one row."""
        if cutlass.const_expr(self.int8):
            bits = cute.recast_tensor(x, Int32)  # ordered as the floats are, but there are maxima of three integers
            high = bits[element(half, 0)]
            for i in cutlass.range_constexpr(1, self.columns):
                high = cutlass.max(high, bits[element(half, i)])
            return (as_float(high) - ZERO) * unit
        a, b = x[element(half, 0)], x[element(half, 1)]  # two independent chains
        for i in cutlass.range_constexpr(2, self.columns, 2):
            a, b = max_nan(a, x[element(half, i)]), max_nan(b, x[element(half, i + 1)])
        return max_nan(a, b)

    @cute.jit
    def convert(self, x, words, shift, unit: Float32, as_codes: Boolean):
        """Weights to 16 or 8 bits: the order of the accumulator is that of the next operand.

        In FP8 four columns of a row are a register, and lie in the operand where V has its keys permuted to.
        """
        if cutlass.const_expr(self.fp8):
            if as_codes:
                self.codes(x, words, shift, unit)
            else:
                for w in cutlass.range_constexpr(self.columns // 2):
                    words[w] = pack_e4m3(*[x[e] for e in four_weights(w)])
        else:
            for w in cutlass.range_constexpr(self.columns):
                words[w] = self.pack(x[2 * w], x[2 * w + 1])
        self.clear(x)

    @cute.jit
    def codes(self, x, words, shift, unit: Float32):
        """Scores to weights in e4m3 without an exponential, see CODE_ZERO."""
        offsets = [(CODE_ZERO - self.offset(shift[half], unit)) / OCTAVES for half in range(2)]
        for w in cutlass.range_constexpr(self.columns // 2):
            words[w] = pack_bytes(*[fma_saturated(x[e], unit / OCTAVES, offsets[w % 2]) for e in four_weights(w)])

    @cute.jit
    def clear(self, x):
        """Make ready for the next scores: a float product overwrites, an integer product adds."""
        if cutlass.const_expr(self.int8):
            x.fill(ZERO)

    @cute.jit
    def rescale(self, out, factor, moved: Boolean):
        """Scale the output where a maximum has grown by much."""
        if moved:
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.output_columns):
                    out[element(half, i)] = out[element(half, i)] * factor[half]
