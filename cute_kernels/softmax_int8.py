"""Online softmax of integer scores: weights are made from their bits, without an exponential.

The bits of float32 are linear between the powers of two, and so near the logarithm: the integer 2^23 (x + 127) has the
bits of 2^x, or of up to 6 % more. So a weight takes one multiplication and addition of its integer score. Less what is
too much on average, log2 units, it is at most 4 % off; kernels.md says within what range.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from lite_attention.cute_kernels.fragments import element, four_weights
from lite_attention.cute_kernels.ptx import (
    as_float,
    multiply_add,
    sum_of_pairs,
    to_int,
    to_int_below,
)
from lite_attention.cute_kernels.softmax import Keys, OnlineSoftmax, Rows, Slope

# FP8 weights start at 2^8, since e4m3 ends at 2^-9, and are rescaled before they pass 448, where it ends too.
FP8_FIRST = 8.0
FP8_RESCALE_ABOVE = 8.75
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


class Int8Softmax(OnlineSoftmax):
    """Scores are integers, weights 16 bits wide. Maxima are in log2 units."""

    def excluded(self):
        """Lower than any, and -inf as a float."""
        return Int32(EXCLUDED)

    @cute.jit
    def prepare(self, x, unit: Float32, partial: Boolean, first_key: Int32, keys: Keys):
        """Too small steps are made larger."""
        if partial | (unit < SMALL_UNIT):  # one branch for both, as both are rare
            if unit < SMALL_UNIT:
                for e in cutlass.range_constexpr(2 * self.columns):
                    x[e] = x[e] >> COARSER
                unit = unit * 2.0**COARSER
            if partial:
                self.exclude(x, first_key, keys)
        return unit

    @cute.jit
    def row_high(self, x, half: cutlass.Constexpr):
        """In integers."""
        high = x[element(half, 0)]
        for i in cutlass.range_constexpr(1, self.columns):
            high = cutlass.max(high, x[element(half, i)])  # ptxas makes maxima of three of them
        return high

    def in_units_of_max(self, score, unit):
        """In log2 units."""
        return (as_float(score + MAGIC_BITS) - MAGIC) * unit

    def in_log2(self, row_max, unit):
        """Maxima are."""
        return row_max

    def too_high(self, above_shift):
        """A NaN too: bits of weights would hide it."""
        return ~(above_shift <= self.rescale_above)

    def take_shift(self, rows: Rows, half: int, row_shift):
        """NaN and infinity make the sum NaN from now on."""
        rows.row_sum[half] += row_shift - row_shift
        rows.row_shift[half] = row_shift

    @cute.jit
    def weigh(self, x, rows: Rows, highest, unit: Float32, bound: Float32, partial: Boolean) -> Slope:
        """Find what makes weights of this tile's scores; they wait until their registers are free."""
        score_0, score_1, high_0, high_1 = highest
        shift = rows.row_shift
        low = ~(bound + shift[0] < SAFE_OCTAVES) | ~(bound + shift[1] < SAFE_OCTAVES)
        clamp = cute.arch.vote_any_sync(low) | partial
        slope = cutlass.max(to_int(cutlass.min(unit, LARGEST_UNIT) * OCTAVE), 1)
        scores = [score_0, score_1]
        bits = [self.bits(high_0 - shift[0]), self.bits(high_1 - shift[1])]
        for half in cutlass.range_constexpr(2):
            rows.offset[half] = to_int(bits[half]) - scores[half] * slope
        if clamp:
            inverse = cute.arch.rcp_approx(Float32(slope)) * (1.0 - 2.0**-22)  # rounded down
            for half in cutlass.range_constexpr(2):
                rows.lowest[half] = scores[half] - to_int_below(bits[half] * inverse)
        return Slope(slope, clamp)

    @cute.jit
    def bits(self, log2_weight: Float32) -> Float32:
        """The bits of a weight; 0 if it is too small for any."""
        return cutlass.max(log2_weight + BIAS, 0.0) * OCTAVE

    @cute.jit
    def convert(self, x, words, rows: Rows, slope: Slope):
        """Make and round them."""
        if slope.clamp:
            self.weights_from_bits(x, words, rows.offset, slope.slope, rows.lowest)
        else:
            self.weights_from_bits(x, words, rows.offset, slope.slope)

    @cute.jit
    def weights_from_bits(self, x, words, offset, slope: Int32, lowest=None):
        """Integer scores to weights in 16 or 8 bits."""
        for w in cutlass.range_constexpr(self.words):
            scores = [x[e] for e in self.elements(w)]
            if cutlass.const_expr(lowest is not None):
                scores = [cutlass.max(score, lowest[w % 2]) for score in scores]
            words[w] = self.pack(*[as_float(multiply_add(score, slope, offset[w % 2])) for score in scores])

    def elements(self, w: int):
        """Scores whose weights make up a register."""
        return (2 * w, 2 * w + 1)

    @cute.jit
    def add_up(self, words, rows: Rows):
        """Not as soon as they are made: what is an operand and something else besides would be copied.

        They have not been rescaled since.
        """
        for half in cutlass.range_constexpr(2):
            pairs = [words[w] for w in range(half, self.words, 2)]
            tile_sum = sum_of_pairs(pairs, self.dtype)
            rows.row_sum[half] += tile_sum
            if const_expr(self.keeps_tile_sums):
                rows.tile_sum[half] = tile_sum


class Int8Fp8Softmax(Int8Softmax):
    """Weights in e4m3, whose sums, of what is really multiplied, the product with V gives.

    Four columns of a row are a register, and lie in the operand where V has its keys permuted to.
    """

    first_weight = FP8_FIRST
    rescale_above = FP8_RESCALE_ABOVE

    def begin_tile(self, rows: Rows):
        """Sums of the product are rescaled after each tile."""
        rows.rescale.fill(1.0)

    def elements(self, w: int):
        """Four of a row."""
        return four_weights(w)

    @cute.jit
    def add_up(self, words, rows: Rows):
        """The product does."""
