"""Which k-tiles a q-tile visits, and in which order: from its row of the skip mask to bits, and back."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, State
from lite_attention.cute_kernels.ptx import has_bit
from lite_attention.ops import control as c
from lite_attention.ops.tiles import SAMPLE_EVERY

PARTIAL = 1 << 15  # of an entry: some key of the tile is excluded
TILE_BITS = PARTIAL - 1
_SPECIAL = 3  # the tiles visited first: on the diagonal, the first, the last


def mask_rows(state: State, slot: Int32, batch: Int32, head: Int32, q_tile: Int32, half=None):
    """The rows of a job in the skip mask, of which the residual has two, and in the initial mask."""
    row, initial_row = None, None
    if const_expr(state.skip_mask is not None):
        if const_expr(half is None):
            row = state.skip_mask[slot, batch, head, q_tile, None]
        else:
            row = state.skip_mask[slot, half, batch, head, q_tile, None]
        if const_expr(state.initial_mask is not None):
            batches, heads = state.initial_mask.shape[0], state.initial_mask.shape[1]
            initial_row = state.initial_mask[batch % batches, head % heads, q_tile, None]
    return row, initial_row


@cute.jit
def diagonal_tile(
    q_tile: Int32, seq_q: Int32, seq_k: Int32, tile_m, tile_n, k_tiles: Int32, query_start: Int32
) -> Int32:
    """The k-tile at the place of a q-tile, as `ops/tiles.py` has it; `query_start` is the word of `control`."""
    middle = Int64(2 * q_tile + 1) * Int64(tile_m)
    if query_start > 0:
        middle += Int64(2) * Int64(query_start - 1)
    else:
        middle = middle * Int64(seq_k) // Int64(seq_q)
    return Int32(cutlass.min(Int64(k_tiles - 1), middle // (Int64(2) * Int64(tile_n))))


class TileIterator:
    """The producer warp finds and walks the tiles; the last consumer warp of a job writes the votes back."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config

    @cute.jit
    def start_word(self, row, initial_row, at: Int32, fresh: Boolean, dense: Boolean) -> Uint32:
        """Tiles of one word that are skipped at the start of this call."""
        word = Uint32(0)
        if const_expr(self.config.skip):
            if fresh:
                if const_expr(initial_row is not None):
                    word = Uint32(initial_row[at])
            else:
                word = Uint32(row[at])
            if dense:
                word = Uint32(0)
        return word

    @cute.jit
    def tiles_of(self, word: Uint32, at: Int32, k_tiles: Int32) -> Uint32:
        """A word without the bits that are no tiles."""
        if k_tiles - at * 32 < 32:
            word = word & ((Uint32(1) << Uint32(k_tiles - at * 32)) - Uint32(1))
        return word

    @cute.jit
    def find_visited(
        self, row, initial_row, must_do, flags, visited, partial, lane: Int32, k_tiles: Int32, fresh: Boolean,
        dense: Boolean,
    ):  # fmt: skip
        """One warp: put the tiles to visit, a bit each, in shared memory, and return their number."""
        words = cute.ceil_div(k_tiles, 32)
        count = Int32(0)
        for at in cutlass.range(lane, words, 32, unroll=1):
            word = ~self.start_word(row, initial_row, at, fresh, dense)
            if const_expr(must_do is not None):
                word = word | Uint32(must_do[at])
            word = self.tiles_of(word, at, k_tiles)
            if const_expr(flags is not None):
                word = word & Uint32(flags[0, at])
                partial[at] = Uint32(flags[1, at])
            visited[at] = word
            count += Int32(cute.arch.popc(word))
        cute.arch.sync_warp()
        return cute.arch.warp_redux_sync(count, kind="add")

    @cute.jit
    def find_parts(
        self, state: State, call, slot: Int32, place, flags, first, others, partial, lane: Int32, sizes, k_tiles: Int32
    ):  # fmt: skip
        """One warp: put the tiles that a call with a residual visits first, and those that come then, in shared memory,
        and return how many these are."""
        q_tile, head, batch = place
        row, initial_row = mask_rows(state, slot, batch, head, q_tile, call[residual_call.HALF])
        masked = call[residual_call.MASKED] != 0
        count, rest = self.find_kept(
            row, initial_row, state.must_do, flags, first, others, partial, lane, k_tiles, masked
        )
        if call[residual_call.SAMPLES] != 0:
            diagonal = self.diagonal(q_tile, *sizes, k_tiles, state.control)
            rest, count = count, self.take_sample(first, others, lane, k_tiles, diagonal)
        if call[residual_call.FULL] == 0:
            rest = Int32(0)
        return count, rest

    @cute.jit
    def find_kept(
        self, row, initial_row, must_do, flags, kept, rest, partial, lane: Int32, k_tiles: Int32, masked: Boolean
    ):  # fmt: skip
        """One warp: put the tiles that a mask in use keeps, all if there is none, and the other visitable ones in
        shared memory, a bit each, and return how many there are of both."""
        count, others = Int32(0), Int32(0)
        for at in cutlass.range(lane, cute.ceil_div(k_tiles, 32), 32, unroll=1):
            word, skipped = ~Uint32(0), Uint32(0)
            if const_expr(initial_row is not None):
                word = ~Uint32(initial_row[at])
            if masked:
                skipped = Uint32(row[at])
            if const_expr(must_do is not None):
                word = word | Uint32(must_do[at])
                skipped = skipped & ~Uint32(must_do[at])
            word = self.tiles_of(word, at, k_tiles)
            if const_expr(flags is not None):
                word = word & Uint32(flags[0, at])
                partial[at] = Uint32(flags[1, at])
            kept[at] = word & ~skipped
            rest[at] = word & skipped
            count += Int32(cute.arch.popc(word & ~skipped))
            others += Int32(cute.arch.popc(word & skipped))
        cute.arch.sync_warp()
        return cute.arch.warp_redux_sync(count, kind="add"), cute.arch.warp_redux_sync(others, kind="add")

    @cute.jit
    def take_sample(self, sample, visitable, lane: Int32, k_tiles: Int32, diagonal: Int32):
        """One warp: move the tiles in `sample` to `visitable`, leave every 16th of them from the diagonal on, the first
        and the last, and return how many these are."""
        count, last = Int32(0), k_tiles - 1
        for at in cutlass.range(lane, cute.ceil_div(k_tiles, 32), 32, unroll=1):
            chosen = Uint32(0x00010001) << Uint32(diagonal % SAMPLE_EVERY)
            if at == 0:
                chosen = chosen | Uint32(1)
            if at == last // 32:
                chosen = chosen | (Uint32(1) << Uint32(last % 32))
            visitable[at] = sample[at]
            sample[at] = sample[at] & chosen
            count += Int32(cute.arch.popc(sample[at]))
        cute.arch.sync_warp()
        return cute.arch.warp_redux_sync(count, kind="add")

    @cute.jit
    def diagonal(self, q_tile: Int32, seq_q: Int32, seq_k: Int32, k_tiles: Int32, control) -> Int32:
        """The k-tile at the place of a q-tile; without a state, queries spread over all keys."""
        query_start = Int32(0)
        if const_expr(self.config.skip):
            query_start = control[c.QUERY_START]
        return diagonal_tile(q_tile, seq_q, seq_k, self.config.tile_m, self.config.tile_n, k_tiles, query_start)

    def turns(self, words: Int32) -> Int32:
        """Number of turns of a walk: the special tiles, and each word once, the diagonal's in two parts."""
        return words + (_SPECIAL + 1)

    @cute.jit
    def turn(self, visited, turn: Int32, diagonal: Int32, last: Int32):
        """Return the word of this turn and the bits in it that are to be visited now, highest first.

        The diagonal tile, the first, the last; then down from the diagonal, and down from the last to the diagonal.
        """
        words = last // 32 + 1
        at = diagonal // 32 + _SPECIAL - turn
        if at < 0:
            at += words
        tile = diagonal
        if turn == 1:
            tile = Int32(0)
        if turn == 2:
            tile = last
        if turn < _SPECIAL:
            at = tile // 32
        word = visited[at]
        bit = Uint32(1) << Uint32(tile % 32)
        if turn < _SPECIAL:
            word = word & bit
        if turn == _SPECIAL:
            word = word & (bit - Uint32(1))
        if turn == _SPECIAL + words:
            word = word & ~(bit | (bit - Uint32(1)))
        # What an earlier turn has visited.
        if (turn > 0) & (at == diagonal // 32):
            word = word & ~(Uint32(1) << Uint32(diagonal % 32))
        if (turn > 1) & (at == 0):
            word = word & ~Uint32(1)
        if (turn > 2) & (at == last // 32):
            word = word & ~(Uint32(1) << Uint32(last % 32))
        return at, word

    @cute.jit
    def entry(self, partial, j: Int32, seq_k: Int32) -> Int32:
        """A tile as consumers get it."""
        value = j
        if const_expr(self.config.key_mask):
            value = value | (has_bit(partial[j // 32], j % 32) * PARTIAL)
        elif (j + 1) * self.config.tile_n > seq_k:
            value = value | PARTIAL
        return value

    @cute.jit
    def write_back(self, row, initial_row, must_do, visited, kept, lane: Int32, k_tiles: Int32, fresh: Boolean):
        """One warp: add what nobody voted to keep to the row, and clear the votes."""
        quads = cute.recast_tensor(kept, Uint32)  # the votes on four tiles, a byte each
        for at in cutlass.range(lane, cute.ceil_div(k_tiles, 32), 32, unroll=1):
            votes = Uint32(0)
            for i in cutlass.range_constexpr(8):
                votes = votes | (((quads[at * 8 + i] * Uint32(0x01020408)) >> 24) & Uint32(15)) << (4 * i)
                quads[at * 8 + i] = Uint32(0)
            out = visited[at] & ~votes
            if const_expr(must_do is not None):
                out = out & ~Uint32(must_do[at])
            start = self.start_word(row, initial_row, at, fresh, Boolean(False))
            row[at] = Int32(self.tiles_of(start, at, k_tiles) | out)
