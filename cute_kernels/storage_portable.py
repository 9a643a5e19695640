"""Shared memory of a CTA of the portable kernel."""

# Without "from __future__ import annotations": cute.struct reads those of a class as they are.

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from lite_attention.cute_kernels.budget_portable import MAX_WORDS
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.products_portable import Layouts, Products
from lite_attention.cute_kernels.residual_call import CALL_WORDS

# Of `Shared.call`, after the words of the call.
COUNT, REST, MASSES, DECIDES, DIAGONAL, Q_TILE, HEAD, BATCH = range(CALL_WORDS, CALL_WORDS + 8)
_WORDS = CALL_WORDS + 8


class Shared(NamedTuple):
    """Tiles, which of them a job visits and keeps, and what the first warp tells the others."""

    q: Any
    k: Any
    v: Any
    visited: Any  # [words], bits of tiles; with the residual [words, 2]: of the first part, and of the second
    kept: Any  # [words], bits of tiles that some row keeps, where there are votes
    partial: Any  # [words], bits of tiles: some key is excluded; where there is a key mask
    call: Any  # as `residual_call.py` has it; numbers of tiles, what sums masses up, the diagonal, and the job
    score_threshold: Any  # in units of row maxima
    references: Any  # [2 * rows], with the residual: how rows count in masses, see masses.py
    summed: Any  # [lanes], likewise: of which tiles warps have masses that are not written yet


def storage_of(config: KernelConfig, layouts: Layouts):
    """Return two structures: tiles, aligned as their swizzles want it, and what is small."""
    budget, products = config.budget, Products(config)
    visited_words = 2 * MAX_WORDS if config.residual else MAX_WORDS
    kept_words = 2 * MAX_WORDS - visited_words or 1  # one that nobody writes
    partial_words, reference_words, summed_words = budget.partial_words, budget.references, budget.summed
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
        visited: cute.struct.MemRange[Uint32, visited_words]
        kept: cute.struct.MemRange[Int32, kept_words]
        partial: cute.struct.MemRange[Uint32, partial_words]
        call: cute.struct.MemRange[Int32, _WORDS]
        score_threshold: cute.struct.MemRange[Float32, 1]
        references: cute.struct.MemRange[Float32, reference_words]
        summed: cute.struct.MemRange[Int32, summed_words]

    return Tiles, Call


def views(config: KernelConfig, tiles, call, layouts: Layouts) -> Shared:
    """Return both as tensors."""
    words, parts = cute.make_layout(MAX_WORDS), cute.make_layout((MAX_WORDS, 2))
    return Shared(
        *[buffer.get_tensor(layout) for buffer, layout in zip((tiles.q, tiles.k, tiles.v), layouts, strict=True)],
        call.visited.get_tensor(parts if config.residual else words),
        None if config.residual else call.kept.get_tensor(words),
        call.partial.get_tensor(cute.make_layout(config.budget.partial_words)),
        call.call.get_tensor(cute.make_layout(_WORDS)),
        call.score_threshold.get_tensor(cute.make_layout(1)),
        call.references.get_tensor(cute.make_layout(config.budget.references)),
        call.summed.get_tensor(cute.make_layout(config.budget.summed)),
    )
