"""Skip-aware attention forward for Hopper.

One CTA a q-tile. A producer warp loads the tiles that the walk lists; consumer warpgroups of 64 rows take turns to
issue their products, and the product with V of one tile runs under the softmax of the next. Scores, weights and output
live in registers; the weights are the A operand of the second product as they lie.
"""

from __future__ import annotations

import math

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, Int64, Uint16, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from lite_attention.cute_kernels.config import MAX_TILES, KernelConfig
from lite_attention.cute_kernels.device import element, pack_bf16, pack_fp16, quad_sum
from lite_attention.cute_kernels.softmax import OnlineSoftmax
from lite_attention.cute_kernels.walk import TILE_BITS, Walk
from lite_attention.ops import control as c

_LN2 = math.log(2)
_MAX_WORDS = MAX_TILES // 32

DTYPES = {"bf16": "BFloat16", "fp16": "Float16"}
_PACKS = {"bf16": pack_bf16, "fp16": pack_fp16}


class SkipAttentionForward:
    """Builds one kernel; called through `cute.compile`."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.dtype, self.pack = getattr(cutlass, DTYPES[config.dtype]), _PACKS[config.dtype]
        self.tile_m, self.tile_n, self.head_dim = config.tile_m, config.tile_n, config.head_dim
        self.stages, self.groups = config.stages, config.groups
        self.softmax = OnlineSoftmax(config, self.pack)
        self.walk = Walk(config)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        skip_mask,
        control,
        threshold,
        initial_mask,
        must_do,
        tile_flags,
        key_bits,
        scale: Float32,
        stream: cuda.CUstream,
    ):
        """Lay out, and launch one CTA a q-tile, head and batch element. The scale is in log2 units."""
        smem, rmem = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        major_k, major_mn = OperandMajorMode.K, OperandMajorMode.MN
        qk_op = warpgroup.MmaF16BF16Op(self.dtype, Float32, (64, self.tile_n, 16), smem, major_k, major_k)
        pv_op = warpgroup.MmaF16BF16Op(self.dtype, Float32, (64, self.head_dim, 16), rmem, major_k, major_mn)
        qk_mma = cute.make_tiled_mma(cute.make_mma_atom(qk_op), (self.groups, 1, 1))
        pv_mma = cute.make_tiled_mma(cute.make_mma_atom(pv_op), (self.groups, 1, 1))
        # (B, S, H, D) as torch has it, to (S, D, H, B) as TMA tiles it.
        q, k, v, out = [cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0])) for x in (q, k, v, out)]
        atom = warpgroup.make_smem_layout_atom(
            hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.head_dim), self.dtype
        )
        q_layout = cute.tile_to_shape(atom, (self.tile_m, self.head_dim), (0, 1))
        kv_layout = cute.tile_to_shape(atom, (self.tile_n, self.head_dim, self.stages), (0, 1, 2))
        load = cpasync.CopyBulkTensorTileG2SOp()
        one = cute.select(kv_layout, mode=[0, 1])
        q_tma = cpasync.make_tiled_tma_atom(load, q, q_layout, (self.tile_m, self.head_dim))
        k_tma = cpasync.make_tiled_tma_atom(load, k, one, (self.tile_n, self.head_dim))
        v_tma = cpasync.make_tiled_tma_atom(load, v, one, (self.tile_n, self.head_dim))
        self.q_bytes, self.kv_bytes = cute.size_in_bytes(self.dtype, q_layout), cute.size_in_bytes(self.dtype, one)
        q_buffer, kv_buffer = (
            cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout)], 1024]
            for layout in (q_layout, kv_layout)
        )

        @cute.struct
        class Storage:
            q_bars: cute.struct.MemRange[Int64, 2]
            k_bars: cute.struct.MemRange[Int64, 2 * self.stages]
            v_bars: cute.struct.MemRange[Int64, 2 * self.stages]
            visited: cute.struct.MemRange[Uint32, _MAX_WORDS]
            suffix: cute.struct.MemRange[Int32, _MAX_WORDS]
            kept: cute.struct.MemRange[Uint32, _MAX_WORDS]
            order: cute.struct.MemRange[Uint16, 32 * _MAX_WORDS]
            q: q_buffer
            k: kv_buffer
            v: kv_buffer

        self.storage = Storage
        self.kernel(
            qk_mma,
            pv_mma,
            q_tma[0],
            q_tma[1],
            k_tma[0],
            k_tma[1],
            v_tma[0],
            v_tma[1],
            out,
            lse,
            skip_mask,
            control,
            threshold,
            initial_mask,
            must_do,
            tile_flags,
            key_bits,
            scale,
            q_layout,
            kv_layout,
        ).launch(
            grid=[cute.ceil_div(q.shape[0], self.tile_m), q.shape[2], q.shape[3]],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

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
        """Start adding the product of the weights and a tile of V."""
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(self.tile_n // 16):
            cute.gemm(atom, out, p[None, None, kk], rv[None, None, kk, stage], out)
        warpgroup.commit_group()

    @cute.jit
    def wait_turn(self, group):
        """Wait until the warpgroup before has issued its products."""
        cute.arch.barrier(barrier_id=2 + group, number_of_threads=256)

    @cute.jit
    def pass_turn(self, group):
        """Named barrier 2 + g opens for warpgroup g when the 128 threads of the one before it have arrived."""
        cute.arch.barrier_arrive(barrier_id=2 + (group + 1) % self.groups, number_of_threads=256)

    @cute.kernel
    def kernel(
        self,
        qk_mma: cute.TiledMma,
        pv_mma: cute.TiledMma,
        q_atom: cute.CopyAtom,
        gq: cute.Tensor,
        k_atom: cute.CopyAtom,
        gk: cute.Tensor,
        v_atom: cute.CopyAtom,
        gv: cute.Tensor,
        gout: cute.Tensor,
        lse: cute.Tensor,
        skip_mask,
        control,
        threshold,
        initial_mask,
        must_do,
        tile_flags,
        key_bits,
        scale: Float32,
        q_layout: cute.ComposedLayout,
        kv_layout: cute.ComposedLayout,
    ):
        """Set up shared memory, list the tiles to visit, and split into roles."""
        thread, _, _ = cute.arch.thread_idx()
        q_tile, head, batch = cute.arch.block_idx()
        q_tiles, heads, batches = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        seq_q, seq_k = gq.shape[0], gk.shape[0]
        k_tiles = cute.ceil_div(seq_k, self.tile_n)
        words = cute.ceil_div(k_tiles, 32)
        kv_head = head // (heads // gk.shape[2])

        storage = cutlass.memory.SmemAllocator().allocate(self.storage)
        sq = storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sk = storage.k.get_tensor(kv_layout.outer, swizzle=kv_layout.inner)
        sv = storage.v.get_tensor(kv_layout.outer, swizzle=kv_layout.inner)
        visited = storage.visited.get_tensor(cute.make_layout(_MAX_WORDS))
        suffix = storage.suffix.get_tensor(cute.make_layout(_MAX_WORDS))
        kept = storage.kept.get_tensor(cute.make_layout(_MAX_WORDS))
        order = storage.order.get_tensor(cute.make_layout(MAX_TILES))
        q_pipe = self.pipe(1, self.q_bytes, storage.q_bars)
        k_pipe = self.pipe(self.stages, self.kv_bytes, storage.k_bars)
        v_pipe = self.pipe(self.stages, self.kv_bytes, storage.v_bars)
        cute.arch.mbarrier_init_fence()

        # What this call is, from the control tensor; all threads read it before any takes a ticket.
        block, step = Int32(0), Int32(0)
        fresh, dense, limit = Boolean(True), Boolean(False), -Float32.inf
        row, initial_row, flags = None, None, None
        if const_expr(self.config.skip):
            slot = control[c.SLOT]
            block = Int32(c.slot_word(0, 0)) + slot * c.SLOT_WORDS
            step = control[block + c.STEP]
            dense = (control[c.FLAGS] & c.FLAG_DENSE) != 0
            fresh = self.walk.is_fresh(control, block, step, batches, seq_q, seq_k)
            table_slot = cutlass.min(slot, threshold.shape[0] - 1)
            table_step = cutlass.min(step, threshold.shape[1] - 1)
            limit = threshold[table_slot, table_step, cutlass.min(head, threshold.shape[2] - 1)]
            row = skip_mask[slot, batch, head, q_tile, None]
            if const_expr(initial_mask is not None):
                initial_row = initial_mask[batch % initial_mask.shape[0], head % initial_mask.shape[1], q_tile, None]
        if const_expr(tile_flags is not None):
            flags = tile_flags[batch, None, None]
        numerator = Int64(2 * q_tile + 1) * Int64(self.tile_m) * Int64(seq_k)
        diagonal = cutlass.min(Int64(k_tiles - 1), numerator // (Int64(2) * Int64(seq_q) * Int64(self.tile_n)))
        count = self.walk.build(
            row, initial_row, must_do, flags, visited, suffix, kept, order, thread, words, k_tiles, seq_k,
            Int32(diagonal), fresh, dense,
        )  # fmt: skip

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.config.producer_registers)
            if warp == 0:
                self.load(
                    q_atom, gq[None, None, head, batch], sq, q_tile, k_atom, gk[None, None, kv_head, batch], sk,
                    v_atom, gv[None, None, kv_head, batch], sv, q_pipe, k_pipe, v_pipe, order, count,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            worker = thread - 128
            lane = cute.arch.lane_idx()
            first_row = q_tile * self.tile_m + (worker // 32) * 16 + lane // 4
            out = cute.make_rmem_tensor(pv_mma.partition_shape_C((self.tile_m, self.head_dim)), Float32)
            top, shift, total, factor = [cute.make_rmem_tensor(2, Float32) for _ in range(4)]
            reach = limit / scale
            if limit == -Float32.inf:
                reach = Float32.nan  # compares false: everything is kept
            votes_0, votes_1 = Boolean(first_row < seq_q), Boolean(first_row + 8 < seq_q)
            self.attend(
                qk_mma, pv_mma, sq, sk, sv, q_pipe, k_pipe, v_pipe, out, top, shift, total, factor, order, count, kept,
                key_bits, batch, seq_k, scale, reach, votes_0, votes_1, worker, lane,
            )  # fmt: skip
            self.store(gout, lse, out, shift, total, first_row, seq_q, head, batch, lane)
            if const_expr(self.config.skip):
                cute.arch.barrier(barrier_id=1, number_of_threads=128 * self.groups)  # all votes are in
                if not dense:
                    self.walk.write_back(
                        row, initial_row, must_do, visited, kept, worker, 128 * self.groups, words, fresh, dense
                    )
                    if worker == 0:
                        ctas = q_tiles * heads * batches
                        self.walk.move_step(control, block, step, batches, seq_q, seq_k, ctas)

    def pipe(self, stages: int, size: int, barriers):
        """A ring that TMA fills and every consumer warp releases."""
        return pipeline.PipelineTmaAsync.create(
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * self.groups),
            tx_count=size,
            barrier_storage=barriers.data_ptr(),
            defer_sync=True,
        )

    @cute.jit
    def load(
        self,
        q_atom: cute.CopyAtom,
        gq: cute.Tensor,
        sq: cute.Tensor,
        q_tile: Int32,
        k_atom: cute.CopyAtom,
        gk: cute.Tensor,
        sk: cute.Tensor,
        v_atom: cute.CopyAtom,
        gv: cute.Tensor,
        sv: cute.Tensor,
        q_pipe,
        k_pipe,
        v_pipe,
        order: cute.Tensor,
        count: Int32,
    ):
        """The producer warp: Q once, then K and V of each tile on the list."""
        q_dst, q_src = self.partition(q_atom, sq, cute.local_tile(gq, (self.tile_m, self.head_dim), (q_tile, 0)))
        k_dst, k_src = self.partition(k_atom, sk, cute.local_tile(gk, (self.tile_n, self.head_dim), (None, 0)))
        v_dst, v_src = self.partition(v_atom, sv, cute.local_tile(gv, (self.tile_n, self.head_dim), (None, 0)))
        producer = pipeline.PipelineUserType.Producer
        q_state = pipeline.make_pipeline_state(producer, 1)
        state = pipeline.make_pipeline_state(producer, self.stages)
        if count > 0:
            q_pipe.producer_acquire(q_state)
            cute.copy(q_atom, q_src, q_dst, tma_bar_ptr=q_pipe.producer_get_barrier(q_state))
        for t in cutlass.range(count, unroll=1):
            j, at = Int32(order[t]) & TILE_BITS, state.index
            k_pipe.producer_acquire(state)
            cute.copy(k_atom, k_src[None, j], k_dst[None, at], tma_bar_ptr=k_pipe.producer_get_barrier(state))
            v_pipe.producer_acquire(state)
            cute.copy(v_atom, v_src[None, j], v_dst[None, at], tma_bar_ptr=v_pipe.producer_get_barrier(state))
            state.advance()
        v_pipe.producer_tail(state)

    def partition(self, atom, shared, tensor):
        """Source and destination of a TMA copy, its tile one mode."""
        layout = cute.make_layout(1)
        return cpasync.tma_partition(atom, 0, layout, cute.group_modes(shared, 0, 2), cute.group_modes(tensor, 0, 2))

    @cute.jit
    def attend(
        self,
        qk_mma: cute.TiledMma,
        pv_mma: cute.TiledMma,
        sq: cute.Tensor,
        sk: cute.Tensor,
        sv: cute.Tensor,
        q_pipe,
        k_pipe,
        v_pipe,
        out: cute.Tensor,
        top: cute.Tensor,
        shift: cute.Tensor,
        total: cute.Tensor,
        factor: cute.Tensor,
        order: cute.Tensor,
        count: Int32,
        kept: cute.Tensor,
        key_bits,
        batch: Int32,
        seq_k: Int32,
        scale: Float32,
        reach: Float32,
        votes_0: Boolean,
        votes_1: Boolean,
        worker: Int32,
        lane: Int32,
    ):
        """A consumer warpgroup: the output of its 64 rows, and their votes."""
        group = cute.arch.make_warp_uniform(worker // 128)
        group_start = cute.make_layout(self.groups, stride=128)(group)
        qk_part, pv_part = qk_mma.get_slice(group_start), pv_mma.get_slice(group_start)
        sv_transposed = cute.make_tensor(sv.iterator, cute.select(sv.layout, mode=[1, 0, 2]))
        rq = qk_mma.make_fragment_A(qk_part.partition_A(sq))
        rk = qk_mma.make_fragment_B(qk_part.partition_B(sk))
        rv = pv_mma.make_fragment_B(pv_part.partition_B(sv_transposed))
        x = cute.make_rmem_tensor(qk_mma.partition_shape_C((self.tile_m, self.tile_n)), Float32)
        weights_layout = cute.make_layout(((2, 2, 2), 1, self.tile_n // 16), stride=((1, 2, 4), 0, 8))
        p = cute.make_rmem_tensor(weights_layout, self.dtype)
        pairs = cute.recast_tensor(cute.make_tensor(p.iterator, cute.make_layout(self.tile_n // 2)), Int32)
        out.fill(0.0)
        top.fill(-Float32.inf)
        shift.fill(-1e30)
        factor.fill(1.0)
        total.fill(0.0)
        if group == self.groups - 1:  # the first turn is the first warpgroup's
            self.pass_turn(group)
        consumer = pipeline.PipelineUserType.Consumer
        state = pipeline.make_pipeline_state(consumer, self.stages)
        if count > 0:
            q_pipe.consumer_wait(pipeline.make_pipeline_state(consumer, 1))
            entry = cute.arch.make_warp_uniform(Int32(order[0]))
            j = entry & TILE_BITS
            at, bits = j // 32, Uint32(1) << Uint32(j % 32)  # tiles to keep, a word at a time; the first always is
            k_pipe.consumer_wait(state)
            self.issue_qk(qk_mma, x, rq, rk, state.index)
            warpgroup.wait_group(0)
            k_pipe.consumer_release(state)
            if entry > TILE_BITS:
                self.softmax.exclude(x, j * self.tile_n, seq_k, key_bits, batch)
            self.softmax.step(x, top, shift, total, factor, scale, reach, votes_0, votes_1)
            self.softmax.convert(x, pairs)
            for t in cutlass.range(1, count, unroll=1):
                entry = cute.arch.make_warp_uniform(Int32(order[t]))
                j = entry & TILE_BITS
                before = state.clone()
                state.advance()
                k_pipe.consumer_wait(state)
                self.wait_turn(group)
                self.issue_qk(qk_mma, x, rq, rk, state.index)  # scores of this tile
                v_pipe.consumer_wait(before)
                self.issue_pv(pv_mma, out, p, rv, before.index)  # values of the tile before
                self.pass_turn(group)
                warpgroup.wait_group(1)
                k_pipe.consumer_release(state)
                if entry > TILE_BITS:
                    self.softmax.exclude(x, j * self.tile_n, seq_k, key_bits, batch)
                moved, keep = self.softmax.step(x, top, shift, total, factor, scale, reach, votes_0, votes_1)
                warpgroup.wait_group(0)
                v_pipe.consumer_release(before)
                self.softmax.convert(x, pairs)
                self.softmax.rescale(out, factor, moved)
                if const_expr(self.config.skip):
                    if j // 32 != at:
                        if lane == 0:
                            cute.arch.atomic_or(kept.iterator + at, bits)
                        at, bits = j // 32, Uint32(0)
                    if keep:
                        bits = bits | (Uint32(1) << Uint32(j % 32))
            if const_expr(self.config.skip):
                if lane == 0:
                    cute.arch.atomic_or(kept.iterator + at, bits)
            v_pipe.consumer_wait(state)
            self.issue_pv(pv_mma, out, p, rv, state.index)
            warpgroup.wait_group(0)
            v_pipe.consumer_release(state)

    @cute.jit
    def store(
        self, gout, lse, out, shift, total, first_row: Int32, seq_q: Int32, head: Int32, batch: Int32, lane: Int32
    ):
        """Divide by the sums, and write the output and the log-sum-exp."""
        for half in cutlass.range_constexpr(2):
            row_sum = quad_sum(total[half])
            inverse = cute.arch.rcp_approx(row_sum)
            if row_sum == 0.0:
                inverse = Float32(0.0)
            row = first_row + 8 * half
            if row < seq_q:
                if lane % 4 == 0:
                    value = (shift[half] + cute.math.log2(row_sum, fastmath=True)) * _LN2
                    if row_sum == 0.0:
                        value = -Float32.inf
                    lse[batch, head, row] = value
                pairs = cute.recast_tensor(gout[row, None, head, batch], Int32)
                for i in cutlass.range_constexpr(0, self.head_dim // 4, 2):
                    pair = self.pack(out[element(half, i)] * inverse, out[element(half, i + 1)] * inverse)
                    pairs[(i // 2) * 4 + lane % 4] = pair
