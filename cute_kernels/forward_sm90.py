"""Skip-aware attention forward for Hopper: layouts, launch, and the roles of the warps of a CTA.

As many CTAs as the GPU has multiprocessors, each working through jobs (q-tiles). A producer warp lists the tiles of a
job and loads them, one job ahead of the consumer warpgroups of 64 rows each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum

from lite_attention.cute_kernels.config import DTYPES, MAX_TILES, MAX_WORDS, KernelConfig, Masks, Scales, State
from lite_attention.cute_kernels.mainloop_sm90 import Mainloop, Pipes, Tiles
from lite_attention.cute_kernels.ptx import TYPES, uniform_float
from lite_attention.cute_kernels.tile_iterator import TileIterator
from lite_attention.cute_kernels.tile_scheduler import (
    BATCH,
    CLAIM_AHEAD,
    COUNT,
    DONE,
    END,
    HEAD,
    JOB_WORDS,
    Q_TILE,
    RING,
    TileScheduler,
)
from lite_attention.ops import control as c
from lite_attention.ops.quantize import FP8_KEYS, QUERY_ROWS

_E4M3_ONE = 0x38
_SLOT, _FRESH, _DENSE = range(3)  # of what shared memory holds about the call


class Jobs(NamedTuple):
    """What the producer tells consumers of the jobs in flight, and they each other, in shared memory."""

    call: Any  # slot, whether fresh, whether dense: the same for all jobs
    words: Any  # [RING, JOB_WORDS]
    reach: Any  # [RING], threshold in units of scores
    visited: Any  # [RING, words], bits of tiles
    kept: Any  # [RING, tiles], bytes: 1 = some row keeps the tile


class SkipAttentionForward:
    """Builds one kernel; called through `cute.compile`."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.int8, self.fp8 = config.quantization.scores is not None, config.quantization.values is not None
        self.dtype, self.qk_dtype = TYPES[DTYPES[config.dtype]], TYPES[config.score_dtype]
        self.score_dtype = Int32 if self.int8 else Float32
        self.tile_m, self.tile_n, self.head_dim = config.tile_m, config.tile_n, config.head_dim
        # A tile of V, and where tiles are in the whole. FP8 products want keys innermost.
        self.v_dtype, self.v_tile, self.v_tiles = self.dtype, (self.tile_n, self.head_dim), (None, 0)
        if self.fp8:
            self.v_dtype, self.v_tile, self.v_tiles = cutlass.Float8E4M3FN, (self.head_dim, self.tile_n), (0, None)
        self.stages, self.groups = self.budget.stages, self.budget.groups
        self.scheduler = TileScheduler(config)
        self.tile_iterator = TileIterator(config)
        self.mainloop = Mainloop(config)

    @cute.jit
    def __call__(
        self, q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, out: cute.Tensor, lse: cute.Tensor, skip_mask, control,
        threshold, initial_mask, must_do, tile_flags, key_bits, q_scales, q_norms, k_scales, k_norms, lse_shift,
        v_scales, scale: Float32, processors: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        """Lay out and launch. The scale is in log2 units, unused in INT8; processors are the GPU's multiprocessors."""
        qk_mma = cute.make_tiled_mma(cute.make_mma_atom(self.qk_op()), (self.groups, 1, 1))
        pv_mma = cute.make_tiled_mma(cute.make_mma_atom(self.pv_op()), (self.groups, 1, 1))
        # (B, S, H, D) as torch has it, to (S, D, H, B) as TMA tiles it; FP8 values (B, H, D, S) to (D, S, H, B).
        q, k, out = [cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0])) for x in (q, k, out)]
        v_modes = [2, 3, 1, 0] if self.fp8 else [1, 3, 2, 0]
        v = cute.make_tensor(cute.recast_ptr(v.iterator, dtype=self.v_dtype), cute.select(v.layout, mode=v_modes))
        q_layout = self.layout(self.qk_dtype, self.tile_m, self.head_dim)
        k_layout = self.layout(self.qk_dtype, self.tile_n, self.head_dim, self.stages)
        ones = self.budget.value_columns - self.head_dim
        v_layout = self.layout(self.v_dtype, self.v_tile[0] + ones, self.v_tile[1], self.stages)
        one_k, one_v = (cute.select(layout, mode=[0, 1]) for layout in (k_layout, v_layout))
        if const_expr(self.fp8):
            one_v = cute.composition(one_v, self.v_tile)  # less the ones
        load = cpasync.CopyBulkTensorTileG2SOp()
        q_tma = cpasync.make_tiled_tma_atom(load, q, q_layout, (self.tile_m, self.head_dim))
        k_tma = cpasync.make_tiled_tma_atom(load, k, one_k, (self.tile_n, self.head_dim))
        v_tma = cpasync.make_tiled_tma_atom(load, v, one_v, self.v_tile)
        self.q_bytes, self.k_bytes = (cute.size_in_bytes(self.qk_dtype, layout) for layout in (q_layout, one_k))
        self.v_bytes = self.v_tile[0] * self.v_tile[1] * self.v_dtype.width // 8
        q_buffer, k_buffer, v_buffer = (
            cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]
            for dtype, layout in ((self.qk_dtype, q_layout), (self.qk_dtype, k_layout), (self.v_dtype, v_layout))
        )

        @cute.struct
        class Storage:
            q_bars: cute.struct.MemRange[Int64, 2]
            k_bars: cute.struct.MemRange[Int64, 2 * self.stages]
            v_bars: cute.struct.MemRange[Int64, 2 * self.stages]
            call: cute.struct.MemRange[Int32, 4]
            jobs: cute.struct.MemRange[Int32, RING * JOB_WORDS]
            reach: cute.struct.MemRange[Float32, RING + 1]
            entries: cute.struct.MemRange[Int32, self.stages]
            visited: cute.struct.MemRange[Uint32, RING * MAX_WORDS]
            kept: cute.struct.Align[cute.struct.MemRange[Uint8, RING * MAX_TILES], 16]
            partial: cute.struct.MemRange[Uint32, MAX_WORDS if self.config.key_mask else 1]
            k_scales: cute.struct.MemRange[Float32, self.stages]
            k_norms: cute.struct.MemRange[Float32, self.stages]
            sums: cute.struct.Align[cute.struct.MemRange[Float32, max(1, self.budget.promoted_sums)], 16]
            q: q_buffer
            k: k_buffer
            v: v_buffer

        self.storage = Storage
        jobs = cute.ceil_div(q.shape[0], self.tile_m) * q.shape[2] * q.shape[3]
        self.kernel(
            qk_mma, pv_mma, *q_tma, *k_tma, *v_tma, out, lse, skip_mask, control, threshold, initial_mask, must_do,
            tile_flags, key_bits, q_scales, q_norms, k_scales, k_norms, lse_shift, v_scales, scale, q_layout, k_layout,
            v_layout,
        ).launch(
            grid=[cutlass.min(jobs, processors), 1, 1],
            block=[self.budget.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, qk_mma: cute.TiledMma, pv_mma: cute.TiledMma, q_atom: cute.CopyAtom, gq: cute.Tensor,
        k_atom: cute.CopyAtom, gk: cute.Tensor, v_atom: cute.CopyAtom, gv: cute.Tensor, gout: cute.Tensor,
        lse: cute.Tensor, skip_mask, control, threshold, initial_mask, must_do, tile_flags, key_bits, q_scales, q_norms,
        k_scales, k_norms, lse_shift, v_scales, scale: Float32, q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout, v_layout: cute.ComposedLayout,
    ):  # fmt: skip
        """Set up shared memory, read what the call is, and split into roles."""
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        skip, masks = State(skip_mask, control, threshold, initial_mask, must_do), Masks(tile_flags, key_bits)
        scales = Scales(q_scales, q_norms, k_scales, k_norms, lse_shift, v_scales)
        storage = cutlass.memory.SmemAllocator().allocate(self.storage)
        sq = storage.q.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sk = storage.k.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        sv = storage.v.get_tensor(v_layout.outer, swizzle=v_layout.inner)
        jobs = Jobs(
            storage.call.get_tensor(cute.make_layout(4)),
            storage.jobs.get_tensor(cute.make_layout((RING, JOB_WORDS), stride=(JOB_WORDS, 1))),
            storage.reach.get_tensor(cute.make_layout(RING)),
            storage.visited.get_tensor(cute.make_layout((RING, MAX_WORDS), stride=(MAX_WORDS, 1))),
            storage.kept.get_tensor(cute.make_layout((RING, MAX_TILES), stride=(MAX_TILES, 1))),
        )
        of_tiles = (storage.entries, storage.k_scales, storage.k_norms)
        tiles = Tiles(*[x.get_tensor(cute.make_layout(self.stages)) for x in of_tiles])
        partial = storage.partial.get_tensor(cute.make_layout(MAX_WORDS if self.config.key_mask else 1))
        sums = storage.sums.get_tensor(cute.make_layout(max(1, self.budget.promoted_sums)))
        pipes = Pipes(
            self.pipe(1, self.q_bytes, storage.q_bars),
            self.pipe(self.stages, self.k_bytes, storage.k_bars),
            self.pipe(self.stages, self.v_bytes, storage.v_bars),
        )
        cute.arch.mbarrier_init_fence()
        if const_expr(self.fp8):
            self.fill_ones(sv, thread)

        if const_expr(self.config.skip):
            if thread == 0:
                slot = control[c.SLOT]
                fresh = self.scheduler.is_fresh(
                    control, self.scheduler.block(slot), gq.shape[3], gq.shape[0], gk.shape[0]
                )
                jobs.call[_SLOT] = slot
                jobs.call[_FRESH] = Int32(fresh)
                jobs.call[_DENSE] = control[c.FLAGS] & c.FLAG_DENSE
            words = cute.ceil_div(cute.ceil_div(gk.shape[0], self.tile_n), 32)
            for ring in cutlass.range_constexpr(RING):
                if thread == 0:
                    jobs.words[ring, DONE] = Int32(0)
                for tile in cutlass.range(thread, words * 32, self.budget.threads, unroll=1):
                    jobs.kept[ring, tile] = Uint8(0)
        cute.arch.sync_threads()
        sv_loaded = sv
        if const_expr(self.fp8):
            sv_loaded = cute.composition(sv, (*self.v_tile, self.stages))

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.budget.producer_registers)
            if warp == 0:
                self.produce(
                    q_atom, gq, sq, k_atom, gk, sk, v_atom, gv, sv_loaded, pipes, skip, masks, scales, jobs, tiles,
                    partial, scale,
                )  # fmt: skip
        else:
            cute.arch.setmaxregister_increase(self.budget.consumer_registers)
            self.consume(
                qk_mma, pv_mma, sq, sk, sv, pipes, gout, lse, skip, masks, scales, jobs, tiles, sums, scale,
                gq.shape[0], gk.shape[0],
            )  # fmt: skip

    def qk_op(self):
        """One product of queries and keys, 32 bytes of a row at a time."""
        major = OperandMajorMode.K
        if self.int8:
            shape = (64, self.tile_n, 32)
            return warpgroup.MmaI8Op(
                cutlass.Int8, cutlass.Int8, Int32, shape, warpgroup.OperandSource.SMEM, major, major
            )
        shape = (64, self.tile_n, 16)
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, warpgroup.OperandSource.SMEM, major, major)

    def pv_op(self):
        """One product of weights and values, 16 keys at a time, or 32 in FP8."""
        source, major_k, major_mn = warpgroup.OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.MN
        if self.fp8:
            shape = (64, self.budget.value_columns, FP8_KEYS)
            return warpgroup.MmaF8Op(self.v_dtype, self.v_dtype, Float32, shape, source, major_k, major_k)
        shape = (64, self.head_dim, 16)
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, source, major_k, major_mn)

    def layout(self, dtype, *shape: int):
        """Layout in shared memory, (rows, width) or (rows, width, stages), swizzled."""
        kind = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, shape[1])
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), shape, tuple(range(len(shape))))

    @cute.jit
    def fill_ones(self, sv, thread):
        """Write the columns of V, rows in shared memory, that sum up the weights. TMA leaves them alone."""
        ones = cute.recast_tensor(sv, Uint8)
        for i in cutlass.range(thread, 8 * self.tile_n * self.stages, self.budget.threads, unroll=1):
            ones[self.head_dim + i % 8, i // 8 % self.tile_n, i // 8 // self.tile_n] = Uint8(_E4M3_ONE)
        cute.arch.fence_proxy("async.shared", space="cta")

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
    def rows(self, skip: State, slot: Int32, batch: Int32, head: Int32, q_tile: Int32):
        """The rows of a job in the skip mask and in the initial mask."""
        row, initial_row = None, None
        if const_expr(self.config.skip):
            row = skip.skip_mask[slot, batch, head, q_tile, None]
            if const_expr(skip.initial_mask is not None):
                batches, heads = skip.initial_mask.shape[0], skip.initial_mask.shape[1]
                initial_row = skip.initial_mask[batch % batches, head % heads, q_tile, None]
        return row, initial_row

    @cute.jit
    def produce(
        self, q_atom, gq, sq, k_atom, gk, sk, v_atom, gv, sv, pipes: Pipes, skip: State, masks: Masks, scales: Scales,
        jobs: Jobs, tiles: Tiles, partial, scale: Float32,
    ):  # fmt: skip
        """The producer warp: list the tiles of each job, announce it, and load Q and the tiles of K and V."""
        q_pipe, k_pipe, v_pipe = pipes
        lane = cute.arch.lane_idx()
        first, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        seq_q, heads, batches, seq_k = gq.shape[0], gq.shape[2], gq.shape[3], gk.shape[0]
        q_tiles, k_tiles = cute.ceil_div(seq_q, self.tile_m), cute.ceil_div(seq_k, self.tile_n)
        producer = pipeline.PipelineUserType.Producer
        q_state = pipeline.make_pipeline_state(producer, 1)
        state = pipeline.make_pipeline_state(producer, self.stages)
        job, ring, total = Int32(first), Int32(0), q_tiles * heads * batches
        while job < total:
            q_tile, head, batch = job % q_tiles, job // q_tiles % heads, job // q_tiles // heads
            kv_head = head // (heads // gk.shape[2])
            slot, fresh, dense, flags = Int32(0), Boolean(True), Boolean(False), None
            if const_expr(self.config.skip):
                slot, fresh, dense = jobs.call[_SLOT], jobs.call[_FRESH] != 0, jobs.call[_DENSE] != 0
            if const_expr(masks.tile_flags is not None):
                flags = masks.tile_flags[batch, None, None]
            row, initial_row = self.rows(skip, slot, batch, head, q_tile)
            bits = jobs.visited[ring, None]
            count = self.tile_iterator.find_visited(
                row, initial_row, skip.must_do, flags, bits, partial, lane, k_tiles, fresh, dense
            )
            if lane == 0:
                jobs.words[ring, Q_TILE] = q_tile
                jobs.words[ring, HEAD] = head
                jobs.words[ring, BATCH] = batch
                jobs.words[ring, COUNT] = count
                if const_expr(self.config.skip):
                    jobs.reach[ring] = self.scheduler.reach(skip.threshold, skip.control, slot, head, scale)
            cute.arch.sync_warp()
            q_pipe.producer_acquire(q_state)
            q_tiled = cute.local_tile(gq[None, None, head, batch], (self.tile_m, self.head_dim), (None, 0))
            q_dst, q_src = self.partition(q_atom, sq, q_tiled)
            cute.copy(q_atom, q_src[None, q_tile], q_dst, tma_bar_ptr=q_pipe.producer_get_barrier(q_state))
            q_state.advance()
            k_tiled = cute.local_tile(gk[None, None, kv_head, batch], (self.tile_n, self.head_dim), (None, 0))
            v_tiled = cute.local_tile(gv[None, None, kv_head, batch], self.v_tile, self.v_tiles)
            k_dst, k_src = self.partition(k_atom, sk, k_tiled)
            v_dst, v_src = self.partition(v_atom, sv, v_tiled)
            diagonal = self.tile_iterator.diagonal(q_tile, seq_q, seq_k, k_tiles)
            left, after = count, job
            if left <= CLAIM_AHEAD:
                after = self.scheduler.next_job(skip.control, job, ctas, lane)
            for turn in cutlass.range(self.tile_iterator.turns(cute.ceil_div(k_tiles, 32)), unroll=1):
                at, word = self.tile_iterator.turn(bits, turn, diagonal, k_tiles - 1)
                while word != 0:
                    bit = 31 - Int32(cute.arch.clz(word))
                    word = word & ~(Uint32(1) << Uint32(bit))
                    j, stage = at * 32 + bit, state.index
                    if const_expr(self.int8):
                        # On their way while the ring is full.
                        tile_scale, tile_norm = scales.k[batch, kv_head, j], scales.k_norms[batch, kv_head, j]
                    k_pipe.sync_object_empty.wait(stage, state.phase)
                    if lane == 0:
                        tiles.entries[stage] = self.tile_iterator.entry(partial, j, seq_k)
                        if const_expr(self.int8):
                            tiles.scales[stage] = tile_scale
                            tiles.norms[stage] = tile_norm
                    cute.arch.sync_warp()
                    k_pipe.sync_object_full.arrive(stage, None)
                    k_bar, v_bar = k_pipe.producer_get_barrier(state), v_pipe.producer_get_barrier(state)
                    cute.copy(k_atom, k_src[None, j], k_dst[None, stage], tma_bar_ptr=k_bar)
                    v_pipe.producer_acquire(state)
                    cute.copy(v_atom, v_src[None, j], v_dst[None, stage], tma_bar_ptr=v_bar)
                    state.advance()
                    left -= 1
                    if left == CLAIM_AHEAD:
                        after = self.scheduler.next_job(skip.control, job, ctas, lane)
            job = after
            ring += 1
            if ring == RING:
                ring = Int32(0)
        if lane == 0:
            jobs.words[ring, COUNT] = Int32(END)
        cute.arch.sync_warp()
        q_pipe.sync_object_empty.wait(q_state.index, q_state.phase)
        if lane == 0:
            cute.arch.mbarrier_arrive(q_pipe.producer_get_barrier(q_state))
        v_pipe.producer_tail(state)

    def partition(self, atom, shared, tiles):
        """Source and destination of a TMA copy, by tile and by stage."""
        layout = cute.make_layout(1)
        return cpasync.tma_partition(atom, 0, layout, cute.group_modes(shared, 0, 2), cute.group_modes(tiles, 0, 2))

    @cute.jit
    def consume(
        self, qk_mma, pv_mma, sq, sk, sv, pipes: Pipes, gout, lse, skip: State, masks: Masks, scales: Scales,
        jobs: Jobs, tiles: Tiles, sums, scale: Float32, seq_q: Int32, seq_k: Int32,
    ):  # fmt: skip
        """A consumer warpgroup: its rows of each job, and its part of writing the votes back."""
        q_pipe = pipes.q
        thread, _, _ = cute.arch.thread_idx()
        worker = thread - 128
        group = cute.arch.make_warp_uniform(worker // 128)
        group_start = cute.make_layout(self.groups, stride=128)(group)
        qk_part, pv_part = qk_mma.get_slice(group_start), pv_mma.get_slice(group_start)
        if const_expr(not self.fp8):
            sv = cute.make_tensor(sv.iterator, cute.select(sv.layout, mode=[1, 0, 2]))
        rq = qk_mma.make_fragment_A(qk_part.partition_A(sq))
        rk = qk_mma.make_fragment_B(qk_part.partition_B(sk))
        rv = pv_mma.make_fragment_B(pv_part.partition_B(sv))
        scores = cute.make_rmem_tensor(qk_mma.partition_shape_C((self.tile_m, self.tile_n)), self.score_dtype)
        each = 4 if self.fp8 else 2  # weights in a register
        weights_layout = cute.make_layout(
            ((each, 2, 2), 1, self.tile_n // (8 * each)), stride=((1, each, 2 * each), 0, 4 * each)
        )
        p = cute.make_rmem_tensor(weights_layout, self.v_dtype)
        out = cute.make_rmem_tensor(pv_mma.partition_shape_C((self.tile_m, self.budget.value_columns)), Float32)
        if const_expr(self.fp8):  # four at a time, so that threads next to each other are in memory too
            layout = cute.make_layout((4, self.config.head_dim // 8), stride=(1, 4 * self.budget.consumers))
            sums = cute.make_tensor(sums.iterator + 4 * worker, layout)
        top, shift, total = [cute.make_rmem_tensor(2, Float32) for _ in range(3)]
        if group == self.groups - 1:  # the first turn is the first warpgroup's
            self.mainloop.pass_turn(group)
        consumer = pipeline.PipelineUserType.Consumer
        q_state = pipeline.make_pipeline_state(consumer, 1)
        state = pipeline.make_pipeline_state(consumer, self.stages)
        ring = Int32(0)
        q_pipe.consumer_wait(q_state)
        count = cute.arch.make_warp_uniform(jobs.words[ring, COUNT])
        while count != END:
            own_row = (worker // 32) * 16 + cute.arch.lane_idx() // 4
            first_row = jobs.words[ring, Q_TILE] * self.tile_m + own_row
            limit, norm = Float32(0.0), Float32(0.0)
            if const_expr(self.config.skip):
                limit = jobs.reach[ring]
            if const_expr(self.int8):
                rows = cutlass.min(first_row // QUERY_ROWS, scales.q.shape[2] - 1)
                scale = uniform_float(scales.q[jobs.words[ring, BATCH], jobs.words[ring, HEAD], rows])
                norm = uniform_float(scales.q_norms[jobs.words[ring, BATCH], jobs.words[ring, HEAD], rows])
            state = self.mainloop.attend(
                qk_mma, pv_mma, rq, rk, rv, scores, p, sums, out, top, shift, total, pipes, q_state, state, tiles,
                jobs.kept[ring, None], count, group, masks.key_bits, jobs.words[ring, BATCH], seq_k, scale, norm, limit,
                first_row < seq_q, first_row + 8 < seq_q,
            )  # fmt: skip
            q_state.advance()
            q_tile, head, batch = jobs.words[ring, Q_TILE], jobs.words[ring, HEAD], jobs.words[ring, BATCH]
            if const_expr(self.fp8):
                if count > 0:  # or else it is 0, whatever the scales
                    kv_head = head // (gout.shape[2] // scales.v.shape[1])
                    self.mainloop.scale_channels(out, scales.v[batch, kv_head, None])
            self.mainloop.store(
                gout, lse, scales.lse_shift, out, shift, total, q_tile * self.tile_m + own_row, seq_q, head, batch
            )
            if const_expr(self.config.skip):
                done = self.last_of(jobs.words.iterator + ring * JOB_WORDS + DONE)
                if done & (jobs.call[_DENSE] == 0):
                    row, initial_row = self.rows(skip, jobs.call[_SLOT], batch, head, q_tile)
                    k_tiles = cute.ceil_div(seq_k, self.tile_n)
                    self.tile_iterator.write_back(
                        row, initial_row, skip.must_do, jobs.visited[ring, None], jobs.kept[ring, None],
                        cute.arch.lane_idx(), k_tiles, jobs.call[_FRESH] != 0,
                    )  # fmt: skip
            ring += 1
            if ring == RING:
                ring = Int32(0)
            q_pipe.consumer_wait(q_state)
            count = cute.arch.make_warp_uniform(jobs.words[ring, COUNT])
        if const_expr(self.config.skip):
            if worker == 0:
                ctas, _, _ = cute.arch.grid_dim()
                self.scheduler.end_call(
                    skip.control, jobs.call[_SLOT], gout.shape[3], seq_q, seq_k, ctas, jobs.call[_DENSE] != 0
                )

    @cute.jit
    def last_of(self, counter) -> Boolean:
        """Whether this warp is the last consumer warp to get here; the counter is 0 again then."""
        cute.arch.sync_warp()
        before = Int32(0)
        if cute.arch.lane_idx() == 0:
            before = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="cta")
        last = cute.arch.shuffle_sync(before, 0) == 4 * self.groups - 1
        cute.arch.sync_warp()  # what lane 0 acquired, all have
        if last & (cute.arch.lane_idx() == 0):
            cute.arch.atomic_exch(counter, Int32(0), sem="relaxed", scope="cta")
        return last
