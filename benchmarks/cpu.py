"""Time of skip_attention on the CPU relative to torch's scaled_dot_product_attention, by share of tiles skipped.

python -m benchmarks.cpu [--repeats 7] [--shape 1,8,4096,64] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lite_attention.cli.arguments import integer, new_file, shape
from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops.tiles import ceil_div, tile_shape

PLANTED = (0.25, 0.50, 0.75, 0.90)


def planted_mask(share: float, heads: int, q_tiles: int, k_tiles: int) -> torch.Tensor:
    """Return an initial mask that skips this share of the tiles of every row, at random places."""
    places = torch.rand(1, heads, q_tiles, k_tiles).argsort(-1)
    return places < round(share * k_tiles)


def variants(batch: int, heads: int, seq: int, dim: int) -> dict[str, tuple[Callable[[], Any], SkipState | None]]:
    """Return name -> (call, its state); all attend with the same tensors."""
    q, k, v = (torch.randn(batch, heads, seq, dim) for _ in range(3))
    views = [x.transpose(1, 2) for x in (q, k, v)]
    tile_m, tile_n = tile_shape(dim, q.dtype, q.device)
    tiles = (ceil_div(seq, tile_m), ceil_div(seq, tile_n))

    def skipping(**options: Any) -> tuple[Callable[[], Any], SkipState]:
        query, key, value = views
        state = SkipState.for_inputs(query, key, slots=1, **options)
        return lambda: skip_attention(query, key, value, state), state

    return {
        "torch SDPA": (lambda: F.scaled_dot_product_attention(q, k, v), None),
        "threshold -inf": skipping(threshold=-math.inf),
        "voting, threshold -10": skipping(threshold=-10.0),
        **{
            f"initial mask, {share:.0%}": skipping(threshold=-math.inf, initial_mask=planted_mask(share, heads, *tiles))
            for share in PLANTED
        },
    }


def measure(calls: dict[str, tuple[Callable[[], Any], SkipState | None]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each variant, taken in turns: what else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, (call, _) in calls.items():
            start = time.perf_counter()
            call()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=integer(1), default=7, help="rounds; each variant runs once a round")
    parser.add_argument("--shape", type=shape, default="1,8,4096,64", help="batch,heads,seq_len,head_dim")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--threads", type=integer(1), help="as torch chooses, unless given")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    calls = variants(*args.shape)
    seconds = measure(calls, args.repeats)
    rows = []
    for name, (_, state) in calls.items():
        ratios = [own / peer for own, peer in zip(seconds[name], seconds["torch SDPA"], strict=True)]
        rows.append(
            {
                "variant": name,
                "skipped": float(state.sparsity()) if state else 0.0,
                "median_ms": 1e3 * statistics.median(seconds[name]),
                "relative": statistics.median(ratios),
            }
        )
    about = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "shape": list(args.shape),
        "dtype": "float32",
        "repeats": args.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':24}{'skipped':>10}{'median ms':>12}{'x SDPA':>10}")
    for row in rows:
        print(f"{row['variant']:24}{row['skipped']:>10.1%}{row['median_ms']:>12.1f}{row['relative']:>10.2f}")
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
