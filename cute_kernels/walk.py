"""Which tiles a CTA visits, and in which order: from the row of the skip mask to a list in shared memory."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32, const_expr

from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.device import bits_above, has_bit
from lite_attention.ops import control as c

PARTIAL_SHIFT = 15
TILE_BITS = (1 << PARTIAL_SHIFT) - 1


class Walk:
    """Builds the list, and writes the votes back. All threads of the CTA take part."""

    def __init__(self, config: KernelConfig) -> None:
        self.config = config
        self.threads = config.threads

    @cute.jit
    def is_fresh(self, control, block: Int32, step: Int32, batch: Int32, seq_q: Int32, seq_k: Int32):
        """Whether this call starts from the initial mask."""
        refresh = control[c.REFRESH]
        fresh = (step == 0) | (control[block + c.FRESH] != 0)
        fresh = fresh | (control[block + c.BATCH] != batch)
        fresh = fresh | (control[block + c.SEQ_Q] != seq_q) | (control[block + c.SEQ_K] != seq_k)
        if refresh > 0:
            fresh = fresh | (step % refresh == 0)
        return fresh

    @cute.jit
    def valid_bits(self, at: Int32, k_tiles: Int32) -> Uint32:
        """Bits of a word that are tiles."""
        count = k_tiles - at * 32
        bits = Uint32(0xFFFFFFFF)
        if count < 32:
            bits = (Uint32(1) << Uint32(count)) - Uint32(1)
        return bits

    @cute.jit
    def start_word(self, row, initial_row, at: Int32, fresh: Boolean, dense: Boolean) -> Uint32:
        """Skipped tiles at the start of this call."""
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
    def build(
        self,
        row,
        initial_row,
        must_do,
        flags,
        visited,
        suffix,
        kept,
        order,
        thread: Int32,
        words: Int32,
        k_tiles: Int32,
        seq_k: Int32,
        diagonal: Int32,
        fresh: Boolean,
        dense: Boolean,
    ):
        """Fill `order` with the visited tiles, PARTIAL added to those with an excluded key; return their number."""
        last = k_tiles - 1
        for at in cutlass.range(thread, words, self.threads, unroll=1):
            word = ~self.start_word(row, initial_row, at, fresh, dense)
            if const_expr(must_do is not None):
                word = word | Uint32(must_do[at])
            word = word & self.valid_bits(at, k_tiles)
            if const_expr(flags is not None):
                word = word & Uint32(flags[0, at])
            visited[at] = word
            kept[at] = Uint32(0)
        cute.arch.sync_threads()
        for at in cutlass.range(thread, words, self.threads, unroll=1):
            above = Int32(0)
            for other in cutlass.range(at + 1, words, unroll=4):
                above += Int32(cute.arch.popc(self.rest(visited[other], other, diagonal, last)))
            suffix[at] = above
        cute.arch.sync_threads()
        has_diagonal = has_bit(visited[diagonal // 32], diagonal % 32)
        has_first = has_bit(visited[0], Int32(0))
        if diagonal == 0:
            has_first = Int32(0)
        has_last = has_bit(visited[last // 32], last % 32)
        if (last == 0) | (last == diagonal):
            has_last = Int32(0)
        base = has_diagonal + has_first + has_last
        total = suffix[0] + Int32(cute.arch.popc(self.rest(visited[0], Int32(0), diagonal, last)))
        at_diagonal = self.rest(visited[diagonal // 32], diagonal // 32, diagonal, last)
        behind = suffix[diagonal // 32] + bits_above(at_diagonal, diagonal % 32)
        before = total - behind
        for j in cutlass.range(thread, k_tiles, self.threads, unroll=1):
            word = self.rest(visited[j // 32], j // 32, diagonal, last)
            if has_bit(word, j % 32) != 0:
                above = suffix[j // 32] + bits_above(word, j % 32)
                rank = base + before + above
                if j < diagonal:
                    rank = base + above - behind
                order[rank] = self.entry(flags, j, seq_k)
        if thread == 0:
            if has_diagonal != 0:
                order[0] = self.entry(flags, diagonal, seq_k)
            if has_first != 0:
                order[has_diagonal] = self.entry(flags, Int32(0), seq_k)
            if has_last != 0:
                order[has_diagonal + has_first] = self.entry(flags, last, seq_k)
        cute.arch.sync_threads()
        return base + total

    @cute.jit
    def entry(self, flags, j: Int32, seq_k: Int32):
        """A tile as it stands in the list."""
        value = j
        if const_expr(flags is not None):
            value = value | (has_bit(Uint32(flags[1, j // 32]), j % 32) << PARTIAL_SHIFT)
        elif (j + 1) * self.config.tile_n > seq_k:
            value = value | (1 << PARTIAL_SHIFT)
        return cutlass.Uint16(value)

    @cute.jit
    def rest(self, word: Uint32, at: Int32, diagonal: Int32, last: Int32) -> Uint32:
        """A word without the tiles that are visited first."""
        if at == 0:
            word = word & ~Uint32(1)
        if at == diagonal // 32:
            word = word & ~(Uint32(1) << Uint32(diagonal % 32))
        if at == last // 32:
            word = word & ~(Uint32(1) << Uint32(last % 32))
        return word

    @cute.jit
    def write_back(
        self,
        row,
        initial_row,
        must_do,
        visited,
        kept,
        worker: Int32,
        workers: cutlass.Constexpr,
        words: Int32,
        fresh: Boolean,
        dense: Boolean,
    ):
        """Add what was voted out to the row."""
        for at in cutlass.range(worker, words, workers, unroll=1):
            out = visited[at] & ~kept[at]
            if const_expr(must_do is not None):
                out = out & ~Uint32(must_do[at])
            row[at] = Int32(self.start_word(row, initial_row, at, fresh, dense) | out)

    @cute.jit
    def move_step(self, control, block: Int32, step: Int32, batch: Int32, seq_q: Int32, seq_k: Int32, ctas: Int32):
        """One thread of each CTA, after all of it has read the control tensor: the last one moves the step."""
        cute.arch.fence_acq_rel_gpu()
        ticket = cute.arch.atomic_add(control.iterator + c.TICKETS, Int32(1), sem="acq_rel", scope="gpu")
        if ticket == ctas - 1:
            after = step
            if (control[c.FLAGS] & c.FLAG_AUTO_STEP) != 0:
                after = step + 1
                steps = control[c.NUM_STEPS]
                if (steps > 0) & (after >= steps):
                    after = Int32(0)
            control[block + c.STEP] = after
            control[block + c.FRESH] = Int32(0)
            control[block + c.BATCH] = batch
            control[block + c.SEQ_Q] = seq_q
            control[block + c.SEQ_K] = seq_k
            control[c.TICKETS] = Int32(0)
