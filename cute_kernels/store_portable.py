"""From the sums of a CTA's rows to memory, a block of rows after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from lite_attention.cute_kernels.budget_portable import BLOCK_ROWS
from lite_attention.cute_kernels.config import KernelConfig, Residual, Scales
from lite_attention.cute_kernels.epilogue import Epilogue
from lite_attention.cute_kernels.products_portable import Accumulators, Products
from lite_attention.cute_kernels.residual_epilogue import ResidualEpilogue
from lite_attention.cute_kernels.short_sums import ShortSums
from lite_attention.cute_kernels.storage_portable import BATCH, COUNT, HEAD, Q_TILE, REST, Shared


class Place(NamedTuple):
    """Of a CTA, in the call."""

    q_tile: Any
    head: Any
    batch: Any
    kv_head: Any = None  # where keys and values are read


class Outputs(NamedTuple):
    """In global memory."""

    out: Any
    lse: Any


class Store:
    """What all warps do with the output of their rows."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget, self.products = config, config.budget, Products(config)
        self.epilogue = Epilogue(config)
        self.residual_epilogue = ResidualEpilogue(config) if config.residual else None
        self.short_sums = ShortSums(config) if config.quantization.short_sums else None

    def place(self, shared: Shared) -> Place:
        """Out of shared memory: in the loop, registers are for other things."""
        return Place(*(shared.call[word] for word in (Q_TILE, HEAD, BATCH)))

    def first_row(self, place: Place, block: int):
        """A thread's upper row in a block."""
        row = (block * self.budget.warps + cute.arch.warp_idx()) * BLOCK_ROWS + cute.arch.lane_idx() // 4
        return place.q_tile * self.config.tile_m + row

    @cute.jit
    def store(
        self, outputs: Outputs, acc: Accumulators, blocks, scales: Scales, residual: Residual, shared: Shared,
        seq_q: Int32,
    ):  # fmt: skip
        """Write the output, the log-sum-exp, and what a residual leaves."""
        place, count = self.place(shared), shared.call[COUNT]
        if const_expr(self.config.residual):
            count += shared.call[REST]
        for b in cutlass.range_constexpr(self.budget.blocks):
            out, rows, first_row = self.products.block_of(acc.out, b), blocks[b].rows, self.first_row(place, b)
            self.epilogue.scale_channels(out, scales.v, outputs.out.shape[2], place.head, place.batch, count)
            if const_expr(self.config.residual):
                self.residual_epilogue.store(
                    *outputs, scales.lse_shift, out, rows, residual, shared.call, first_row, seq_q, place.head,
                    place.batch,
                )  # fmt: skip
            else:
                self.epilogue.store(
                    *outputs, scales.lse_shift, out, rows, first_row, seq_q, place.head, place.batch
                )  # fmt: skip

    @cute.jit
    def store_kept(self, outputs: Outputs, acc: Accumulators, blocks, scales: Scales, shared: Shared, seq_q: Int32):
        """Store what the kept tiles give by themselves where the output goes."""
        place = self.place(shared)
        for b in cutlass.range_constexpr(self.budget.blocks):
            block, out = blocks[b], self.products.block_of(acc.out, b)
            if const_expr(self.short_sums is not None):  # all of it, as it will be
                self.short_sums.promote(block.sums, block.sums_shift, out, block.rows)
                out.fill(0.0)
                self.short_sums.take(block.sums, block.sums_shift, out, block.rows)
                self.epilogue.scale_channels(
                    out, scales.v, outputs.out.shape[2], place.head, place.batch, shared.call[COUNT]
                )
            self.residual_epilogue.store_kept(
                *outputs, scales.lse_shift, out, block.rows, self.first_row(place, b), seq_q, place.head, place.batch
            )
            if const_expr(self.short_sums is not None):
                out.fill(0.0)  # the sums go on
        cute.arch.sync_warp()
