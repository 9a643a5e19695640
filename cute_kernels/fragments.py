"""Where the elements of an accumulator lie in the registers of a thread: of wgmma, and of mma.sync by 8 columns."""

from __future__ import annotations


def element(half, i):
    """Register of a thread's column i in its upper or lower row of a 64 x N accumulator."""
    return (i // 2) * 4 + half * 2 + i % 2


def four_weights(w):
    """Registers of an accumulator that make up register w of the A operand of an FP8 product: four columns of a row."""
    return [element(w % 2, w // 2 * 4 + i) for i in range(4)]


def column(i, lane):
    """Column of the tile that a thread's column i is."""
    return (i // 2) * 8 + (lane % 4) * 2 + i % 2
