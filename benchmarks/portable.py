"""Time of the portable kernel on the GPU here, as a ratio to FlashAttention-2 in PyTorch on the same tensors.

    python -m benchmarks.portable [--shapes 1,24,16384,128 ...] [--seconds 0.5] [--quantizations none int8]

Both use mma.sync. Each call runs in a block of its own, FlashAttention-2 before and after it; a figure is the median of
the second half of a block. `ideal` is the time with a state that skips nothing, times what is not skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lite_attention
from benchmarks.attention import runs_of_tiles, shape
from benchmarks.measure import Call, block, going_on, one_line, require_gpu, where
from lite_attention.cli.arguments import number
from lite_attention.cute_kernels import attention_forward
from lite_attention.ops import SkipState
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import target_of

SHAPES = ["1,24,16384,128", "2,24,8192,64"]
SPARSITIES = (0.0, 0.42, 0.77)
NO_VOTE = -60.0  # random inputs: nothing is voted out, so the planted mask stays


def flash_attention_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(qh, kh, vh)

    return call


def skipping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: float, quantization: str) -> tuple[Call, float]:
    """Return a call with a state of which about this share of the tiles is skipped, and what is."""
    how: dict[str, Any] = {"quantization": quantization, "implementation": "portable"}
    state = SkipState.for_inputs(q, k, threshold=NO_VOTE, slots=1, **how)

    def call() -> Any:
        return lite_attention.skip_attention(q, k, v, state, **how)

    call()  # from now on the step is not fresh
    _, batch, heads, q_tiles, _ = state.skip_mask.shape
    mask = runs_of_tiles(torch.full((heads, 1), share), q_tiles, -(-q.shape[1] // state.tile_n))
    state.skip_mask[0] = pack_bits(mask).to(q.device).expand(batch, -1, -1, -1)
    return call, state.sparsity().item()


def contenders(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, quantizations: Sequence[str]
) -> Iterator[tuple[str, Call, float]]:
    """Yield (name, call, share of tiles skipped)."""
    yield "dense, without a state", lambda: attention_forward(q, k, v, None, scale=None, implementation="portable"), 0.0
    for quantization in quantizations:
        for share in SPARSITIES if target_of("cuda", "portable").quantizes(q.shape[3], quantization) else ():
            yield f"{quantization}, mask in use", *skipping(q, k, v, share, quantization)


def measure_shape(text: str, quantizations: Sequence[str], seconds: float) -> None:
    """Time all at one shape, and print a line each."""
    batch, heads, seq, dim = map(int, text.split(","))
    q, k, v = (torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flops = 4 * batch * heads * seq * seq * dim
    tiles = target_of("cuda", "portable").tile_shape(dim)
    print(f"\n(B, H, S, D) = ({text}), bf16, tiles {tiles}")
    print(f"{'':28}{'ratio':>7}{'ms':>9}{'FA2 ms':>9}{'TFLOP/s':>9}{'skipped':>9}{'ideal':>8}")
    peer, dense = flash_attention_2(q, k, v), 0.0
    for name, call, share in contenders(q, k, v, quantizations):
        call()  # compiles outside of the blocks
        before, ours, after = block(peer, seconds), block(call, seconds), block(peer, seconds)
        theirs = (before + after) / 2
        dense = ours if share == 0 else dense
        speed, ideal = flops * (1 - share) / ours / 1e9, dense * (1 - share) / theirs
        print(f"{name:28}{ours / theirs:7.3f}{ours:9.3f}{theirs:9.3f}{speed:9.0f}{share:9.1%}{ideal:8.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="B,H,S,D")
    parser.add_argument("--seconds", type=number(above=0), default=0.5, help="length of a block")
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=["none"])
    args = parser.parse_args(arguments)
    require_gpu()
    print(one_line(where()))
    for text in args.shapes:
        with going_on(f"shape {text}"):
            measure_shape(text, args.quantizations, args.seconds)


if __name__ == "__main__":
    main()
