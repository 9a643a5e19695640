"""The producer warp of a Hopper CTA: it lists the tiles of each job, announces it, and loads its tiles."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, Masks, Residual, Scales, State
from lite_attention.cute_kernels.jobs_sm90 import Jobs, Loads, Shared
from lite_attention.cute_kernels.mainloop_sm90 import Pipes, Tiles
from lite_attention.cute_kernels.products_sm90 import Products
from lite_attention.cute_kernels.residual_call import DENSE, FRESH, SLOT
from lite_attention.cute_kernels.tile_iterator import TileIterator, mask_rows
from lite_attention.cute_kernels.tile_scheduler import (
    BATCH,
    CLAIM_AHEAD,
    COUNT,
    END,
    HEAD,
    MASSES,
    Q_TILE,
    REST,
    RING,
    TileScheduler,
)


class Producer:
    """One warp, one job ahead of the consumers."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.tile_m, self.tile_n, self.head_dim = config.tile_m, config.tile_n, config.head_dim
        self.stages = config.budget.stages
        self.products = Products(config)
        self.scheduler = TileScheduler(config)
        self.tiles = TileIterator(config)

    @cute.jit
    def produce(
        self, loads: Loads, shared: Shared, pipes: Pipes, state: State, masks: Masks, scales: Scales,
        residual: Residual, jobs: Jobs, tiles: Tiles, scale: Float32,
    ):  # fmt: skip
        """All jobs of this CTA."""
        q_pipe, k_pipe, v_pipe = pipes
        lane = cute.arch.lane_idx()
        first, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        gq, gk, gv = loads.q.tensor, loads.k.tensor, loads.v.tensor
        seq_q, heads, batches, seq_k = gq.shape[0], gq.shape[2], gq.shape[3], gk.shape[0]
        q_tiles, k_tiles = cute.ceil_div(seq_q, self.tile_m), cute.ceil_div(seq_k, self.tile_n)
        producer = pipeline.PipelineUserType.Producer
        q_place = pipeline.make_pipeline_state(producer, 1)
        place = pipeline.make_pipeline_state(producer, self.stages)
        job, ring, job_count = Int32(first), Int32(0), q_tiles * heads * batches
        while job < job_count:
            q_tile, head, batch = job % q_tiles, job // q_tiles % heads, job // q_tiles // heads
            kv_head = head // (heads // gk.shape[2])
            # Which tiles it visits; consumers read this when Q is there.
            count = self.announce(
                state, masks, residual, jobs, ring, (q_tile, head, batch), (seq_q, seq_k), k_tiles, scale
            )
            # Q.
            q_pipe.producer_acquire(q_place)
            q_tiled = cute.local_tile(gq[None, None, head, batch], (self.tile_m, self.head_dim), (None, 0))
            q_dst, q_src = self.partition(loads.q.atom, shared.q, q_tiled)
            cute.copy(loads.q.atom, q_src[None, q_tile], q_dst, tma_bar_ptr=q_pipe.producer_get_barrier(q_place))
            q_place.advance()
            # Tiles of K and V in the order of the contract; the next job is claimed when few are left.
            k_tiled = cute.local_tile(gk[None, None, kv_head, batch], (self.tile_n, self.head_dim), (None, 0))
            v_tiled = cute.local_tile(gv[None, None, kv_head, batch], self.products.v_tile, self.products.v_tiles)
            k_dst, k_src = self.partition(loads.k.atom, shared.k, k_tiled)
            v_dst, v_src = self.partition(loads.v.atom, shared.v, v_tiled)
            bits = jobs.visited[ring, None]
            diagonal = self.tiles.diagonal(q_tile, seq_q, seq_k, k_tiles, state.control)
            left, after = count, job
            if left <= CLAIM_AHEAD:
                after = self.scheduler.next_job(state.control, job, ctas, lane)
            turns = self.tiles.turns(cute.ceil_div(k_tiles, 32))
            all_turns = turns
            if const_expr(self.config.residual):
                if jobs.call[residual_call.FULL] != 0:
                    all_turns += turns
            for turn in cutlass.range(all_turns, unroll=1):
                if const_expr(self.config.residual):  # two parts, each in that order
                    bits = jobs.visited[ring + turn // turns * RING, None]
                    turn = turn % turns
                at, word = self.tiles.turn(bits, turn, diagonal, k_tiles - 1)
                while word != 0:
                    bit = 31 - Int32(cute.arch.clz(word))
                    word = word & ~(Uint32(1) << Uint32(bit))
                    j, stage = at * 32 + bit, place.index
                    if const_expr(scales.k is not None):
                        # On their way while the ring is full.
                        tile_scale, tile_norm = scales.k[batch, kv_head, j], scales.k_norms[batch, kv_head, j]
                    k_pipe.sync_object_empty.wait(stage, place.phase)
                    if lane == 0:
                        tiles.entries[stage] = self.tiles.entry(jobs.partial, j, seq_k)
                        if const_expr(scales.k is not None):
                            tiles.scales[stage] = tile_scale
                            tiles.norms[stage] = tile_norm
                    cute.arch.sync_warp()
                    k_pipe.sync_object_full.arrive(stage, None)
                    k_bar, v_bar = k_pipe.producer_get_barrier(place), v_pipe.producer_get_barrier(place)
                    cute.copy(loads.k.atom, k_src[None, j], k_dst[None, stage], tma_bar_ptr=k_bar)
                    v_pipe.producer_acquire(place)
                    cute.copy(loads.v.atom, v_src[None, j], v_dst[None, stage], tma_bar_ptr=v_bar)
                    place.advance()
                    left -= 1
                    if left == CLAIM_AHEAD:
                        after = self.scheduler.next_job(state.control, job, ctas, lane)
            job = after
            ring += 1
            if ring == RING:
                ring = Int32(0)
        # No job is left: what consumers wait for is the barrier of Q, without a Q.
        if lane == 0:
            jobs.words[ring, COUNT] = Int32(END)
        cute.arch.sync_warp()
        q_pipe.sync_object_empty.wait(q_place.index, q_place.phase)
        if lane == 0:
            cute.arch.mbarrier_arrive(q_pipe.producer_get_barrier(q_place))
        v_pipe.producer_tail(place)

    @cute.jit
    def announce(
        self, state: State, masks: Masks, residual: Residual, jobs: Jobs, ring: Int32, place, sizes, k_tiles: Int32,
        scale: Float32,
    ):  # fmt: skip
        """List the tiles of a job at its (q-tile, head, batch element), and return how many loads these are."""
        q_tile, head, batch = place
        lane = cute.arch.lane_idx()
        slot, fresh, dense, flags = Int32(0), Boolean(True), Boolean(False), None
        if const_expr(self.config.skip):
            slot, fresh, dense = jobs.call[SLOT], jobs.call[FRESH] != 0, jobs.call[DENSE] != 0
        if const_expr(masks.tile_flags is not None):
            flags = masks.tile_flags[batch, None, None]
        bits, count, rest = jobs.visited[ring, None], Int32(0), Int32(0)
        if const_expr(self.config.residual):
            others = jobs.visited[ring + RING, None]
            count, rest = self.tiles.find_parts(
                state, jobs.call, slot, place, flags, bits, others, jobs.partial, lane, sizes, k_tiles
            )
        else:
            row, initial_row = mask_rows(state, slot, batch, head, q_tile)
            count = self.tiles.find_visited(
                row, initial_row, state.must_do, flags, bits, jobs.partial, lane, k_tiles, fresh, dense
            )
        if lane == 0:
            jobs.words[ring, Q_TILE] = q_tile
            jobs.words[ring, HEAD] = head
            jobs.words[ring, BATCH] = batch
            jobs.words[ring, COUNT] = count
            if const_expr(self.config.residual):
                jobs.words[ring, REST] = rest
                jobs.words[ring, MASSES] = Int32(residual.mass.layout((batch, head, q_tile, 0)))
            if const_expr(self.config.votes):
                jobs.score_threshold[ring] = self.scheduler.score_threshold(
                    state.threshold, state.control, slot, head, scale
                )
        cute.arch.sync_warp()
        return count + rest

    def partition(self, atom, shared, tiles):
        """Source and destination of a TMA copy, by tile and by stage."""
        layout = cute.make_layout(1)
        return cpasync.tma_partition(atom, 0, layout, cute.group_modes(shared, 0, 2), cute.group_modes(tiles, 0, 2))
