"""The tiles of a q-tile in two parts, as the residual wants them: what is kept, or a sample, and the others."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, Residual, Scales
from lite_attention.cute_kernels.mainloop_portable import Job, Mainloop, Sources
from lite_attention.cute_kernels.products_portable import Accumulators, Operands
from lite_attention.cute_kernels.storage_portable import COUNT, DECIDES, MASSES, Shared
from lite_attention.cute_kernels.store_portable import Outputs, Store


class Parts:
    """What a CTA does with a residual between the list of tiles and the epilogue."""

    def __init__(self, config: KernelConfig) -> None:
        self.budget, self.mainloop, self.store = config.budget, Mainloop(config), Store(config)
        self.masses = self.mainloop.masses

    @cute.jit
    def attend(
        self, operands: Operands, acc: Accumulators, blocks, sources: Sources, shared: Shared, job: Job,
        outputs: Outputs, scales: Scales, residual: Residual,
    ):  # fmt: skip
        """Attend to the kept tiles, store that where the output goes, and then to the others; or to a sample first,
        which tells how to weigh rows, and then to all."""
        call = shared.call
        self.prepare(shared, job.seq_q, scales, residual)
        start, decides = (cute.make_tensor(call.iterator + word, cute.make_layout(1)) for word in (MASSES, DECIDES))
        q_tile = self.masses.of_q_tile(residual.mass, shared.references, start, shared.summed)
        job = job._replace(q_tile=q_tile, decides=decides)
        ahead = self.mainloop.begin(acc, blocks, sources, shared, job)
        # Sparse steps have the last part alone.
        first = 1 - cute.arch.make_warp_uniform(call[residual_call.FULL])
        done = Int32(0)
        for part in cutlass.range(first, 2, unroll=1):
            end = cute.arch.make_warp_uniform(call[COUNT])
            if part > first:
                end = job.count
            self.mainloop.visit(operands, acc, blocks, sources, shared, job, ahead, done, end)
            done = end
            if part == 0:
                if call[residual_call.SAMPLES] != 0:
                    self.take_sample(acc, blocks, shared, job.seq_q)
                elif call[residual_call.MASKED] != 0:
                    self.store.store_kept(outputs, acc, blocks, scales, shared, job.seq_q)
        self.mainloop.end(acc, blocks)

    @cute.jit
    def prepare(self, shared: Shared, seq_q: Int32, scales: Scales, residual: Residual):
        """Ask early for what a sparse step will add, and take the references of one that decides."""
        call, place = shared.call, self.store.place(shared)
        for b in cutlass.range_constexpr(self.budget.blocks):
            first_row, references = self.store.first_row(place, b), self.masses.of_block(shared.references, b)
            if call[residual_call.FULL] == 0:
                self.store.residual_epilogue.prefetch(residual, call, place.batch, place.head, first_row, seq_q)
            if (call[residual_call.DECIDES] != 0) & (call[residual_call.SAMPLES] == 0):
                self.masses.begin(
                    references, residual, scales, call[residual_call.SLOT], place.batch, place.head, first_row, seq_q
                )

    @cute.jit
    def take_sample(self, acc: Accumulators, blocks, shared: Shared, seq_q: Int32):
        """Take the references from a sample, and begin anew: now masses count."""
        cute.arch.sync_threads()  # all are through with the sample, whose masses do not
        shared.call[DECIDES] = Int32(1)
        place = self.store.place(shared)
        for b in cutlass.range_constexpr(self.budget.blocks):
            references = self.masses.of_block(shared.references, b)
            self.masses.take_sample(references, blocks[b].rows, self.store.first_row(place, b), seq_q)
        self.mainloop.clear(acc, blocks)
