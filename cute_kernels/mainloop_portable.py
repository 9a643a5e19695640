"""One q-tile in the warps of a CTA: tiles of K and V a tile ahead, scores, softmax and votes, and weighted values.

With two stages the whole next tile is on its way while one is computed, and there is one barrier a tile. With one, V
comes under the first product and the next K under the second, as in FlashAttention-2, and there are two.
"""

from __future__ import annotations

import pkgutil
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from lite_attention.cute_kernels.budget_portable import BLOCK_ROWS
from lite_attention.cute_kernels.config import PROMOTED_KEYS, KernelConfig
from lite_attention.cute_kernels.copies_portable import Source, TileCopy
from lite_attention.cute_kernels.masses import Masses, QTile
from lite_attention.cute_kernels.products_portable import Accumulators, Operands, Products
from lite_attention.cute_kernels.ptx import max_nan
from lite_attention.cute_kernels.short_sums import ShortSums
from lite_attention.cute_kernels.softmax import Keys, Rows, Votes
from lite_attention.cute_kernels.storage_portable import Shared
from lite_attention.cute_kernels.tile_iterator import TILE_BITS
from lite_attention.cute_kernels.tile_walk_portable import TileWalk, Walk

_LEAST_UNIT = 2.0**-100  # not 0: an excluded key's -inf would become NaN


class Sources(NamedTuple):
    """What a thread copies of K and V, and where to."""

    k: Source
    v: Source
    k_place: Any
    v_place: Any


class Block(NamedTuple):
    """16 rows of a warp."""

    rows: Rows
    sums: Any  # promoted sums of the output, where they are short
    sums_shift: Any
    scale: Any  # of scores; of integer queries
    norm: Any  # of integer queries
    first_row: Any  # this thread's upper row of the queries; the lower one is 8 further


class Job(NamedTuple):
    """What all threads know of a q-tile."""

    count: Any  # of its tiles
    seq_q: Any
    keys: Keys
    k_scales: Any  # of integer keys, by tile
    k_norms: Any
    q_tile: QTile | None = None  # where the masses of its tiles are summed up
    decides: Any = None  # whether they are: a word in shared memory


class Ahead(NamedTuple):
    """What is on its way: register tensors of one."""

    walk: Walk
    tile: Any
    stage: Any


class BlockMasses(Masses):
    """Of a block of rows, whose references are by row."""

    def __init__(self, config: KernelConfig) -> None:
        super().__init__(config)
        self.rows, self.of_warps = config.tile_m, config.budget.warps * BLOCK_ROWS

    def place(self, at: int):
        """The four threads of a row have one."""
        row = cute.arch.warp_idx() * BLOCK_ROWS + cute.arch.lane_idx() // 4
        return at // 2 * self.rows + 8 * (at % 2) + row

    def word(self):
        """Each lane has one. All warps write the same there: they visit the same tiles, with a barrier at each."""
        return cute.arch.lane_idx()

    def of_block(self, references, block: int):
        """Those of a block."""
        return cute.make_tensor(references.iterator + block * self.of_warps, cute.make_layout(2 * self.rows))


class Mainloop:
    """What a CTA does between the list of tiles and the epilogue."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.stages, self.tile_n = config.budget.stages, config.tile_n
        self.products, self.walk = Products(config), TileWalk(config)
        self.softmax = pkgutil.resolve_name(config.quantization.softmax)(config)
        self.short_sums = ShortSums(config) if config.quantization.short_sums else None
        self.promoted_tiles = PROMOTED_KEYS // config.tile_n
        self.masses = BlockMasses(config)
        # Sums of a tile's weights are known before its product with V, but those of FP8.
        self.early_masses = bool(config.residual) and self.short_sums is None
        about = {"threads": config.budget.threads, "hold": config.budget.holds_addresses}
        self.copy_q = TileCopy(self.products.qk_dtype, config.tile_m, config.head_dim, **about)
        self.copy_k = TileCopy(self.products.qk_dtype, config.tile_n, config.head_dim, **about)
        self.copy_v = TileCopy(self.products.v_dtype, *self.products.v_tile, across=self.products.keys_inside, **about)

    @cute.jit
    def attend(self, operands: Operands, acc: Accumulators, blocks, sources: Sources, shared: Shared, job: Job):
        """Sums of the weighted values of this warp's rows, not yet divided, and its votes."""
        ahead = self.begin(acc, blocks, sources, shared, job)
        self.visit(operands, acc, blocks, sources, shared, job, ahead, Int32(0), job.count)
        self.end(acc, blocks)

    @cute.jit
    def begin(self, acc: Accumulators, blocks, sources: Sources, shared: Shared, job: Job) -> Ahead:
        """Begin with nothing, and start to load the first tile."""
        self.clear(acc, blocks)
        walk = self.walk.begin()
        ahead = Ahead(walk, cute.make_rmem_tensor(1, Int32), cute.make_rmem_tensor(1, Int32))
        ahead.tile[0], ahead.stage[0] = Int32(0), Int32(0)
        if job.count > 0:
            ahead.tile[0] = self.walk.next(walk, shared, job.keys.seq_k)
            self.start(sources, ahead.tile[0], Int32(0))
        cute.arch.cp_async_commit_group()
        return ahead

    @cute.jit
    def visit(
        self, operands: Operands, acc: Accumulators, blocks, sources: Sources, shared: Shared, job: Job, ahead: Ahead,
        first: Int32, end: Int32,
    ):  # fmt: skip
        """Add tiles of the job to the sums, by number in the order of visits."""
        coming, stage, walk, kept = ahead.tile[0], ahead.stage[0], ahead.walk, Uint32(0)
        for n in cutlass.range(first, end, unroll=1):
            entry = self.walk.entry(shared.partial, coming, job.keys.seq_k)
            j = entry & TILE_BITS
            unit, bound = self.of_tile(job, j)
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()  # this tile is there, and all are through with the one before
            if const_expr(self.stages == 1):
                self.copy_v.start(sources.v, sources.v_place, j)
                cute.arch.cp_async_commit_group()
                self.products.scores(operands, acc.scores, 0)
                cute.arch.cp_async_wait_group(0)
                cute.arch.sync_threads()
            if n + 1 < job.count:
                coming = self.walk.next(walk, shared, job.keys.seq_k)
                self.start(sources, coming, stage ^ 1)
            cute.arch.cp_async_commit_group()
            if const_expr(self.stages > 1):
                self.products.scores(operands, acc.scores, stage)
            keep = self.weigh(acc, blocks, shared, job, entry, unit, bound)
            if const_expr(self.config.votes):
                last_of_word = (coming // 32 != j // 32) | (n + 1 == end)
                kept = self.walk.keep(shared.kept, kept, j, keep, last_of_word)
            if const_expr(self.early_masses):
                self.add_masses(blocks, job, j, n)
            self.products.add_values(operands, acc, stage)
            if const_expr(self.short_sums is not None):
                self.go_on_in_float32(acc, blocks, job, j, n)
            if const_expr(self.stages > 1):
                stage = stage ^ 1
        ahead.tile[0], ahead.stage[0] = coming, stage
        if const_expr(self.config.residual):
            if job.decides[0] != 0:
                self.masses.write(job.q_tile)

    def end(self, acc: Accumulators, blocks):
        """Wait for what is on its way, and for no one else."""
        cute.arch.cp_async_wait_group(0)  # of the query tile, if there was nothing to visit
        if self.short_sums is not None:
            self.take_sums(acc, blocks)

    @cute.jit
    def start(self, sources: Sources, tile: Int32, stage: Int32):
        """Start to copy a tile of K, and of V where it comes as early."""
        k_place, v_place = sources.k_place, sources.v_place
        if const_expr(self.stages > 1):
            k_place, v_place = k_place + stage * self.copy_k.bytes, v_place + stage * self.copy_v.bytes
        self.copy_k.start(sources.k, k_place, tile)
        if const_expr(self.stages > 1):
            self.copy_v.start(sources.v, v_place, tile)

    def clear(self, acc: Accumulators, blocks):
        """Begin with nothing."""
        acc.out.fill(0.0)
        for block in blocks:
            block.rows.row_max.fill(-Float32.inf)
            block.rows.row_shift.fill(-1e30)
            block.rows.rescale.fill(1.0)
            block.rows.row_sum.fill(0.0)
            if self.short_sums is not None:
                self.short_sums.clear(block.sums, block.sums_shift)

    @cute.jit
    def of_tile(self, job: Job, j: Int32):
        """Scale and norm of a tile of integer keys."""
        scale, norm = Float32(1.0), Float32(0.0)
        if const_expr(job.k_scales is not None):
            scale, norm = job.k_scales[j], job.k_norms[j]
        return scale, norm

    @cute.jit
    def weigh(
        self, acc: Accumulators, blocks, shared: Shared, job: Job, entry: Int32, tile_scale: Float32,
        tile_norm: Float32,
    ):  # fmt: skip
        """Weights of the scores, the output rescaled for them, and whether a row votes to keep the tile."""
        keep, score_threshold = Boolean(False), Float32(0.0)
        if const_expr(self.config.votes):
            score_threshold = shared.score_threshold[0]
        j, partial = entry & TILE_BITS, entry > TILE_BITS
        for b in cutlass.range_constexpr(self.budget.blocks):
            _, _, _, scale, norm, row = block = blocks[b]
            x, out = self.products.block_of(acc.scores, b), self.products.block_of(acc.out, b)
            words = cute.recast_tensor(self.products.block_of(acc.weights, b), Int32)
            unit, bound = scale, norm
            if const_expr(job.k_scales is not None):
                unit, bound = max_nan(scale * tile_scale, _LEAST_UNIT), norm * tile_norm
            votes = Votes(None, score_threshold, row < job.seq_q, row + 8 < job.seq_q)
            unit = self.softmax.prepare(x, unit, partial, j * self.tile_n, job.keys)
            moved, voted, slope = self.softmax.step(x, block.rows, unit, bound, partial, votes)
            self.softmax.convert(x, words, block.rows, slope)
            self.softmax.add_up(words, block.rows)
            self.softmax.rescale_output(out, block.rows, moved)
            if const_expr(self.config.residual):
                self.weigh_masses(block.rows, job, b, moved)
            keep = keep | voted
        return keep

    @cute.jit
    def weigh_masses(self, rows: Rows, job: Job, block: cutlass.Constexpr, moved: Boolean):
        """Let masses heed that shifts have moved."""
        if moved:
            if job.decides[0] != 0:
                self.masses.weigh(rows, self.masses.of_block(job.q_tile.references, block))

    @cute.jit
    def add_masses(self, blocks, job: Job, tile: Int32, n: Int32):
        """Add what the n-th tile has, where that is asked for."""
        if job.decides[0] != 0:
            mass = Float32(0.0)
            for b in cutlass.range_constexpr(self.budget.blocks):
                mass = self.masses.mass(blocks[b].rows, self.masses.of_block(job.q_tile.references, b), mass)
            self.masses.add_up(mass, job.q_tile, tile, n)

    @cute.jit
    def go_on_in_float32(self, acc: Accumulators, blocks, job: Job, tile: Int32, n: Int32):
        """Take the sums of the n-th tile's weights out of their columns, and now and then the output too."""
        promote = (n + 1) % self.promoted_tiles == 0
        for b in cutlass.range_constexpr(self.budget.blocks):
            block, out = blocks[b], self.products.block_of(acc.out, b)
            block.rows.rescale.fill(1.0)  # which it has been, before the product
            self.short_sums.take_row_sums(out, block.rows)
            if promote:
                self.short_sums.promote(block.sums, block.sums_shift, out, block.rows)
            self.softmax.rescale_output(out, block.rows, promote)
        if const_expr(self.config.residual):
            self.add_masses(blocks, job, tile, n)

    def take_sums(self, acc: Accumulators, blocks):
        """Add what has gone on in float32 to the output."""
        for b, block in enumerate(blocks):
            self.short_sums.take(block.sums, block.sums_shift, self.products.block_of(acc.out, b), block.rows)
