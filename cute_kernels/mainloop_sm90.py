"""One q-tile in one consumer warpgroup: scores, softmax and votes, values, and the output to memory.

Scores, weights and output live in registers, in FP8 sums of the output in shared memory too; the weights are the A
operand of the second product as they lie. The product with V of one tile runs under the softmax of the next, and
warpgroups take turns to issue their products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint8, const_expr
from cutlass.cute.nvgpu import warpgroup

from lite_attention.cute_kernels.budget_sm90 import PROMOTED_KEYS
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.ptx import column, element, max_nan, pack_bf16, pack_fp16, quad_sum
from lite_attention.cute_kernels.softmax import OnlineSoftmax
from lite_attention.cute_kernels.tile_iterator import TILE_BITS

_LN2 = math.log(2)
_LEAST_UNIT = 2.0**-100  # not 0: an excluded key's -inf would become NaN
_PACKS = {"bf16": pack_bf16, "fp16": pack_fp16}


class Pipes(NamedTuple):
    """Rings that TMA fills."""

    q: Any
    k: Any
    v: Any


class Tiles(NamedTuple):
    """What comes with a tile of K, in shared memory, by stage."""

    entries: Any  # which tile, and a flag above TILE_BITS: some of its keys are excluded
    scales: Any  # of integers
    norms: Any


class Mainloop:
    """What consumer warpgroups do between the barriers of a job."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.int8, self.fp8 = config.quantization.scores is not None, config.quantization.values is not None
        self.pack = _PACKS[config.dtype]
        self.softmax = OnlineSoftmax(config, self.pack)
        self.promoted_tiles = PROMOTED_KEYS // config.tile_n

    @cute.jit
    def issue_qk(self, mma, scores, rq, rk, stage):
        """Start the product of Q and a tile of K."""
        atom = cute.make_mma_atom(mma.op)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(rq, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, kk != 0)
            cute.gemm(atom, scores, rq[None, None, kk], rk[None, None, kk, stage], scores)
        warpgroup.commit_group()

    @cute.jit
    def issue_pv(self, mma, out, p, rv, stage):
        """Start the product of the weights and a tile of V."""
        atom = cute.make_mma_atom(mma.op)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(p, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, True)
            cute.gemm(atom, out, p[None, None, kk], rv[None, None, kk, stage], out)
        warpgroup.commit_group()

    @cute.jit
    def take_totals(self, out, total, factor):
        """Add what the columns of ones have summed up of a tile's weights, rescaled, and clear it."""
        for half in cutlass.range_constexpr(2):
            e = element(half, self.config.head_dim // 4)
            total[half] = total[half] + out[e] * factor[half]
            out[e] = Float32(0.0)

    @cute.jit
    def promote(self, sums, out, shift, sums_shift, factor):
        """Add the output, rescaled, to the sums in shared memory, and leave a factor that clears it."""
        lag = self.lag(shift, sums_shift)
        for i in cutlass.range_constexpr(self.config.head_dim // 8):
            four = cute.make_rmem_tensor(4, Float32)
            cute.autovec_copy(sums[None, i], four)
            for e in cutlass.range_constexpr(4):
                four[e] = four[e] * lag[e // 2] + out[4 * i + e] * factor[e // 2]
            cute.autovec_copy(four, sums[None, i])
        factor.fill(0.0)

    @cute.jit
    def take_sums(self, sums, out, shift, sums_shift):
        """Add the sums in shared memory to the output."""
        lag = self.lag(shift, sums_shift)
        for i in cutlass.range_constexpr(self.config.head_dim // 8):
            four = cute.make_rmem_tensor(4, Float32)
            cute.autovec_copy(sums[None, i], four)
            for e in cutlass.range_constexpr(4):
                out[4 * i + e] = out[4 * i + e] + four[e] * lag[e // 2]

    @cute.jit
    def lag(self, shift, sums_shift):
        """What the sums must be rescaled by, since the last time that they were."""
        factors = cute.make_rmem_tensor(2, Float32)
        for half in cutlass.range_constexpr(2):
            factors[half] = cute.math.exp2(sums_shift[half] - shift[half], fastmath=True)
            sums_shift[half] = shift[half]
        return factors

    @cute.jit
    def of_tile(self, scale: Float32, norm: Float32, tiles: Tiles, stage):
        """What makes log2 units of the scores of a tile, and what none exceeds then; of use for integers."""
        unit, bound = scale, norm
        if const_expr(self.int8):
            unit, bound = max_nan(scale * tiles.scales[stage], _LEAST_UNIT), norm * tiles.norms[stage]
        return unit, bound

    @cute.jit
    def wait_turn(self, group):
        """Wait until the warpgroup before has issued its products."""
        cute.arch.barrier(barrier_id=2 + group, number_of_threads=256)

    @cute.jit
    def pass_turn(self, group):
        """Named barrier 2 + g opens for warpgroup g when the 128 threads of the one before it have arrived."""
        cute.arch.barrier_arrive(barrier_id=2 + (group + 1) % self.budget.groups, number_of_threads=256)

    @cute.jit
    def attend(
        self, qk_mma, pv_mma, rq, rk, rv, scores, p, sums, out, top, shift, total, pipes: Pipes, q_state, state,
        tiles: Tiles, kept, count: Int32, group, key_bits, batch: Int32, seq_k: Int32, scale: Float32, norm: Float32,
        reach: Float32, votes_0: Boolean, votes_1: Boolean,
    ):  # fmt: skip
        """Sums of the weighted values of this warpgroup's rows, not yet divided, and its votes in `kept`."""
        q_pipe, k_pipe, v_pipe = pipes
        words = cute.recast_tensor(cute.make_tensor(p.iterator, cute.make_layout(self.config.tile_n // 2)), Int32)
        factor, sums_shift = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
        offset, lowest = cute.make_rmem_tensor(2, Int32), cute.make_rmem_tensor(2, Int32)
        out.fill(0.0)
        top.fill(-Float32.inf)
        shift.fill(-1e30)
        factor.fill(1.0)
        total.fill(0.0)
        if const_expr(self.fp8):
            sums_shift.fill(-1e30)
            zeros = cute.make_rmem_tensor(4, Float32)
            zeros.fill(0.0)
            for i in cutlass.range_constexpr(self.config.head_dim // 8):
                cute.autovec_copy(zeros, sums[None, i])
        if count > 0:
            k_pipe.consumer_wait(state)
            entry = cute.arch.make_warp_uniform(tiles.entries[state.index])
            unit, bound = self.of_tile(scale, norm, tiles, state.index)
            j, partial = entry & TILE_BITS, entry > TILE_BITS
            if const_expr(self.config.skip):
                kept[j] = Uint8(1)  # the first tile always is
            self.issue_qk(qk_mma, scores, rq, rk, state.index)
            warpgroup.wait_group(0)
            k_pipe.consumer_release(state)
            unit = self.softmax.prepare(scores, unit, partial, j * self.config.tile_n, seq_k, key_bits, batch)
            _, _, slope, clamp = self.softmax.step(
                scores, top, shift, total, factor, offset, lowest, unit, bound, partial, reach, votes_0, votes_1
            )
            self.softmax.convert(scores, words, offset, lowest, slope, clamp)
            for n in cutlass.range(1, count, unroll=1):
                before = state.clone()
                state.advance()
                k_pipe.consumer_wait(state)
                entry = cute.arch.make_warp_uniform(tiles.entries[state.index])
                unit, bound = self.of_tile(scale, norm, tiles, state.index)
                self.softmax.add_up(words, total)
                self.wait_turn(group)
                self.issue_qk(qk_mma, scores, rq, rk, state.index)  # scores of this tile
                v_pipe.consumer_wait(before)
                self.issue_pv(pv_mma, out, p, rv, before.index)  # values of the tile before
                self.pass_turn(group)
                warpgroup.wait_group(1)
                k_pipe.consumer_release(state)
                j, partial = entry & TILE_BITS, entry > TILE_BITS
                unit = self.softmax.prepare(scores, unit, partial, j * self.config.tile_n, seq_k, key_bits, batch)
                moved, keep, slope, clamp = self.softmax.step(
                    scores, top, shift, total, factor, offset, lowest, unit, bound, partial, reach, votes_0, votes_1
                )
                warpgroup.wait_group(0)
                v_pipe.consumer_release(before)
                self.softmax.convert(scores, words, offset, lowest, slope, clamp)
                if const_expr(self.fp8):
                    self.take_totals(out, total, factor)
                    if n % self.promoted_tiles == 0:
                        self.promote(sums, out, shift, sums_shift, factor)
                        moved = Boolean(True)
                self.softmax.rescale(out, factor, moved)
                if const_expr(self.config.skip):
                    if keep:
                        kept[j] = Uint8(1)
        # Lane 0 releases for all: none may still be busy with the job before, whose place in the ring goes with it.
        cute.arch.sync_warp()
        q_pipe.consumer_release(q_state)
        if count > 0:
            v_pipe.consumer_wait(state)
            self.softmax.add_up(words, total)
            self.issue_pv(pv_mma, out, p, rv, state.index)
            warpgroup.wait_group(0)
            v_pipe.consumer_release(state)
            if const_expr(self.fp8):
                factor.fill(1.0)
                self.take_totals(out, total, factor)
                self.take_sums(sums, out, shift, sums_shift)
            state.advance()
        return state

    @cute.jit
    def scale_channels(self, out, scales):
        """Give the sums of FP8 values their channels' scales."""
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(self.config.head_dim // 4):
            scale = scales[column(i, lane)]
            for half in cutlass.range_constexpr(2):
                out[element(half, i)] = out[element(half, i)] * scale

    @cute.jit
    def store(
        self, gout, lse, lse_shift, out, shift, total, first_row: Int32, seq_q: Int32, head: Int32, batch: Int32
    ):  # fmt: skip
        """Divide by the sums, and write the output and the log-sum-exp."""
        lane = cute.arch.lane_idx()
        for half in cutlass.range_constexpr(2):
            row_sum = total[half] if const_expr(self.fp8) else quad_sum(total[half])
            inverse = cute.arch.rcp_approx(row_sum)
            if row_sum == 0.0:
                inverse = Float32(0.0)
            row = first_row + 8 * half
            if row < seq_q:
                if lane % 4 == 0:
                    value = (shift[half] + cute.math.log2(row_sum, fastmath=True)) * _LN2
                    if const_expr(lse_shift is not None):
                        value += lse_shift[batch, head, row]
                    if row_sum == 0.0:
                        value = -Float32.inf
                    lse[batch, head, row] = value
                pairs = cute.recast_tensor(gout[row, None, head, batch], Int32)
                for i in cutlass.range_constexpr(0, self.config.head_dim // 4, 2):
                    pair = self.pack(out[element(half, i)] * inverse, out[element(half, i + 1)] * inverse)
                    pairs[(i // 2) * 4 + lane % 4] = pair
