"""Time of one attention call on a Hopper GPU, as a ratio to FlashAttention-3 dense on the same tensors.

    python benchmarks/attention.py [--shapes 1,40,32760,128 ...] [--seconds 1.5] [--json FILE] [--plot FILE]

Needs `pip install fa3-fwd`; measures FlashAttention-4 (`flash-attn-4`) too where installed. Each kernel runs in a
block of its own, FA3 before and after it: the card is limited by power, and single calls in turn would lend clock from
one kernel to the other. A figure is the median of the second half of a block.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lite_attention
from lite_attention.ops import SkipState
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.control import FLAG_DENSE

Call = Callable[[], Any]

SHAPES = ["1,40,32760,128", "1,40,75600,128", "1,12,32760,128", "1,32,11264,128", "2,24,16384,128", "4,16,4096,64"]
SHAPES += ["2,24,16384,64"]
SPARSITIES = (0.0, 0.21, 0.42, 0.57, 0.77)
NO_VOTE = -60.0  # random inputs: nothing is voted out, so the planted mask stays


def block(call: Call, seconds: float) -> float:
    """Return the median time of a call in ms, over the second half of a block."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[len(times) // 2 :])


def runs_of_tiles(share: torch.Tensor, q_tiles: int, k_tiles: int) -> torch.Tensor:
    """Return bool [heads, q_tiles, k_tiles], True = skipped: four runs a row at random places; share is [heads, 1]."""
    quarter = k_tiles / 4
    length = (share.unsqueeze(-1) * quarter).round()
    start = torch.arange(4) * quarter + torch.rand(len(share), q_tiles, 4) * (quarter - length).clamp(min=0)
    tile = torch.arange(k_tiles).view(-1, 1)
    start, length = start.floor().unsqueeze(-2), length.unsqueeze(-2)
    return ((tile >= start) & (tile < start + length)).any(-1)


def planted(q: torch.Tensor, share: torch.Tensor) -> SkipState:
    """Return a state in use, of which about this share of the tiles of each head is skipped."""
    state = SkipState.for_inputs(q, q, threshold=NO_VOTE, slots=1)
    lite_attention.skip_attention(q, q, q, state)  # from now on the step is not fresh
    _, batch, heads, q_tiles, _ = state.skip_mask.shape
    k_tiles = -(-q.shape[1] // state.tile_n)
    mask = runs_of_tiles(share.expand(heads, 1), q_tiles, k_tiles)
    state.skip_mask[0] = pack_bits(mask).to(q.device).expand(batch, -1, -1, -1)
    return state


def accumulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SkipState:
    """Return a state whose mask was voted, on clustered inputs over a few steps."""
    state = SkipState.for_inputs(q, k, threshold=-4.0, slots=1)
    for _ in range(3):
        lite_attention.skip_attention(q, k, v, state)
    return state


def contenders(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Call, float]]:
    """Yield (name, call, share of tiles skipped)."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]

    def cudnn() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*heads_first)

    yield "cuDNN", cudnn, 0.0
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        print("  (flash-attn-4 is not installed)")
    else:
        yield "FlashAttention-4", lambda: flash_attn_func(q, k, v), 0.0
    dense = SkipState.for_inputs(q, k)
    dense.set_flag(FLAG_DENSE, True)
    yield "ours, dense", lambda: lite_attention.skip_attention(q, k, v, dense), 0.0
    for share in SPARSITIES:
        state = planted(q, torch.tensor([[share]]))
        call = lambda state=state: lite_attention.skip_attention(q, k, v, state)  # noqa: E731
        yield f"ours, mask in use, {share:.0%}", call, state.sparsity().item()
    heads = q.shape[2]
    uneven = planted(q, torch.where(torch.arange(heads) % 2 == 0, 0.2, 0.8).unsqueeze(-1))
    even = planted(q, torch.tensor([[0.5]]))
    yield (
        "ours, half the heads 20 %, half 80 %",
        lambda: lite_attention.skip_attention(q, k, v, uneven),
        (uneven.sparsity().item()),
    )
    yield "ours, all heads 50 %", lambda: lite_attention.skip_attention(q, k, v, even), even.sparsity().item()
    clusters = torch.randn(32, 1, q.shape[3], device=q.device)
    which = torch.arange(q.shape[1], device=q.device) * 32 // q.shape[1]
    qc, kc = ((0.8 * clusters[which] + 0.5 * torch.randn_like(q)).to(q.dtype) for _ in range(2))
    real = accumulated(qc, kc, v)
    yield (
        "ours, voted mask, clustered inputs",
        lambda: lite_attention.skip_attention(qc, kc, v, real),
        (real.sparsity().item()),
    )


def host_time(calls: int = 200) -> float:
    """Return the host time of one eager call in us, on a problem so small that the GPU never lags."""
    q = torch.randn(1, 128, 1, 128, device="cuda", dtype=torch.bfloat16)
    state = SkipState.for_inputs(q, q)
    op = torch.ops.lite_attention.skip_attention.default
    arguments = (q, q, q, state.skip_mask, state.control, state.threshold, None, None, None)
    options = {"scale": None, "tile_m": state.tile_m, "tile_n": state.tile_n}
    with torch.inference_mode():
        best = float("inf")
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                op(*arguments, **options)
            best = min(best, (time.perf_counter() - start) / calls)
            torch.cuda.synchronize()
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,H,S,D")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a block")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    from fa3_fwd_interface import flash_attn_func

    where = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"host time of a call: {host_time():.1f} us")
    rows = []
    for text in args.shapes:
        batch, heads, seq, dim = map(int, text.split(","))
        q, k, v = (torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        flops = 4 * batch * heads * seq * seq * dim
        print(f"\n(B, H, S, D) = ({text}), bf16\n{'':42}{'ratio':>7}{'ms':>9}{'FA3 ms':>9}{'TFLOP/s':>9}{'skipped':>9}")

        def fa3(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> Any:
            return flash_attn_func(q, k, v)

        for name, call, share in contenders(q, k, v):
            before, ours, after = block(fa3, args.seconds), block(call, args.seconds), block(fa3, args.seconds)
            peer = (before + after) / 2
            speed = flops * (1 - share) / ours / 1e9
            print(f"{name:42}{ours / peer:7.3f}{ours:9.3f}{peer:9.3f}{speed:9.0f}{share:9.1%}", flush=True)
            rows.append({
                "shape": text, "name": name, "ratio": ours / peer, "ms": ours, "fa3_ms": [before, after],
                "tflops": speed, "skipped": share,
            })  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps({**where, "rows": rows}, indent=1))
    if args.plot:
        draw(rows, where, args.plot)


def draw(rows: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Draw TFLOP/s over length, and time over sparsity with the ideal line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, time_axis = figure.subplots(1, 2)
    wide = [r for r in rows if r["shape"].endswith(",128")]

    def plot(label: str, name: str, factor: Callable[[dict[str, Any]], float] = lambda r: 1.0) -> None:
        points = sorted((int(r["shape"].split(",")[2]), r["tflops"] * factor(r)) for r in wide if r["name"] == name)
        if points:
            speed.plot(*zip(*points, strict=True), "o-", label=label)

    plot("ours, dense", "ours, dense")
    plot("FlashAttention-3", "ours, dense", lambda r: r["ratio"])
    for name in ("FlashAttention-4", "cuDNN"):
        plot(name, name)
    speed.set(xlabel="tokens", ylabel="TFLOP/s", title="Dense attention, bf16, head dim 128", ylim=(0, None))
    speed.legend()
    for shape in dict.fromkeys(r["shape"] for r in rows):
        found = [(r["skipped"], r["ratio"]) for r in rows if r["shape"] == shape and "in use" in r["name"]]
        time_axis.plot(*zip(*found, strict=True), "o-", label=f"({shape})")
    time_axis.plot([0, 1], [1, 0], "k:", label="ideal: FA3 x (1 - skipped)")
    time_axis.set(xlabel="share of tiles skipped", ylabel="time / FlashAttention-3 dense", title="Skipping, bf16")
    time_axis.legend(fontsize=8)
    figure.suptitle(f"{where['device']}, torch {where['torch']}, {where['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
