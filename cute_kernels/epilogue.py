"""From the sums of a row to memory: the output and the log-sum-exp."""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from lite_attention.cute_kernels.config import DTYPES, KernelConfig
from lite_attention.cute_kernels.fragments import column, element
from lite_attention.cute_kernels.ptx import PACKS, quad_sum
from lite_attention.cute_kernels.softmax import Rows

_LN2 = math.log(2)


class Epilogue:
    """What the threads of a warp do with the output of their rows."""

    def __init__(self, config: KernelConfig) -> None:
        self.head_dim = config.head_dim
        self.whole_sums = config.quantization.short_sums  # each thread has its row's already
        self.pack = PACKS[DTYPES[config.dtype]]

    @cute.jit
    def scale_channels(self, out, scales, heads: Int32, head: Int32, batch: Int32, count: Int32):
        """Give the sums of quantized values, of so many tiles, their channels' scales."""
        if const_expr(scales is not None):
            if count > 0:  # or else it is 0, whatever the scales
                of_head = scales[batch, head // (heads // scales.shape[1]), None]
                lane = cute.arch.lane_idx()
                for i in cutlass.range_constexpr(self.head_dim // 4):
                    scale = of_head[column(i, lane)]
                    for half in cutlass.range_constexpr(2):
                        out[element(half, i)] = out[element(half, i)] * scale

    @cute.jit
    def store(
        self, gout, lse, lse_shift, out, rows: Rows, first_row: Int32, seq_q: Int32, head: Int32, batch: Int32
    ):  # fmt: skip
        """Divide by the sums, and write the output and the log-sum-exp."""
        lane = cute.arch.lane_idx()
        for half in cutlass.range_constexpr(2):
            row_sum = rows.row_sum[half] if const_expr(self.whole_sums) else quad_sum(rows.row_sum[half])
            inverse = cute.arch.rcp_approx(row_sum)
            if row_sum == 0.0:
                inverse = Float32(0.0)
            row = first_row + 8 * half
            if row < seq_q:
                if lane % 4 == 0:
                    value = (rows.row_shift[half] + cute.math.log2(row_sum, fastmath=True)) * _LN2
                    if const_expr(lse_shift is not None):
                        value += lse_shift[batch, head, row]
                    if row_sum == 0.0:
                        value = -Float32.inf
                    lse[batch, head, row] = value
                pairs = cute.recast_tensor(gout[row, None, head, batch], Int32)
                for i in cutlass.range_constexpr(0, self.head_dim // 4, 2):
                    pair = self.pack(out[element(half, i)] * inverse, out[element(half, i + 1)] * inverse)
                    pairs[(i // 2) * 4 + lane % 4] = pair
