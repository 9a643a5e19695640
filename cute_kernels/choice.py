"""Which tiles stay: those of the largest mass, chosen on the device from a histogram, without sorting.

Two kernels after each attention kernel with a residual. They do nothing unless its step was a deciding one.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr

from lite_attention.cute_kernels.config import ChoiceConfig
from lite_attention.cute_kernels.ptx import has_bit, to_int, to_int_below
from lite_attention.cute_kernels.tile_iterator import diagonal_tile
from lite_attention.ops import control as c
from lite_attention.ops.choice import BINS, BINS_PER_OCTAVE, HASH, LOWEST_OCTAVE

_WARPS = 8
_THREADS = 32 * _WARPS
_BLOCKS = 264  # of a batch element: two for each multiprocessor of the largest GPUs
_ALWAYS = BINS - 1  # of tiles that stay whatever their mass


class CountMasses:
    """Put the bin of each tile, plus 1, in place of its mass, and count the tiles of each bin."""

    def __init__(self, config: ChoiceConfig) -> None:
        self.must_do = config.must_do

    @cute.jit
    def __call__(
        self, mass: cute.Tensor, counts: cute.Tensor, decision: cute.Tensor, control: cute.Tensor, must_do, sizes,
        stream: cuda.CUstream,
    ):  # fmt: skip
        """mass [B, Hq, q_tiles, k_tiles], counts [B, BINS], decision [4]; sizes: Sq, Sk, tile_m, tile_n."""
        self.kernel(mass, counts, decision, control, must_do, sizes).launch(
            grid=[cutlass.min(_BLOCKS, mass.shape[1] * mass.shape[2]), mass.shape[0], 1], block=[_THREADS, 1, 1],
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, mass: cute.Tensor, counts: cute.Tensor, decision: cute.Tensor, control: cute.Tensor, must_do, sizes
    ):  # fmt: skip
        """A warp has a row of tiles."""
        if decision[0] != 0:
            thread, _, _ = cute.arch.thread_idx()
            block, batch, _ = cute.arch.block_idx()
            blocks, _, _ = cute.arch.grid_dim()
            lane = cute.arch.lane_idx()
            shared = cutlass.memory.SmemAllocator().allocate_tensor(Int32, cute.make_layout(BINS), 16)
            for at in cutlass.range(thread, BINS, _THREADS, unroll=1):
                shared[at] = Int32(0)
            cute.arch.sync_threads()
            heads, q_tiles, k_tiles = mass.shape[1], mass.shape[2], mass.shape[3]
            for row in cutlass.range(block * _WARPS + thread // 32, heads * q_tiles, blocks * _WARPS, unroll=1):
                q_tile = row % q_tiles
                masses = mass[batch, row // q_tiles, q_tile, None]
                diagonal = diagonal_tile(q_tile, *sizes, k_tiles, control[c.QUERY_START])
                total = Float32(0.0)
                for j in cutlass.range(lane, k_tiles, 32, unroll=4):
                    total += Float32(Uint32(masses[j]))
                total = cute.math.log2(cute.arch.warp_reduction_sum(total))
                for j in cutlass.range(lane, k_tiles, 32, unroll=4):
                    value = Uint32(masses[j])
                    if value != 0:
                        octaves = cute.math.log2(Float32(value)) - total - LOWEST_OCTAVE
                        chosen = cutlass.max(cutlass.min(to_int_below(octaves * BINS_PER_OCTAVE), _ALWAYS - 1), 0)
                        if (j == diagonal) | self.always(must_do, j):
                            chosen = Int32(_ALWAYS)
                        masses[j] = chosen + 1
                        cute.arch.atomic_add(shared.iterator + chosen, Int32(1), sem="relaxed", scope="cta")
            cute.arch.sync_threads()
            for at in cutlass.range(thread, BINS, _THREADS, unroll=1):
                if shared[at] != 0:
                    where = counts.iterator + counts.layout((batch, at))
                    cute.arch.atomic_add(where, shared[at], sem="relaxed", scope="gpu")

    @cute.jit
    def always(self, must_do, j: Int32) -> Boolean:
        """Whether `must_do` names a tile."""
        named = Boolean(False)
        if const_expr(must_do is not None):
            named = has_bit(Uint32(must_do[j // 32]), j % 32) != 0
        return named


class ChooseTiles:
    """Write the mask of the tiles that do not stay."""

    def __init__(self, config: ChoiceConfig) -> None:
        pass

    @cute.jit
    def __call__(
        self, bins: cute.Tensor, counts: cute.Tensor, decision: cute.Tensor, keep: cute.Tensor, skip_mask: cute.Tensor,
        stream: cuda.CUstream,
    ):  # fmt: skip
        """bins [B, Hq, q_tiles, k_tiles], plus 1, 0 = not visited; keep [steps]; the mask has slots and halves."""
        self.kernel(bins, counts, decision, keep, skip_mask).launch(
            grid=[cutlass.min(_BLOCKS, bins.shape[1] * bins.shape[2]), bins.shape[0], 1], block=[_THREADS, 1, 1],
            stream=stream,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, bins: cute.Tensor, counts: cute.Tensor, decision: cute.Tensor, keep: cute.Tensor, skip_mask: cute.Tensor
    ):  # fmt: skip
        """All blocks of a batch element find the last bin that stays; a warp writes a row."""
        if decision[0] != 0:
            thread, _, _ = cute.arch.thread_idx()
            block, batch, _ = cute.arch.block_idx()
            blocks, _, _ = cute.arch.grid_dim()
            lane = cute.arch.lane_idx()
            allocator = cutlass.memory.SmemAllocator()
            parts = allocator.allocate_tensor(Int32, cute.make_layout(_THREADS), 16)
            found = allocator.allocate_tensor(Int32, cute.make_layout(4), 16)
            self.find_last_bin(counts, decision, keep, parts, found, thread, batch)
            last, needed, there = found[0], Int64(found[1]) << 32, Int64(found[2])
            heads, q_tiles, k_tiles = bins.shape[1], bins.shape[2], bins.shape[3]
            for row in cutlass.range(block * _WARPS + thread // 32, heads * q_tiles, blocks * _WARPS, unroll=1):
                of_row = bins[batch, row // q_tiles, row % q_tiles, None]
                mask = skip_mask[decision[1], decision[2], batch, row // q_tiles, row % q_tiles, None]
                for at in cutlass.range(cute.ceil_div(k_tiles, 32), unroll=4):
                    j, skipped = at * 32 + lane, Boolean(False)
                    if j < k_tiles:
                        # Weyl's sequence: what it takes of tiles that are alike lies evenly among them.
                        number = Int64((Uint32(row * k_tiles + j)) * Uint32(HASH))
                        tile_bin = of_row[j] - 1
                        stays = (tile_bin > last) | ((tile_bin == last) & (number * there < needed))
                        skipped = ~stays | (tile_bin < 0)
                    word = cute.arch.vote_ballot_sync(skipped)
                    if lane == 0:
                        mask[at] = Int32(word)

    @cute.jit
    def find_last_bin(self, counts, decision, keep, parts, found, thread: Int32, batch: Int32):
        """Find the last bin of which tiles stay, how many of it are needed, and how many there are."""
        each: cutlass.Constexpr = BINS // _THREADS
        own = Int32(0)
        for i in cutlass.range_constexpr(each):
            own += counts[batch, thread * each + i]
        parts[thread] = own
        cute.arch.sync_threads()
        if thread == 0:
            visitable = Int32(0)
            for i in cutlass.range(_THREADS, unroll=8):
                visitable += parts[i]
            share = keep[cutlass.max(cutlass.min(decision[3], keep.shape[0] - 1), 0)]
            left = to_int(share * Float32(visitable))
            part = Int32(_THREADS - 1)
            while (part > 0) & (parts[part] < left):
                left -= parts[part]
                part -= 1
            last = part * each + (each - 1)
            while (last > part * each) & (counts[batch, last] < left):
                left -= counts[batch, last]
                last -= 1
            if last == _ALWAYS:  # these stay, however many
                left = counts[batch, last]
            found[0], found[1], found[2] = last, left, counts[batch, last]
        cute.arch.sync_threads()
