"""One q-tile in one consumer warpgroup of a Hopper GPU: scores, softmax and votes, and the weighted values.

Scores, weights and output live in registers; the weights are the A operand of the second product as they lie. The
product with V of one tile runs under the softmax of the next, and warpgroups take turns to issue their products.
"""

from __future__ import annotations

import enum
import pkgutil
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint8, const_expr
from cutlass.cute.nvgpu import warpgroup

from lite_attention.cute_kernels.config import PROMOTED_KEYS, KernelConfig
from lite_attention.cute_kernels.masses import Masses
from lite_attention.cute_kernels.ptx import max_nan
from lite_attention.cute_kernels.short_sums import ShortSums
from lite_attention.cute_kernels.softmax import Keys, Rows, Votes
from lite_attention.cute_kernels.tile_iterator import TILE_BITS

_LEAST_UNIT = 2.0**-100  # not 0: an excluded key's -inf would become NaN


class NamedBarrier(enum.IntEnum):
    """Barriers of a CTA by number; 0 is that of all threads."""

    TURN = 2  # of the first consumer warpgroup to issue products; those of the others follow


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


class Operands(NamedTuple):
    """The two tiled products, and what they read in shared memory."""

    qk: Any
    pv: Any
    q: Any
    k: Any
    v: Any


class Accumulators(NamedTuple):
    """In registers; of the output also what has been promoted, in shared memory, where its sums are short."""

    scores: Any
    weights: Any
    out: Any
    sums: Any


class Job(NamedTuple):
    """What a consumer knows of a q-tile."""

    count: Any  # of its tiles
    keys: Keys
    votes: Votes
    scale: Any  # of scores; of integer queries
    norm: Any  # of integer queries
    q_tile: Any = None  # where the masses of its tiles are summed up
    decides: Any = None  # whether they are: a word in shared memory


class Mainloop:
    """What consumer warpgroups do between the barriers of a job."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.groups = config.budget.groups
        self.softmax = pkgutil.resolve_name(config.quantization.softmax)(config)
        self.short_sums = ShortSums(config) if config.quantization.short_sums else None
        self.promoted_tiles = PROMOTED_KEYS // config.tile_n
        self.masses = Masses(config)
        # Sums of a tile's weights are known before the next tile's scores are there, but those of FP8. Before scores
        # are awaited, masses would take 2 % of the step more.
        self.early_masses = bool(config.residual) and self.short_sums is None

    @cute.jit
    def issue_qk(self, operands: Operands, scores, stage):
        """Start the product of Q and a tile of K."""
        atom = cute.make_mma_atom(operands.qk.op)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(operands.q, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, kk != 0)
            cute.gemm(atom, scores, operands.q[None, None, kk], operands.k[None, None, kk, stage], scores)
        warpgroup.commit_group()

    @cute.jit
    def issue_pv(self, operands: Operands, out, weights, stage):
        """Start the product of the weights and a tile of V."""
        atom = cute.make_mma_atom(operands.pv.op)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(weights, mode=[2])):
            atom.set(warpgroup.Field.ACCUMULATE, True)
            cute.gemm(atom, out, weights[None, None, kk], operands.v[None, None, kk, stage], out)
        warpgroup.commit_group()

    @cute.jit
    def of_tile(self, job: Job, tiles: Tiles, stage):
        """What makes log2 units of the scores of a tile, and what none exceeds then; of use for integers."""
        unit, bound = job.scale, job.norm
        if const_expr(self.config.quantization.scores is not None):
            unit, bound = max_nan(job.scale * tiles.scales[stage], _LEAST_UNIT), job.norm * tiles.norms[stage]
        return unit, bound

    @cute.jit
    def wait_turn(self, group):
        """Wait until the warpgroup before has issued its products."""
        cute.arch.barrier(barrier_id=NamedBarrier.TURN + group, number_of_threads=256)

    @cute.jit
    def pass_turn(self, group):
        """The barrier of a warpgroup opens when the 128 threads of the one before it have arrived."""
        cute.arch.barrier_arrive(barrier_id=NamedBarrier.TURN + (group + 1) % self.groups, number_of_threads=256)

    @cute.jit
    def attend(
        self, operands: Operands, acc: Accumulators, rows: Rows, pipes: Pipes, tiles: Tiles, q_state, state, group,
        job: Job,
    ):  # fmt: skip
        """Sums of the weighted values of this warpgroup's rows, not yet divided, and its votes."""
        sums_shift = cute.make_rmem_tensor(2, Float32)
        self.begin(acc, rows, sums_shift)
        return self.visit(operands, acc, rows, sums_shift, pipes, tiles, q_state, state, group, job, Boolean(True))

    @cute.jit
    def begin(self, acc: Accumulators, rows: Rows, sums_shift):
        """Begin with nothing."""
        acc.out.fill(0.0)
        rows.row_max.fill(-Float32.inf)
        rows.row_shift.fill(-1e30)
        rows.rescale.fill(1.0)
        rows.row_sum.fill(0.0)
        if const_expr(self.short_sums is not None):
            self.short_sums.clear(acc.sums, sums_shift)

    @cute.jit
    def visit(
        self, operands: Operands, acc: Accumulators, rows: Rows, sums_shift, pipes: Pipes, tiles: Tiles, q_state, state,
        group, job: Job, is_last: Boolean,
    ):  # fmt: skip
        """Add `job.count` tiles to the sums; Q is released after the last of a q-tile."""
        scores, weights, out, sums = acc
        keys, votes, tile_n = job.keys, job.votes, self.config.tile_n
        words = cute.recast_tensor(cute.make_tensor(weights.iterator, cute.make_layout(tile_n // 2)), Int32)
        last_tile = Int32(0)  # whose weights are not in all sums yet
        # The first tile: scores and weights.
        if job.count > 0:
            pipes.k.consumer_wait(state)
            entry = cute.arch.make_warp_uniform(tiles.entries[state.index])
            unit, bound = self.of_tile(job, tiles, state.index)
            j, partial = entry & TILE_BITS, entry > TILE_BITS
            if const_expr(self.config.votes):
                votes.kept[j] = Uint8(1)  # it always is
            self.issue_qk(operands, scores, state.index)
            warpgroup.wait_group(0)
            pipes.k.consumer_release(state)
            unit = self.softmax.prepare(scores, unit, partial, j * tile_n, keys)
            moved, _, slope = self.softmax.step(scores, rows, unit, bound, partial, votes)
            self.softmax.convert(scores, words, rows, slope)
            if const_expr(self.config.residual):
                self.softmax.rescale_output(out, rows, moved)  # there may have been tiles before
                self.weigh_masses(rows, job, moved)
                last_tile = j
            # The others, each with the values of the one before.
            for n in cutlass.range(1, job.count, unroll=1):
                before = state.clone()
                state.advance()
                pipes.k.consumer_wait(state)
                entry = cute.arch.make_warp_uniform(tiles.entries[state.index])
                unit, bound = self.of_tile(job, tiles, state.index)
                self.softmax.add_up(words, rows)
                # In turn, both products; the tensor cores are the next warpgroup's then.
                self.wait_turn(group)
                self.issue_qk(operands, scores, state.index)
                pipes.v.consumer_wait(before)
                self.issue_pv(operands, out, weights, before.index)
                self.pass_turn(group)
                # Scores are there first: softmax and vote, while the product with V runs.
                warpgroup.wait_group(1)
                pipes.k.consumer_release(state)
                if const_expr(self.early_masses):
                    self.add_mass(rows, job, last_tile, n - 1)
                j, partial = entry & TILE_BITS, entry > TILE_BITS
                unit = self.softmax.prepare(scores, unit, partial, j * tile_n, keys)
                moved, keep, slope = self.softmax.step(scores, rows, unit, bound, partial, votes)
                if const_expr(self.config.residual):
                    self.weigh_masses(rows, job, moved)
                # The product with V is done: its operand and its sums are free to change.
                warpgroup.wait_group(0)
                pipes.v.consumer_release(before)
                self.softmax.convert(scores, words, rows, slope)
                if const_expr(self.short_sums is not None):
                    self.short_sums.take_row_sums(out, rows)
                    if const_expr(self.config.residual):
                        self.add_mass(rows, job, last_tile, n - 1)
                    if n % self.promoted_tiles == 0:
                        self.short_sums.promote(sums, sums_shift, out, rows)
                        moved = Boolean(True)
                self.softmax.rescale_output(out, rows, moved)
                if const_expr(self.config.votes):
                    if keep:
                        votes.kept[j] = Uint8(1)
                if const_expr(self.config.residual):
                    last_tile = j
        # Q is free. Lane 0 releases for all: none may still be busy with the job before, whose place in the ring goes
        # with it.
        if is_last:
            cute.arch.sync_warp()
            pipes.q.consumer_release(q_state)
        # The values of the last tile.
        if job.count > 0:
            pipes.v.consumer_wait(state)
            self.softmax.add_up(words, rows)
            self.issue_pv(operands, out, weights, state.index)
            warpgroup.wait_group(0)
            pipes.v.consumer_release(state)
            if const_expr(self.short_sums is not None):
                rows.rescale.fill(1.0)
                self.short_sums.take_row_sums(out, rows)
                self.short_sums.take(sums, sums_shift, out, rows)
            if const_expr(self.config.residual):
                self.add_mass(rows, job, last_tile, job.count - 1)
                if job.decides[0] != 0:
                    self.masses.write(job.q_tile)
            state.advance()
        return state

    @cute.jit
    def weigh_masses(self, rows: Rows, job: Job, moved: Boolean):
        """Let masses heed that shifts have moved."""
        if moved:
            if job.decides[0] != 0:
                self.masses.weigh(rows, job.q_tile.references)

    @cute.jit
    def add_mass(self, rows: Rows, job: Job, tile: Int32, n: Int32):
        """Add what the n-th tile has, where that is asked for."""
        if job.decides[0] != 0:
            self.masses.add(rows, job.q_tile, tile, n)
