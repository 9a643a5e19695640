"""Time of the portable kernel on the GPU here, as a ratio to FlashAttention-2 in PyTorch on the same tensors.

    python -m benchmarks.portable [--only votes residual] [--shapes 1,24,16384,128 ...] [--seconds 0.5]
                                  [--quantizations none int8]

Both use mma.sync. Each call runs in a block of its own; before and after it run FlashAttention-2 and our dense call,
which has no state, in blocks of theirs. A figure is the median of the second half of a block. `ideal` is the time with
a state of votes that skips nothing, times what is not skipped; `/ dense` is over our dense call.

    votes     a mask in use, and voting
    residual  the kinds of its steps, beside votes on the same masks; and the mean of a step over generations, computed
              from these by plan, beside votes that compute as many tiles
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import residual_steps
from benchmarks.attention import runs_of_tiles
from benchmarks.measure import begin, going_on, parser_of_calls
from benchmarks.peers import Contender
from lite_attention.cli.planted import planted, skipping
from lite_attention.cli.timing import Call, block
from lite_attention.cute_kernels import attention_forward
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import target_of

SHAPES = [(1, 24, 16384, 128), (2, 24, 8192, 64)]
SPARSITIES = (0.0, 0.42, 0.77)
GROUPS = ("votes", "residual")
IMPLEMENTATION = "portable"


def flash_attention_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(qh, kh, vh)

    return call


def votes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: float, **how: Any) -> Contender:
    """Return a call with a state of which about this share of the tiles is skipped, and what is."""
    plant = partial(runs_of_tiles, torch.full((q.shape[2], 1), share))
    return skipping(q, k, v, planted(q, k, v, plant, **how), **how)


def contenders(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, only: Collection[str], quantizations: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield (name, what makes it ready)."""
    target = target_of("cuda", "portable")
    for quantization in quantizations:
        how = {"quantization": quantization, "implementation": IMPLEMENTATION}
        if not target.quantizes(q.shape[3], quantization):
            continue
        for share in SPARSITIES if "votes" in only else ():
            yield f"{quantization}, mask in use, {share:.0%}", partial(votes, q, k, v, share, **how)
        for name, make in residual_steps.steps(q, k, v, **how) if "residual" in only else ():
            yield f"{quantization}, {name}", make


def measure_shape(
    sizes: tuple[int, ...],
    only: Collection[str],
    quantizations: Sequence[str],
    seconds: float,
    device: torch.device | str = "cuda",
) -> dict[str, float]:
    """Time all at one shape, print a line each, and return the ratios by name."""
    batch, heads, seq, dim = sizes
    q, k, v = (torch.randn(batch, seq, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    flops = 4 * batch * heads * seq * seq * dim
    tiles = target_of("cuda", "portable").tile_shape(dim)
    print(f"\n(B, H, S, D) = ({','.join(map(str, sizes))}), bf16, tiles {tiles}")
    columns = f"{'ratio':>7}{'ms':>9}{'FA2 ms':>9}{'TFLOP/s':>9}{'skipped':>9}{'ideal':>8}{'/ dense':>9}"
    print(f"{'':42}{columns}")

    def dense() -> Any:
        return attention_forward(q, k, v, None, scale=None, implementation=IMPLEMENTATION)

    peer, whole, ratios = flash_attention_2(q, k, v), 0.0, {}
    makes: list[tuple[str, Callable[[], Contender]]] = [("dense, without a state", lambda: (dense, 0.0))]
    makes += contenders(q, k, v, only, quantizations)
    for name, make in makes:
        with going_on(name):
            call, share = make()
            call()  # compiles outside of the blocks, and fails before the others are timed for it
            times = [block(what, seconds, device) for what in (peer, dense, call, dense, peer)]
            theirs, of_dense, ours = (times[0] + times[4]) / 2, (times[1] + times[3]) / 2, times[2]
            whole = ours if share == 0 and "step" not in name else whole
            speed, ideal = flops * (1 - share) / ours / 1e9, whole * (1 - share) / theirs
            ratios[name] = ours / theirs
            figures = f"{ours / theirs:7.3f}{ours:9.3f}{theirs:9.3f}{speed:9.0f}{share:9.1%}{ideal:8.3f}"
            print(f"{name:42}{figures}{ours / of_dense:9.3f}", flush=True)
    for name, cost, ratio, like in residual_steps.generations(ratios, [f"{name}, " for name in quantizations]):
        print(f"{name:42}{ratio:7.3f}  votes {like:.3f}  {cost:9.1%} computed", flush=True)
    return ratios


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_calls(__doc__, SHAPES, 0.5)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some contenders instead of all")
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=["none"])
    args = parser.parse_args(arguments)
    begin()
    for sizes in args.shapes:
        with going_on(f"shape {sizes}"):
            measure_shape(sizes, args.only, args.quantizations, args.seconds)


if __name__ == "__main__":
    main()
