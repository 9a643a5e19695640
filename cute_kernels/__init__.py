"""The kernels, in the CuTe Python DSL: the CUDA side of the ops in `lite_attention`.

Everything above this folder reaches it through `unsupported_reason`, which the compile pass asks before it swaps a
site, and one function for each op, which the op calls. All are imported on first use; cutlass is imported when the
first kernel is compiled, or never, where kernels compiled ahead of time are found.

    config.py          what is fixed when a kernel is built, and the groups of its arguments
    tile_scheduler.py  which q-tile a CTA computes next, and the step of the state
    tile_iterator.py   from a row of the skip mask to the tiles to visit, and the votes back into the mask
    softmax.py         online softmax with votes; of integer scores in softmax_int8.py
    epilogue.py        from the sums of a row to memory
    short_sums.py      sums of FP8 products go on in float32
    residual_call.py   what a call with a residual is, and what it leaves in the state
    residual_epilogue.py  from the sums of a row to memory, with the residual
    masses.py          what tiles have of their rows' softmax; choice.py picks those that stay
    quantizers.py      INT8 queries and keys, FP8 values, and their scales
    fragments.py       where the elements of an accumulator lie
    ptx.py             instructions that the DSL has no name for
    build.py           compiles a kernel, with or without a GPU
    cache.py           compiled kernels in memory, on disk, and ahead of time
    aot.py             compiles kernels into a library that needs no compiler where it runs
    wheel.py           a package of that library
    fingerprint.py     what compiled kernels are of
    files.py           files that code is loaded from: written whole, and by nobody else
    launcher.py        from tensors to a launch; to those that quantize in quantize_launcher.py; both by launch.py
    streams.py         calls with one state from several streams come one after the other

The portable kernel, from Ampere on:

    budget_portable.py     warps, stages, registers and shared memory of a configuration
    forward_portable.py    host launch and the kernel: a CTA a q-tile
    storage_portable.py    shared memory of a CTA
    tile_walk_portable.py  every warp walks the tiles, votes are bits
    residual_portable.py   the tiles in two parts, as the residual wants them
    store_portable.py      from the sums of a CTA's rows to memory
    mainloop_portable.py   the tiles of a q-tile, one ahead
    copies_portable.py     tiles to shared memory by cp.async
    products_portable.py   instructions and layouts of the two products

Of Hopper alone:

    budget_sm90.py     the registers and shared memory that a kernel needs
    forward_sm90.py    host launch and the kernel, which splits into roles
    storage_sm90.py    shared memory of a CTA
    jobs_sm90.py       what its warps tell each other
    producer_sm90.py   the warp that lists and loads tiles
    consumer_sm90.py   the warpgroups that compute and store
    mainloop_sm90.py   one q-tile in one of them
    products_sm90.py   instructions and layouts of the two products
"""

from __future__ import annotations

if __name__ == "cute_kernels":
    raise ImportError("import lite_attention.cute_kernels, not cute_kernels: it must exist once")

from lite_attention.cute_kernels.launch import unsupported_reason
from lite_attention.cute_kernels.launcher import attention_forward, residual_attention_forward, skip_attention_forward
from lite_attention.cute_kernels.quantize_launcher import key_mean, quantize_key, quantize_query, quantize_value

__all__ = [
    "attention_forward",
    "key_mean",
    "quantize_key",
    "quantize_query",
    "quantize_value",
    "residual_attention_forward",
    "skip_attention_forward",
    "unsupported_reason",
]
