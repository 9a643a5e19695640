"""Online softmax of one warpgroup's 64 rows, with the vote on each tile."""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.ptx import (
    as_float,
    column,
    element,
    four_weights,
    max_nan,
    multiply_add,
    pack_e4m3,
    quad_max,
    sum_of_pairs,
    to_int,
    to_int_below,
)

RESCALE_ABOVE = 8.0  # log2 units: weights may grow to 2^8 before the output and the sums are rescaled
# FP8 weights start there, since e4m3 ends at 2^-9, and are rescaled before they pass 448, where it ends too.
FP8_TOP = 8.0
FP8_RESCALE_ABOVE = 8.75
# The bits of float32 are linear between the powers of two, and so near the logarithm: the integer 2^23 (x + 127) has
# the bits of 2^x, or of up to 6 % more. So a weight takes one multiplication and addition of its integer score, and no
# exponential. Less what is too much on average, log2 units, it is at most 4 % off; design.md says within what range.
OCTAVE = 2.0**23
BIAS = 127.0 - 0.0576
LARGEST_UNIT = 32.0  # what is lower by a step is 2^-32 then, whatever the step
SAFE_OCTAVES = 120.0  # below the shift, in which bits of weights stay positive, with room for rounding
# Below this unit scores may span millions of steps in an octave, for which an integer multiplier is too coarse: steps
# are made larger, still far smaller than what 8 bits round off.
SMALL_UNIT = 2.0**-17
COARSER = 6  # bits
# An integer score on top of this float's bits moves the mantissa only: they are those of MAGIC + score, exactly.
MAGIC = 12582912.0
MAGIC_BITS = 0x4B400000
EXCLUDED = -0x00800000 - MAGIC_BITS  # as an integer score: lower than any, and -inf on top of those bits


class OnlineSoftmax:
    """State of two rows a thread, in rmem tensors of two: top (maximum so far), shift (what is subtracted, log2 units,
    at most `most` below the top), total (sum of this thread's weights; in FP8 the product with V sums up what is
    really multiplied), factor (what the output is scaled by), offset (bits of the weight of an integer score of 0),
    lowest (the integer score that lower ones are taken for, where bits of theirs would be negative).

    A score times `unit` is in log2 units. The unit of integer scores differs from tile to tile, so their maxima and the
    reach are in log2 units; those of other scores are not scaled.
    """

    def __init__(self, config: KernelConfig, pack: Callable[..., Int32]) -> None:
        self.int8 = config.quantization.scores is not None
        self.fp8 = config.quantization.values is not None
        self.columns = config.tile_n // 4  # of one row in one thread
        self.output_columns = config.budget.value_columns // 4
        self.words = self.columns // 2 if self.fp8 else self.columns  # registers of weights
        self.pack = pack_e4m3 if self.fp8 else pack
        self.dtype = config.dtype
        self.vote = config.skip
        self.first, self.most = (FP8_TOP, FP8_RESCALE_ABOVE) if self.fp8 else (0.0, RESCALE_ABOVE)

    @cute.jit
    def prepare(self, x, unit: Float32, partial: Boolean, first_key: Int32, seq_k: Int32, key_bits, batch: Int32):
        """Exclude keys, make too small steps of integer scores larger, and return what a step is then."""
        if cutlass.const_expr(self.int8):
            if partial | (unit < SMALL_UNIT):  # one branch for both, as both are rare
                if unit < SMALL_UNIT:
                    for e in cutlass.range_constexpr(2 * self.columns):
                        x[e] = x[e] >> COARSER
                    unit = unit * 2.0**COARSER
                if partial:
                    self.exclude(x, first_key, seq_k, key_bits, batch)
        else:
            if partial:
                self.exclude(x, first_key, seq_k, key_bits, batch)
        return unit

    @cute.jit
    def exclude(self, x, first_key: Int32, seq_k: Int32, key_bits, batch: Int32):
        """Set the scores of excluded keys to the lowest there is. key_bits: a bit a key, padded."""
        lane = cute.arch.lane_idx()
        excluded = Int32(EXCLUDED) if self.int8 else -Float32.inf
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
                        x[element(0, i)] = excluded
                        x[element(1, i)] = excluded
        else:
            for i in cutlass.range_constexpr(self.columns):
                if first_key + column(i, lane) >= seq_k:
                    x[element(0, i)] = excluded
                    x[element(1, i)] = excluded

    @cute.jit
    def step(
        self, x, top, shift, total, factor, offset, lowest, unit: Float32, bound: Float32, partial: Boolean,
        reach: Float32, votes_0: Boolean, votes_1: Boolean,
    ):  # fmt: skip
        """Find the maxima, and replace float scores by weights, in place.

        The common path has no shuffle: only when some thread of the warp sees a new maximum is the row's agreed on.

        Args:
            bound: of the magnitude of integer scores, log2 units.
            partial: some scores are excluded.

        Returns:
            Whether the output must be rescaled by `factor`; whether a row of this thread votes to keep the tile; what
            the bits of a weight grow by with each step of integer scores; whether some may be negative.
        """
        highest = [self.row_high(x, half) for half in range(2)]
        high_0, high_1 = self.in_log2(highest[0], unit), self.in_log2(highest[1], unit)
        keep = Boolean(True)
        if cutlass.const_expr(self.vote):
            # Negated, so that a NaN keeps. `reach` is NaN where nothing may be skipped.
            keep = (votes_0 & ~(high_0 - top[0] <= reach)) | (votes_1 & ~(high_1 - top[1] <= reach))
        moved = Boolean(False)
        if cutlass.const_expr(self.fp8):
            factor.fill(1.0)
        if cute.arch.vote_any_sync(~(high_0 <= top[0]) | ~(high_1 <= top[1])):
            grown = Boolean(False)
            for half in cutlass.range_constexpr(2):
                top[half] = max_nan(top[half], quad_max(high_0 if half == 0 else high_1))
                scaled = top[half] if cutlass.const_expr(self.int8) else top[half] * unit
                over = scaled - shift[half] > self.most
                if cutlass.const_expr(self.int8):
                    over = ~(scaled - shift[half] <= self.most)  # a NaN too: bits of weights would hide it
                grown = grown | over
                fresh = scaled - self.first if over else shift[half]
                factor[half] = cute.math.exp2(shift[half] - fresh, fastmath=True)
                total[half] = total[half] * factor[half]
                if cutlass.const_expr(self.int8):
                    total[half] += fresh - fresh  # infinity as well: NaN from now on
                shift[half] = fresh
            moved = cute.arch.vote_any_sync(grown)
        slope, clamp = Int32(0), Boolean(False)
        if cutlass.const_expr(self.int8):
            low = ~(bound + shift[0] < SAFE_OCTAVES) | ~(bound + shift[1] < SAFE_OCTAVES)
            clamp = cute.arch.vote_any_sync(low) | partial
            slope = cutlass.max(to_int(cutlass.min(unit, LARGEST_UNIT) * OCTAVE), 1)
            bits = [self.bits(high_0 - shift[0]), self.bits(high_1 - shift[1])]
            for half in cutlass.range_constexpr(2):
                offset[half] = to_int(bits[half]) - highest[half] * slope
            if clamp:
                inverse = cute.arch.rcp_approx(Float32(slope)) * (1.0 - 2.0**-22)  # rounded down
                for half in cutlass.range_constexpr(2):
                    lowest[half] = highest[half] - to_int_below(bits[half] * inverse)
        else:
            self.exponentials(x, shift, total, unit)
        return moved, keep, slope, clamp

    @cute.jit
    def exponentials(self, x, shift, total, unit: Float32):
        """Replace scores by weights, and add up the weights."""
        for half in cutlass.range_constexpr(2):
            a, b = total[half], Float32(0.0)
            for i in cutlass.range_constexpr(0, self.columns, 2):
                e, f = element(half, i), element(half, i + 1)
                x[e] = cute.math.exp2(x[e] * unit - shift[half], fastmath=True)
                x[f] = cute.math.exp2(x[f] * unit - shift[half], fastmath=True)
                a, b = a + x[e], b + x[f]
            total[half] = a + b

    @cute.jit
    def row_high(self, x, half: cutlass.Constexpr):
        """Maximum over this thread's columns of one row."""
        if cutlass.const_expr(self.int8):
            high = x[element(half, 0)]
            for i in cutlass.range_constexpr(1, self.columns):
                high = cutlass.max(high, x[element(half, i)])  # ptxas makes maxima of three of them
            return high
        a, b = x[element(half, 0)], x[element(half, 1)]  # two independent chains
        for i in cutlass.range_constexpr(2, self.columns, 2):
            a, b = max_nan(a, x[element(half, i)]), max_nan(b, x[element(half, i + 1)])
        return max_nan(a, b)

    @cute.jit
    def in_log2(self, score, unit: Float32) -> Float32:
        """An integer score in log2 units; a float is left as it is."""
        if cutlass.const_expr(self.int8):
            return (as_float(score + MAGIC_BITS) - MAGIC) * unit
        return score

    @cute.jit
    def bits(self, log2_weight: Float32) -> Float32:
        """The bits of a weight, see OCTAVE; 0 if it is too small for any."""
        return cutlass.max(log2_weight + BIAS, 0.0) * OCTAVE

    @cute.jit
    def convert(self, x, words, offset, lowest, slope: Int32, clamp: Boolean):
        """Weights to 16 or 8 bits: the order of the accumulator is that of the next operand.

        In FP8 four columns of a row are a register, and lie in the operand where V has its keys permuted to.
        """
        if cutlass.const_expr(self.int8):
            if clamp:
                self.weights_from_bits(x, words, offset, slope, lowest)
            else:
                self.weights_from_bits(x, words, offset, slope)
        else:
            for w in cutlass.range_constexpr(self.words):
                words[w] = self.pack(x[2 * w], x[2 * w + 1])

    @cute.jit
    def weights_from_bits(self, x, words, offset, slope: Int32, lowest=None):
        """Integer scores to weights in 16 or 8 bits, see OCTAVE."""
        for w in cutlass.range_constexpr(self.words):
            elements = four_weights(w) if self.fp8 else (2 * w, 2 * w + 1)
            scores = [x[e] for e in elements]
            if cutlass.const_expr(lowest is not None):
                scores = [cutlass.max(score, lowest[w % 2]) for score in scores]
            words[w] = self.pack(*[as_float(multiply_add(score, slope, offset[w % 2])) for score in scores])

    @cute.jit
    def add_up(self, words, total):
        """Add weights that were made from bits to their sums, which are not yet rescaled since.

        Not as soon as they are made: what is an operand and something else besides would be copied.
        """
        if cutlass.const_expr(self.int8 and not self.fp8):
            for half in cutlass.range_constexpr(2):
                total[half] += sum_of_pairs([words[w] for w in range(half, self.words, 2)], self.dtype)

    @cute.jit
    def rescale(self, out, factor, moved: Boolean):
        """Scale the output where a maximum has grown by much."""
        if moved:
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.output_columns):
                    out[element(half, i)] = out[element(half, i)] * factor[half]
