"""The tiles of a job where every warp walks the bits itself, and votes are bits in shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from lite_attention.cute_kernels.storage_portable import DIAGONAL, Shared
from lite_attention.cute_kernels.tile_iterator import TileIterator


class Walk(NamedTuple):
    """Where a walk is: register tensors of one."""

    turn: Any  # with the residual, those of the second part follow
    word: Any  # number of the word
    left: Any  # its bits that are still to be visited now


class TileWalk(TileIterator):
    """The first warp finds the tiles and writes the votes back; all walk."""

    def begin(self) -> Walk:
        """A walk that has visited nothing."""
        walk = Walk(*(cute.make_rmem_tensor(1, dtype) for dtype in (Int32, Int32, Uint32)))
        for x in walk:
            x.fill(0)
        return walk

    @cute.jit
    def next(self, walk: Walk, shared: Shared, seq_k: Int32) -> Int32:
        """The next tile, of which there must be one."""
        turn, at, word = walk.turn[0], walk.word[0], walk.left[0]
        while word == 0:
            last, bits, of_part = cute.ceil_div(seq_k, self.config.tile_n) - 1, shared.visited, turn
            if const_expr(self.config.residual):
                part, turns = Int32(0), self.turns(last // 32 + 1)
                if turn >= turns:
                    part, of_part = Int32(1), turn - turns
                bits = shared.visited[None, part]
            at, word = self.turn(bits, of_part, shared.call[DIAGONAL], last)
            turn += 1
        bit = 31 - Int32(cute.arch.clz(word))
        walk.turn[0], walk.word[0] = turn, at
        walk.left[0] = word & ~(Uint32(1) << Uint32(bit))
        return at * 32 + bit

    @cute.jit
    def keep(self, kept, bits: Uint32, j: Int32, keep: Boolean, last: Boolean) -> Uint32:
        """One warp: note whether some row of it keeps a tile, in bits that one lane writes after the last of a word.

        For each tile that would cost more: the warp diverges.
        """
        if cute.arch.vote_any_sync(keep):
            bits = bits | (Uint32(1) << Uint32(j % 32))
        if last:
            if cute.arch.lane_idx() == 0:
                cute.arch.atomic_or(kept.iterator + j // 32, Int32(bits), sem="relaxed", scope="cta")
            bits = Uint32(0)
        return bits

    @cute.jit
    def write_back_bits(self, row, initial_row, must_do, visited, kept, lane: Int32, k_tiles: Int32, fresh: Boolean):
        """One warp: add what nobody voted to keep to the row."""
        for at in cutlass.range(lane, cute.ceil_div(k_tiles, 32), 32, unroll=1):
            out = visited[at] & ~Uint32(kept[at])
            if const_expr(must_do is not None):
                out = out & ~Uint32(must_do[at])
            start = self.start_word(row, initial_row, at, fresh, Boolean(False))
            row[at] = Int32(self.tiles_of(start, at, k_tiles) | out)
