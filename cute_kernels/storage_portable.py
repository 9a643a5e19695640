"""Shared memory of a CTA of the portable kernel."""

# Without "from __future__ import annotations": cute.struct reads those of a class as they are.

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from lite_attention.cute_kernels.budget_portable import MAX_WORDS
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.products_portable import Layouts, Products
from lite_attention.cute_kernels.residual_call import DENSE

CALL_WORDS = 8
# Of `Shared.call`, after what all kernels have.
COUNT, DIAGONAL, Q_TILE, HEAD, BATCH = range(DENSE + 1, CALL_WORDS)


class Shared(NamedTuple):
    """Tiles, which of them a job visits and keeps, and what the first warp tells the others."""

    q: Any
    k: Any
    v: Any
    visited: Any  # [words], bits of tiles
    kept: Any  # [words], bits of tiles that some row keeps
    partial: Any  # [words], bits of tiles: some key is excluded; where there is a key mask
    call: Any  # slot, whether fresh, whether dense, number of tiles to visit, the one on the diagonal, and the job
    score_threshold: Any  # in units of row maxima


def storage_of(config: KernelConfig, layouts: Layouts):
    """Return two structures: tiles, aligned as their swizzles want it, and what is small."""
    products, partial_words = Products(config), config.budget.partial_words
    q_buffer, k_buffer, v_buffer = (
        cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]
        for dtype, layout in zip((products.qk_dtype, products.qk_dtype, products.v_dtype), layouts, strict=True)
    )

    @cute.struct
    class Tiles:
        q: q_buffer
        k: k_buffer
        v: v_buffer

    @cute.struct
    class Call:
        visited: cute.struct.MemRange[Uint32, MAX_WORDS]
        kept: cute.struct.MemRange[Int32, MAX_WORDS]
        partial: cute.struct.MemRange[Uint32, partial_words]
        call: cute.struct.MemRange[Int32, CALL_WORDS]
        score_threshold: cute.struct.MemRange[Float32, 1]

    return Tiles, Call


def views(config: KernelConfig, tiles, call, layouts: Layouts) -> Shared:
    """Return both as tensors."""
    words = cute.make_layout(MAX_WORDS)
    return Shared(
        *[buffer.get_tensor(layout) for buffer, layout in zip((tiles.q, tiles.k, tiles.v), layouts, strict=True)],
        call.visited.get_tensor(words),
        call.kept.get_tensor(words),
        call.partial.get_tensor(cute.make_layout(config.budget.partial_words)),
        call.call.get_tensor(cute.make_layout(CALL_WORDS)),
        call.score_threshold.get_tensor(cute.make_layout(1)),
    )
