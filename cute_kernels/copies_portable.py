"""Tiles from global to shared memory by cp.async, 16 bytes at a time, by all threads of a CTA."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import LoadCacheMode, cpasync

from lite_attention.cute_kernels.products_portable import layout, row_bytes
from lite_attention.cute_kernels.ptx import held

_VECTOR = 16  # bytes that a thread copies at a time


class Source(NamedTuple):
    """A matrix of one head, as a thread copies its tiles; in bytes."""

    first: Any  # address of this thread's part of the first row
    stride: Any  # of rows, less than 2^31
    last: Any  # the last row, less that of this thread's part; of a tile's columns, where the last part may begin


class TileCopy:
    """Tiles of so many rows and columns. A tile is some rows of a matrix, or, `across`, some columns of all its rows.

    In place of what is past the end comes the end again: so nothing is predicated, and what is excluded is finite.
    """

    def __init__(self, dtype, rows: int, columns: int, threads: int, *, hold: bool, across: bool = False) -> None:
        self.dtype, self.rows, self.across = dtype, rows, across
        self.row_bytes = row_bytes(dtype, columns)
        self.bytes = rows * columns * dtype.width // 8
        self.parts = self.bytes // (rows * self.row_bytes)  # of a row that do not lie side by side
        self.lanes = self.row_bytes // _VECTOR  # threads of a row
        self.apart = threads // self.lanes  # rows between those of a thread
        self.hold = held if hold else lambda x: x

    def first(self, thread):
        """Row and column of the first 16 bytes that a thread copies of a tile."""
        return thread // self.lanes, thread % self.lanes * (_VECTOR * 8 // self.dtype.width)

    def offset(self, thread):
        """Where they come to lie, bytes from the beginning of a tile; the same for all that have rows as wide."""
        width = self.row_bytes * 8 // self.dtype.width
        return Int32(layout(self.dtype, 8 * self.apart, width)(self.first(thread))) * (self.dtype.width // 8)

    def source(self, matrix, thread) -> Source:
        """A matrix [rows, columns] of one head."""
        row, column = self.first(thread)
        itemsize = self.dtype.width // 8
        first = (matrix.iterator + cute.crd2idx((row, column), matrix.layout)).toint()
        last = matrix.shape[0] - 1 - row
        if self.across:
            last = matrix.shape[1] * itemsize - _VECTOR - column * itemsize
        return Source(self.hold(Int64(first)), Int32(matrix.stride[0]) * itemsize, self.hold(Int32(last)))

    @cute.jit
    def start(self, source: Source, place: Int32, tile: Int32):
        """Start to copy a tile to shared memory."""
        mode = cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL)
        atom = cute.make_copy_atom(mode, self.dtype, num_bits_per_copy=8 * _VECTOR)
        vector = cute.make_layout(((_VECTOR * 8 // self.dtype.width, 1),))
        for i in cutlass.range_constexpr(self.rows // self.apart):
            if cutlass.const_expr(self.across):
                column = cutlass.min(tile * self.row_bytes, source.last)
                address = source.first + Int64(i * self.apart) * Int64(source.stride) + Int64(column)
            else:
                row = cutlass.min(tile * self.rows + i * self.apart, source.last)
                address = source.first + Int64(row) * Int64(source.stride)
            for j in cutlass.range_constexpr(self.parts):
                to = place + self.row_bytes * (i * self.apart + j * self.rows)
                src, dst = (
                    cute.make_ptr(self.dtype, at, space, assumed_align=_VECTOR)
                    for at, space in (
                        (address + j * self.row_bytes, cute.AddressSpace.gmem), (to, cute.AddressSpace.smem)
                    )
                )  # fmt: skip
                cute.copy(atom, cute.make_tensor(src, vector), cute.make_tensor(dst, vector))
