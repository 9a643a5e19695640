"""Who computes what: the call as its control tensor tells it, and the order in which CTAs take up q-tiles."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.ops import control as c

# A job in shared memory: one q-tile of one head, as the producer warp announces it to the consumers.
RING = 3  # jobs: one being written back, one being computed, one being listed
Q_TILE, HEAD, BATCH, COUNT, DONE = range(5)
REST, MASSES = 5, 6  # with the residual: tiles after those that are kept, and where its masses begin
JOB_WORDS = 8
END = -1  # in place of a count: no job is left
CLAIM_AHEAD = 4  # tiles: a job is claimed so late that CTAs finish together, and so early that nobody waits for it


class TileScheduler:
    """Jobs are numbered by q-tile, then head, then batch element: those of one head run together and share K and V.

    With a state, a CTA claims the next job when it is almost through with the last one, so uneven rows balance; without
    one all jobs are alike, and job n + CTAs follows job n.
    """

    def __init__(self, config: KernelConfig) -> None:
        self.config = config

    def block(self, slot: Int32) -> Int32:
        """First word of a slot in the control tensor."""
        return slot * c.SLOT_WORDS + c.slot_word(0, 0)

    @cute.jit
    def is_fresh(self, control, block: Int32, batch: Int32, seq_q: Int32, seq_k: Int32) -> Boolean:
        """Whether this call starts from the initial mask."""
        step, refresh = control[block + c.STEP], control[c.REFRESH]
        fresh = (step == 0) | (control[block + c.FRESH] != 0)
        fresh = fresh | (control[block + c.BATCH] != batch)
        fresh = fresh | (control[block + c.SEQ_Q] != seq_q) | (control[block + c.SEQ_K] != seq_k)
        if refresh > 0:
            fresh = fresh | (step % refresh == 0)
        return fresh

    @cute.jit
    def score_threshold(self, threshold, control, slot: Int32, head: Int32, scale: Float32) -> Float32:
        """The threshold of a head at this step, in units of row maxima; NaN where nothing may be skipped."""
        step = control[self.block(slot) + c.STEP]
        limit = threshold[
            cutlass.min(slot, threshold.shape[0] - 1),
            cutlass.max(cutlass.min(step, threshold.shape[1] - 1), 0),
            cutlass.min(head, threshold.shape[2] - 1),
        ]
        in_units = limit if const_expr(self.config.quantization.scores is not None) else limit / scale
        if limit == -Float32.inf:
            in_units = Float32.nan  # compares false
        return in_units

    @cute.jit
    def next_job(self, control, job: Int32, ctas: Int32, lane: Int32) -> Int32:
        """One warp: the job after this one."""
        after = job + ctas
        if const_expr(self.config.skip):
            taken = Int32(0)
            if lane == 0:
                taken = cute.arch.atomic_add(control.iterator + c.JOBS, Int32(1), sem="relaxed", scope="gpu")
            after = ctas + cute.arch.shuffle_sync(taken, 0)
        return after

    @cute.jit
    def end_call(
        self, control, slot: Int32, batch: Int32, seq_q: Int32, seq_k: Int32, ctas: Int32, dense: Boolean,
        residual=None, call=None,
    ):  # fmt: skip
        """One thread of each CTA, which will read the control tensor no more: the last one moves the step, and counts
        residuals and masks."""
        cute.arch.fence_acq_rel_gpu()
        ticket = cute.arch.atomic_add(control.iterator + c.TICKETS, Int32(1), sem="acq_rel", scope="gpu")
        if ticket == ctas - 1:
            if not dense:
                block = self.block(slot)
                step = control[block + c.STEP]
                if const_expr(residual is not None):
                    residual_call.end(control, residual, call, block, step)
                if (control[c.FLAGS] & c.FLAG_AUTO_STEP) != 0:
                    step += 1
                    steps = control[c.NUM_STEPS]
                    if (steps > 0) & (step >= steps):
                        step = Int32(0)
                control[block + c.STEP] = step
                control[block + c.FRESH] = Int32(0)
                control[block + c.BATCH] = batch
                control[block + c.SEQ_Q] = seq_q
                control[block + c.SEQ_K] = seq_k
            control[c.JOBS] = Int32(0)
            control[c.TICKETS] = Int32(0)
