"""Shared memory of a Hopper CTA."""

# Without "from __future__ import annotations": cute.struct reads those of a class as they are.

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32

from lite_attention.cute_kernels.budget_sm90 import MAX_TILES, MAX_WORDS
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.jobs_sm90 import Jobs, Shared
from lite_attention.cute_kernels.mainloop_sm90 import Tiles
from lite_attention.cute_kernels.products_sm90 import Products
from lite_attention.cute_kernels.residual_call import CALL_WORDS
from lite_attention.cute_kernels.tile_scheduler import JOB_WORDS, RING


class Layouts(NamedTuple):
    """Of Q, and of the rings of K and V, in shared memory."""

    q: Any
    k: Any
    v: Any


def _sizes(config: KernelConfig):
    """Of what not all kernels need."""
    return _Sizes(
        call=CALL_WORDS if config.residual else 4,
        kept=1 if config.residual else MAX_TILES,
        partial=MAX_WORDS if config.key_mask else 1,
        rows=2 * RING if config.residual else RING,
        references=4 * config.budget.consumers if config.residual else 1,
        sums=max(1, config.budget.promoted_sums),
    )


class _Sizes(NamedTuple):
    call: int
    kept: int
    partial: int
    rows: int
    references: int
    sums: int


def storage_of(config: KernelConfig, layouts: Layouts):
    """Return the structure."""
    products, stages = Products(config), config.budget.stages
    sizes = _sizes(config)
    q_buffer, k_buffer, v_buffer = (
        cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]
        for dtype, layout in zip((products.qk_dtype, products.qk_dtype, products.v_dtype), layouts, strict=True)
    )

    @cute.struct
    class Storage:
        q_bars: cute.struct.MemRange[Int64, 2]
        k_bars: cute.struct.MemRange[Int64, 2 * stages]
        v_bars: cute.struct.MemRange[Int64, 2 * stages]
        call: cute.struct.MemRange[Int32, sizes.call]
        jobs: cute.struct.MemRange[Int32, RING * JOB_WORDS]
        score_threshold: cute.struct.MemRange[Float32, RING + 1]
        entries: cute.struct.MemRange[Int32, stages]
        visited: cute.struct.MemRange[Uint32, sizes.rows * MAX_WORDS]
        kept: cute.struct.Align[cute.struct.MemRange[Uint8, RING * sizes.kept], 16]
        partial: cute.struct.MemRange[Uint32, sizes.partial]
        k_scales: cute.struct.MemRange[Float32, stages]
        k_norms: cute.struct.MemRange[Float32, stages]
        sums: cute.struct.Align[cute.struct.MemRange[Float32, sizes.sums], 16]
        q: q_buffer
        k: k_buffer
        v: v_buffer
        references: cute.struct.MemRange[Float32, sizes.references]

    return Storage


def views(config: KernelConfig, storage, layouts: Layouts):
    """Return it as tensors, in groups."""
    sizes = _sizes(config)
    jobs = Jobs(
        storage.call.get_tensor(cute.make_layout(sizes.call)),
        storage.jobs.get_tensor(cute.make_layout((RING, JOB_WORDS), stride=(JOB_WORDS, 1))),
        storage.score_threshold.get_tensor(cute.make_layout(RING)),
        storage.visited.get_tensor(cute.make_layout((sizes.rows, MAX_WORDS), stride=(MAX_WORDS, 1))),
        storage.kept.get_tensor(cute.make_layout((RING, sizes.kept), stride=(sizes.kept, 1))),
        storage.partial.get_tensor(cute.make_layout(sizes.partial)),
        storage.references.get_tensor(cute.make_layout(sizes.references)),
    )
    buffers = (storage.q, storage.k, storage.v)
    tensors = [
        buffer.get_tensor(layout.outer, swizzle=layout.inner) for buffer, layout in zip(buffers, layouts, strict=True)
    ]
    shared = Shared(*tensors, storage.sums.get_tensor(cute.make_layout(sizes.sums)))
    of_tiles = (storage.entries, storage.k_scales, storage.k_norms)
    return shared, jobs, Tiles(*[x.get_tensor(cute.make_layout(config.budget.stages)) for x in of_tiles])
