"""Sums of products that lose low bits: they go on in float32, the output in shared memory, the weights in registers."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.fragments import element
from lite_attention.cute_kernels.softmax import Rows


class ShortSums:
    """Of one thread. `sums` are its part of shared memory, four by four, of the output as it lies in registers."""

    def __init__(self, config: KernelConfig) -> None:
        self.ones = element(0, config.head_dim // 4), element(1, config.head_dim // 4)  # products of columns of ones
        self.fours = config.head_dim // 8
        self.keeps_tile_sums = bool(config.residual)

    @cute.jit
    def clear(self, sums, sums_shift):
        """Begin with nothing."""
        sums_shift.fill(-1e30)
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        for i in cutlass.range_constexpr(self.fours):
            cute.autovec_copy(zeros, sums[None, i])

    @cute.jit
    def take_row_sums(self, out, rows: Rows):
        """Add what the columns of ones have summed up of a tile's weights, rescaled, and clear it."""
        for half in cutlass.range_constexpr(2):
            e = self.ones[half]
            tile_sum = out[e] * rows.rescale[half]
            rows.row_sum[half] = rows.row_sum[half] + tile_sum
            if const_expr(self.keeps_tile_sums):
                rows.tile_sum[half] = tile_sum
            out[e] = Float32(0.0)

    @cute.jit
    def promote(self, sums, sums_shift, out, rows: Rows):
        """Add the output, rescaled, to the sums in shared memory, and leave a factor that clears it."""
        lag = self.lag(rows.row_shift, sums_shift)
        for i in cutlass.range_constexpr(self.fours):
            four = cute.make_rmem_tensor(4, Float32)
            cute.autovec_copy(sums[None, i], four)
            for e in cutlass.range_constexpr(4):
                four[e] = four[e] * lag[e // 2] + out[4 * i + e] * rows.rescale[e // 2]
            cute.autovec_copy(four, sums[None, i])
        rows.rescale.fill(0.0)

    @cute.jit
    def take(self, sums, sums_shift, out, rows: Rows):
        """Add the sums in shared memory to the output."""
        lag = self.lag(rows.row_shift, sums_shift)
        for i in cutlass.range_constexpr(self.fours):
            four = cute.make_rmem_tensor(4, Float32)
            cute.autovec_copy(sums[None, i], four)
            for e in cutlass.range_constexpr(4):
                out[4 * i + e] = out[4 * i + e] + four[e] * lag[e // 2]

    @cute.jit
    def put_back(self, sums, out):
        """Let the sums in shared memory be what the output is, of which they have been taken."""
        for i in cutlass.range_constexpr(self.fours):
            four = cute.make_rmem_tensor(4, Float32)
            for e in cutlass.range_constexpr(4):
                four[e] = out[4 * i + e]
            cute.autovec_copy(four, sums[None, i])

    @cute.jit
    def lag(self, row_shift, sums_shift):
        """What the sums must be rescaled by, since the last time that they were."""
        factors = cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            factors[half] = cute.math.exp2(sums_shift[half] - row_shift[half], fastmath=True)
            sums_shift[half] = row_shift[half]
        return factors
