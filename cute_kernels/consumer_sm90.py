"""A consumer warpgroup of a Hopper CTA: its rows of each job, and its part of writing the votes back."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Float32, Int32, const_expr

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, Masks, Residual, Scales, State
from lite_attention.cute_kernels.epilogue import Epilogue
from lite_attention.cute_kernels.jobs_sm90 import Jobs, Outputs, Shared
from lite_attention.cute_kernels.mainloop_sm90 import Accumulators, Job, Mainloop, Operands, Pipes, Tiles
from lite_attention.cute_kernels.products_sm90 import Products
from lite_attention.cute_kernels.ptx import uniform_float
from lite_attention.cute_kernels.residual_call import DENSE, FRESH, SLOT
from lite_attention.cute_kernels.residual_epilogue import ResidualEpilogue
from lite_attention.cute_kernels.softmax import Keys, Rows, Votes
from lite_attention.cute_kernels.tile_iterator import TileIterator, mask_rows
from lite_attention.cute_kernels.tile_scheduler import (
    BATCH,
    COUNT,
    DONE,
    END,
    HEAD,
    JOB_WORDS,
    MASSES,
    Q_TILE,
    REST,
    RING,
    TileScheduler,
)
from lite_attention.ops.quantize import QUERY_ROWS


class Consumer:
    """64 rows of each q-tile."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.groups = config, config.budget.groups
        self.products = Products(config)
        self.mainloop = Mainloop(config)
        self.epilogue = Epilogue(config)
        self.residual_epilogue = ResidualEpilogue(config) if config.residual else None
        self.scheduler = TileScheduler(config)
        self.tiles = TileIterator(config)

    @cute.jit
    def consume(
        self, products, shared: Shared, pipes: Pipes, outputs: Outputs, state: State, masks: Masks, scales: Scales,
        residual: Residual, jobs: Jobs, tiles: Tiles, scale: Float32, sizes,
    ):  # fmt: skip
        """All jobs of this CTA; products: of queries and keys, and with values; sizes: queries and keys."""
        seq_q, seq_k = sizes
        gout, lse = outputs
        thread, _, _ = cute.arch.thread_idx()
        worker = thread - 128
        group = cute.arch.make_warp_uniform(worker // 128)
        operands, acc, rows = self.registers(*products, shared, worker, group)
        if group == self.groups - 1:  # the first turn is the first warpgroup's
            self.mainloop.pass_turn(group)
        consumer = pipeline.PipelineUserType.Consumer
        q_place = pipeline.make_pipeline_state(consumer, 1)
        place = pipeline.make_pipeline_state(consumer, self.config.budget.stages)
        ring = Int32(0)
        pipes.q.consumer_wait(q_place)
        count = cute.arch.make_warp_uniform(jobs.words[ring, COUNT])
        while count != END:
            # What this thread has to know of the job.
            own_row = (worker // 32) * 16 + cute.arch.lane_idx() // 4
            first_row = jobs.words[ring, Q_TILE] * self.config.tile_m + own_row
            score_threshold, norm = Float32(0.0), Float32(0.0)
            if const_expr(self.config.votes):
                score_threshold = jobs.score_threshold[ring]
            if const_expr(scales.q is not None):
                sixteen = cutlass.min(first_row // QUERY_ROWS, scales.q.shape[2] - 1)
                scale = uniform_float(scales.q[jobs.words[ring, BATCH], jobs.words[ring, HEAD], sixteen])
                norm = uniform_float(scales.q_norms[jobs.words[ring, BATCH], jobs.words[ring, HEAD], sixteen])
            keys = Keys(seq_k, masks.key_bits, jobs.words[ring, BATCH])
            votes = Votes(jobs.kept[ring, None], score_threshold, first_row < seq_q, first_row + 8 < seq_q)
            # Attend, and store while the producer loads the next job.
            job = Job(count, keys, votes, scale, norm)
            if const_expr(self.config.residual):
                place = self.attend_in_parts(
                    operands, acc, rows, pipes, tiles, q_place, place, group, job, outputs, scales, residual, jobs,
                    ring, first_row, seq_q,
                )  # fmt: skip
            else:
                place = self.mainloop.attend(operands, acc, rows, pipes, tiles, q_place, place, group, job)
            q_place.advance()
            q_tile, head, batch = jobs.words[ring, Q_TILE], jobs.words[ring, HEAD], jobs.words[ring, BATCH]
            if const_expr(scales.v is not None):
                if const_expr(self.config.residual):
                    count += jobs.words[ring, REST]
                self.epilogue.scale_channels(acc.out, scales.v, gout.shape[2], head, batch, count)
            first_row = q_tile * self.config.tile_m + own_row
            if const_expr(self.config.residual):
                self.residual_epilogue.store(
                    gout, lse, scales.lse_shift, acc.out, rows, residual, jobs.call, first_row, seq_q, head, batch
                )
            else:
                self.epilogue.store(gout, lse, scales.lse_shift, acc.out, rows, first_row, seq_q, head, batch)
            # The last warp to get here writes the votes back.
            if const_expr(self.config.votes):
                done = self.last_of(jobs.words.iterator + ring * JOB_WORDS + DONE)
                if done & (jobs.call[DENSE] == 0):
                    row, initial_row = mask_rows(state, jobs.call[SLOT], batch, head, q_tile)
                    k_tiles = cute.ceil_div(seq_k, self.config.tile_n)
                    self.tiles.write_back(
                        row, initial_row, state.must_do, jobs.visited[ring, None], jobs.kept[ring, None],
                        cute.arch.lane_idx(), k_tiles, jobs.call[FRESH] != 0,
                    )  # fmt: skip
            ring += 1
            if ring == RING:
                ring = Int32(0)
            pipes.q.consumer_wait(q_place)
            count = cute.arch.make_warp_uniform(jobs.words[ring, COUNT])
        if const_expr(self.config.skip):
            if worker == 0:
                ctas, _, _ = cute.arch.grid_dim()
                left = (residual, jobs.call) if const_expr(self.config.residual) else ()
                self.scheduler.end_call(
                    state.control, jobs.call[SLOT], gout.shape[3], seq_q, seq_k, ctas, jobs.call[DENSE] != 0, *left
                )

    @cute.jit
    def attend_in_parts(
        self, operands, acc: Accumulators, rows: Rows, pipes: Pipes, tiles: Tiles, q_place, place, group, job: Job,
        outputs: Outputs, scales: Scales, residual: Residual, jobs: Jobs, ring: Int32, first_row: Int32, seq_q: Int32,
    ):  # fmt: skip
        """Attend to the kept tiles, store that where the output goes, and then to the others; or to a sample first,
        which tells how to weigh rows, and then to all."""
        words, call = jobs.words[ring, None], jobs.call
        sums_shift = cute.make_rmem_tensor(2, Float32)
        start = cute.make_tensor(words.iterator + MASSES, cute.make_layout(1))
        q_tile = self.mainloop.masses.of_q_tile(residual.mass, jobs.references, start)
        self.mainloop.begin(acc, rows, sums_shift)
        if call[residual_call.FULL] == 0:
            self.residual_epilogue.prefetch(residual, call, words[BATCH], words[HEAD], first_row, seq_q)
        if (call[residual_call.DECIDES] != 0) & (call[residual_call.SAMPLES] == 0):
            self.mainloop.masses.begin(
                jobs.references, residual, scales, call[SLOT], words[BATCH], words[HEAD], first_row, seq_q
            )
        # Sparse steps have the last part alone. The first part of a step that takes a sample adds no masses.
        for part in cutlass.range(1 - call[residual_call.FULL], 2, unroll=1):
            is_last, count = part == 1, words[COUNT]
            if part > 1 - call[residual_call.FULL]:
                count = words[REST]
            decides = cute.make_tensor(
                call.iterator + residual_call.DECIDES + (1 - part) * call[residual_call.SAMPLES], cute.make_layout(1)
            )
            of_part = Job(count, job.keys, job.votes, job.scale, job.norm, q_tile, decides)
            place = self.mainloop.visit(
                operands, acc, rows, sums_shift, pipes, tiles, q_place, place, group, of_part, is_last
            )
            if not is_last:
                if call[residual_call.SAMPLES] != 0:
                    self.mainloop.masses.take_sample(jobs.references, rows, first_row, seq_q)
                    self.mainloop.begin(acc, rows, sums_shift)
                elif call[residual_call.MASKED] != 0:
                    self.store_kept(acc, rows, sums_shift, outputs, scales, words, first_row, seq_q)
        return place

    @cute.jit
    def store_kept(
        self, acc: Accumulators, rows: Rows, sums_shift, outputs: Outputs, scales: Scales, words, first_row: Int32,
        seq_q: Int32,
    ):  # fmt: skip
        """Store what the kept tiles give by themselves where the output goes."""
        head, batch = words[HEAD], words[BATCH]
        if const_expr(scales.v is not None):
            self.mainloop.short_sums.put_back(acc.sums, acc.out)
            self.epilogue.scale_channels(acc.out, scales.v, outputs.out.shape[2], head, batch, words[COUNT])
        self.residual_epilogue.store_kept(
            outputs.out, outputs.lse, scales.lse_shift, acc.out, rows, first_row, seq_q, head, batch
        )
        if const_expr(scales.v is not None):
            acc.out.fill(0.0)  # it is in shared memory as it was, and goes on there
            if words[REST] == 0:
                self.mainloop.short_sums.take(acc.sums, sums_shift, acc.out, rows)

    def registers(self, qk_mma, pv_mma, shared: Shared, worker, group):
        """What the products of this warpgroup read and write, and the state of its rows."""
        budget = self.config.budget
        group_start = cute.make_layout(self.groups, stride=128)(group)
        qk_part, pv_part = qk_mma.get_slice(group_start), pv_mma.get_slice(group_start)
        operands = Operands(
            qk_mma, pv_mma, qk_mma.make_fragment_A(qk_part.partition_A(shared.q)),
            qk_mma.make_fragment_B(qk_part.partition_B(shared.k)),
            pv_mma.make_fragment_B(pv_part.partition_B(self.products.operand_b(shared.v))),
        )  # fmt: skip
        scores_shape = qk_mma.partition_shape_C((self.config.tile_m, self.config.tile_n))
        scores = cute.make_rmem_tensor(scores_shape, self.products.score_dtype)
        weights = self.products.weights()
        out = cute.make_rmem_tensor(pv_mma.partition_shape_C((self.config.tile_m, budget.value_columns)), Float32)
        sums = shared.sums
        if const_expr(budget.promoted_sums):
            # Four at a time, so that threads next to each other are in memory too.
            layout = cute.make_layout((4, self.config.head_dim // 8), stride=(1, 4 * budget.consumers))
            sums = cute.make_tensor(sums.iterator + 4 * worker, layout)
        floats = [cute.make_rmem_tensor(2, Float32) for _ in range(4)]
        integers = [cute.make_rmem_tensor(2, Int32) for _ in range(2)]
        more = []
        if const_expr(self.config.residual):
            more = [cute.make_rmem_tensor(2, Float32)]
        return operands, Accumulators(scores, weights, out, sums), Rows(*floats, *integers, *more)

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
