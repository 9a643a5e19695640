"""Skip-aware attention forward from mma.sync, ldmatrix and cp.async: for every GPU of NVIDIA from Ampere on.

A CTA has one q-tile of one head. The GPU starts CTAs as others end, so uneven rows balance by themselves. The first
warp lists the tiles while the queries are on their way; then all warps load and compute.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Boolean, Float32, Int32, const_expr

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, Masks, Residual, Scales, State
from lite_attention.cute_kernels.mainloop_portable import Block, Job, Mainloop, Sources
from lite_attention.cute_kernels.products_portable import Layouts, Products
from lite_attention.cute_kernels.ptx import uniform_float
from lite_attention.cute_kernels.residual_call import DENSE, FRESH, SLOT
from lite_attention.cute_kernels.residual_portable import Parts
from lite_attention.cute_kernels.softmax import Keys, Rows
from lite_attention.cute_kernels.storage_portable import (
    BATCH,
    COUNT,
    DECIDES,
    DIAGONAL,
    HEAD,
    MASSES,
    Q_TILE,
    REST,
    Shared,
    storage_of,
    views,
)
from lite_attention.cute_kernels.store_portable import Outputs, Place, Store
from lite_attention.cute_kernels.tile_iterator import mask_rows
from lite_attention.cute_kernels.tile_scheduler import TileScheduler
from lite_attention.cute_kernels.tile_walk_portable import TileWalk
from lite_attention.ops import control as c
from lite_attention.ops.quantize import QUERY_ROWS


class PortableAttentionForward:
    """Builds one kernel; called through `cute.compile`."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.products, self.mainloop = Products(config), Mainloop(config)
        self.scheduler, self.walk = TileScheduler(config), TileWalk(config)
        self.store = Store(config)
        self.parts = Parts(config) if config.residual else None

    @cute.jit
    def __call__(
        self, q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, out: cute.Tensor, lse: cute.Tensor, state: State,
        masks: Masks, scales: Scales, residual: Residual, scale: Float32, processors: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        """Lay out and launch. The scale is in log2 units, unused in INT8. The GPU itself has CTAs wait for
        processors."""
        q, k, v, out = self.products.as_tiled(q, k, v, out)
        layouts = self.products.layouts()
        self.storage = storage_of(self.config, layouts)
        jobs = cute.ceil_div(q.shape[0], self.config.tile_m) * q.shape[2] * q.shape[3]
        self.kernel(*self.products.tiled(), q, k, v, out, lse, state, masks, scales, residual, scale, layouts).launch(
            grid=[jobs, 1, 1],
            block=[self.budget.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.budget.ctas,
            preferred_smem_carveout=100,  # percent; without it the DSL asks a device as soon as two CTAs are to fit
        )

    @cute.kernel
    def kernel(
        self, qk_mma: cute.TiledMma, pv_mma: cute.TiledMma, gq: cute.Tensor, gk: cute.Tensor, gv: cute.Tensor,
        gout: cute.Tensor, lse: cute.Tensor, state: State, masks: Masks, scales: Scales,
        residual: Residual, scale: Float32, layouts: Layouts,
    ):  # fmt: skip
        """One q-tile."""
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        allocator = cutlass.memory.SmemAllocator()
        shared = views(self.config, *(allocator.allocate(struct) for struct in self.storage), layouts)
        place, sizes = self.place(gq, gk), (gq.shape[0], gk.shape[0])
        sources = self.begin_copies(gq, gk, gv, shared, place, thread)
        if warp == 0:
            self.list_tiles(state, masks, residual, shared, place, (*sizes, gq.shape[3]), scale)
        cute.arch.sync_threads()

        operands = self.products.operands(qk_mma, pv_mma, shared.q, shared.k, shared.v, thread)
        acc = self.products.accumulators()
        blocks = [self.block(b, scales, place, scale) for b in range(self.budget.blocks)]
        job, outputs = self.job(shared, masks, scales, place, sizes), Outputs(gout, lse)
        if const_expr(self.config.residual):
            self.parts.attend(operands, acc, blocks, sources, shared, job, outputs, scales, residual)
        else:
            self.mainloop.attend(operands, acc, blocks, sources, shared, job)
        self.store.store(outputs, acc, blocks, scales, residual, shared, sizes[0])
        if const_expr(self.config.skip):
            cute.arch.sync_threads()
            if warp == 0:
                self.end(state, residual, shared, (*sizes, gq.shape[3]))

    def place(self, gq, gk) -> Place:
        """Of this CTA: q-tiles of a head follow each other, and share K and V."""
        job, _, _ = cute.arch.block_idx()
        q_tiles, heads = cute.ceil_div(gq.shape[0], self.config.tile_m), gq.shape[2]
        head = job // q_tiles % heads
        return Place(job % q_tiles, head, job // q_tiles // heads, head // (heads // gk.shape[2]))

    def begin_copies(self, gq, gk, gv, shared: Shared, place: Place, thread) -> Sources:
        """Start to load the queries, and say what is to be loaded of K and V."""
        loop = self.mainloop
        parts = ((loop.copy_q, gq, place.head), (loop.copy_k, gk, place.kv_head), (loop.copy_v, gv, place.kv_head))
        q, k, v = (copy.source(x[None, None, head, place.batch], thread) for copy, x, head in parts)
        # One register for all, where rows are as wide: only what is added to it differs.
        first = Int32(shared.q.iterator.toint())
        offset = loop.copy_q.hold(first + loop.copy_q.offset(thread))
        v_offset = offset
        if loop.copy_v.row_bytes != loop.copy_q.row_bytes:
            v_offset = loop.copy_v.hold(first + loop.copy_v.offset(thread))
        loop.copy_q.start(q, offset, place.q_tile)
        k_bytes = self.budget.stages * loop.copy_k.bytes
        return Sources(k, v, offset + loop.copy_q.bytes, v_offset + loop.copy_q.bytes + k_bytes)

    @cute.jit
    def list_tiles(
        self, state: State, masks: Masks, residual: Residual, shared: Shared, place: Place, sizes, scale: Float32
    ):  # fmt: skip
        """The first warp: read what the call is, and find the tiles to visit."""
        seq_q, seq_k, batches = sizes
        lane, k_tiles = cute.arch.lane_idx(), cute.ceil_div(seq_k, self.config.tile_n)
        slot, fresh, dense, flags = Int32(0), Boolean(True), Boolean(False), None
        if const_expr(self.config.skip):
            slot = state.control[c.SLOT]
            fresh = self.scheduler.is_fresh(state.control, self.scheduler.block(slot), batches, seq_q, seq_k)
            dense = (state.control[c.FLAGS] & c.FLAG_DENSE) != 0
        if const_expr(masks.tile_flags is not None):
            flags = masks.tile_flags[place.batch, None, None]
        if lane == 0:
            shared.call[SLOT], shared.call[FRESH], shared.call[DENSE] = slot, Int32(fresh), Int32(dense)
            if const_expr(self.config.residual):
                block = self.scheduler.block(slot)
                residual_call.begin(state.control, residual, shared.call, block, slot, fresh, dense)
        rest = Int32(0)
        if const_expr(self.config.residual):
            cute.arch.sync_warp()
            parts = (shared.visited[None, part] for part in range(2))
            count, rest = self.walk.find_parts(
                state, shared.call, slot, place[:3], flags, *parts, shared.partial, lane, (seq_q, seq_k), k_tiles
            )
        else:
            row, initial_row = mask_rows(state, slot, place.batch, place.head, place.q_tile)
            count = self.walk.find_visited(
                row, initial_row, state.must_do, flags, shared.visited, shared.partial, lane, k_tiles, fresh, dense
            )
        if const_expr(self.config.votes):
            for at in cutlass.range(lane, cute.ceil_div(k_tiles, 32), 32, unroll=1):
                shared.kept[at] = Int32(0)
        if lane == 0:
            shared.call[COUNT], shared.call[REST] = count, rest
            shared.call[Q_TILE], shared.call[HEAD], shared.call[BATCH], _ = place
            shared.call[DIAGONAL] = self.walk.diagonal(place.q_tile, seq_q, seq_k, k_tiles, state.control)
            if const_expr(self.config.residual):
                samples = shared.call[residual_call.SAMPLES]
                shared.call[DECIDES] = shared.call[residual_call.DECIDES] * (1 - samples)
                shared.call[MASSES] = Int32(residual.mass.layout((place.batch, place.head, place.q_tile, 0)))
            if const_expr(self.config.votes):
                shared.score_threshold[0] = self.scheduler.score_threshold(
                    state.threshold, state.control, slot, place.head, scale
                )

    def job(self, shared: Shared, masks: Masks, scales: Scales, place: Place, sizes) -> Job:
        """What all threads know of it."""
        seq_q, seq_k = sizes
        k_scales, k_norms = None, None
        if scales.k is not None:
            k_scales, k_norms = (x[place.batch, place.kv_head, None] for x in (scales.k, scales.k_norms))
        count = shared.call[COUNT]
        if self.config.residual:
            count += shared.call[REST]
        count = cute.arch.make_warp_uniform(count)
        return Job(count, seq_q, Keys(seq_k, masks.key_bits, place.batch), k_scales, k_norms)

    def block(self, b: int, scales: Scales, place: Place, scale) -> Block:
        """Registers of a block of rows."""
        rows = Rows(*[cute.make_rmem_tensor(2, dtype) for dtype in 4 * [Float32] + 2 * [Int32]])
        if self.config.residual:
            rows = rows._replace(tile_sum=cute.make_rmem_tensor(2, Float32))
        sums, sums_shift, norm = None, None, Float32(0.0)
        first_row = self.store.first_row(place, b)
        if self.budget.promoted_columns:
            layout = cute.make_layout((4, self.budget.promoted_columns // 8))
            sums, sums_shift = cute.make_rmem_tensor(layout, Float32), cute.make_rmem_tensor(2, Float32)
        if scales.q is not None:
            sixteen = cutlass.min(first_row // QUERY_ROWS, scales.q.shape[2] - 1)
            scale, norm = (uniform_float(x[place.batch, place.head, sixteen]) for x in (scales.q, scales.q_norms))
        return Block(rows, sums, sums_shift, scale, norm, first_row)

    @cute.jit
    def end(self, state: State, residual: Residual, shared: Shared, sizes):
        """The first warp: write the votes back, and move the step."""
        seq_q, seq_k, batches = sizes
        ctas, _, _ = cute.arch.grid_dim()
        lane, slot, dense = cute.arch.lane_idx(), shared.call[SLOT], shared.call[DENSE] != 0
        if const_expr(self.config.votes):
            self.write_back(state, shared, slot, dense, seq_k)
        if lane == 0:
            left = (residual, shared.call) if const_expr(self.config.residual) else ()
            self.scheduler.end_call(state.control, slot, batches, seq_q, seq_k, ctas, dense, *left)

    @cute.jit
    def write_back(self, state: State, shared: Shared, slot: Int32, dense: Boolean, seq_k: Int32):
        """The first warp: write the votes back."""
        if ~dense:
            q_tile, head, batch, _ = self.store.place(shared)
            row, initial_row = mask_rows(state, slot, batch, head, q_tile)
            self.walk.write_back_bits(
                row, initial_row, state.must_do, shared.visited, shared.kept, cute.arch.lane_idx(),
                cute.ceil_div(seq_k, self.config.tile_n), shared.call[FRESH] != 0,
            )  # fmt: skip
