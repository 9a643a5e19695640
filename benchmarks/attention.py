"""Time of one attention call on a Hopper GPU, as a ratio to FlashAttention-3 dense on the same tensors.

    python -m benchmarks.attention [--only dense sparse int8 residual uneven voted host]
                                   [--peers cudnn flex fa4 fa3-fp8 sage sol-1 sol-1.3 sol-1.5]
                                   [--shapes 1,40,32760,128 ...] [--seconds 1.5] [--json FILE] [--plot FILE]

Needs `pip install fa3-fwd`, and `flash-attn-4` for the peer fa4, `sageattention` for sage, `comfy-kitchen` for sol,
which has tau behind it. Each kernel runs in a block of its own, FA3 before and after it: the card is limited by power,
and single calls in turn would lend clock from one kernel to the other. A figure is the median of the second half of a
block. A contender takes about 3 blocks of time at each shape, FlexAttention and kernels of ours that are not in the
cache some seconds more to compile. SQNR is that of the output against FA3's, where nothing is skipped.

    dense     the peers, our op without a state, and the same with a state whose dense flag is set
    sparse    a planted mask in use, and voting; FlexAttention with the same kind of mask, its tiles being 128 x 128
    int8      INT8 scores, and FP8 values besides, what it takes to quantize included: dense flag, and a planted mask;
              of the peers those in 8 bits
    residual  the kinds of its steps, beside votes on the same mask; and the mean of a step over generations, computed
              from these by plan, beside votes that compute as many tiles
    uneven    half the heads at 20 %, half at 80 %, against all at 50 %
    voted     a mask voted on clustered inputs
    host      host time of a call: see host.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lite_attention
from benchmarks import peers, residual_steps
from benchmarks.host import report_host
from benchmarks.measure import begin, going_on, parser_of_calls
from benchmarks.peers import Contender
from lite_attention.cli.arguments import new_file, picture
from lite_attention.cli.planted import planted, skipping
from lite_attention.cli.timing import block
from lite_attention.ops import SkipState
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.tiles import tile_shape

SHAPES = [(1, 40, 32760, 128), (1, 40, 75600, 128), (1, 12, 32760, 128), (1, 32, 11264, 128), (2, 24, 16384, 128)]
SHAPES += [(4, 16, 4096, 64), (2, 24, 16384, 64)]
SPARSITIES = (0.0, 0.21, 0.42, 0.57, 0.77)
SOME_SPARSITIES = (0.42, 0.77)
QUANTIZED = {"INT8": "int8", "INT8 and FP8": "int8_fp8"}
GROUPS = ("dense", "sparse", "int8", "residual", "uneven", "voted", "host")
PEERS: dict[str, tuple[str, Callable[..., Contender]]] = {
    "cudnn": ("cuDNN", peers.cudnn), "flex": ("FlexAttention", peers.flex), "fa4": ("FlashAttention-4", peers.fa4),
    "fa3-fp8": ("FlashAttention-3, FP8", peers.fa3_fp8), "sage": ("SageAttention", peers.sage),
    **{f"sol-{tau:g}": (f"Sol-Attn, tau {tau:g}", partial(peers.sol, tau=tau)) for tau in (1.0, 1.3, 1.5)},
}  # fmt: skip
IN_8_BITS = ("fa3-fp8", "sage")


def runs_of_tiles(share: torch.Tensor, q_tiles: int, k_tiles: int) -> torch.Tensor:
    """Return bool [heads, q_tiles, k_tiles], True = skipped: four runs a row at random places; share is [heads, 1]."""
    quarter = k_tiles / 4
    length = (share.unsqueeze(-1) * quarter).round()
    start = torch.arange(4) * quarter + torch.rand(len(share), q_tiles, 4) * (quarter - length).clamp(min=0)
    tile = torch.arange(k_tiles).view(-1, 1)
    start, length = start.floor().unsqueeze(-2), length.unsqueeze(-2)
    return ((tile >= start) & (tile < start + length)).any(-1)


def accumulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SkipState:
    """Return a state whose mask was voted, on clustered inputs over a few steps."""
    state = SkipState.for_inputs(q, k, threshold=-4.0, slots=1)
    for _ in range(3):
        lite_attention.skip_attention(q, k, v, state)
    return state


def dense_flag(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, quantization: str = "none") -> Contender:
    state = SkipState.for_inputs(q, k, quantization=quantization)
    state.set_flag(FLAG_DENSE, True)
    return lambda: lite_attention.skip_attention(q, k, v, state, quantization=quantization), 0.0


def quantizing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, quantization: str) -> Contender:
    """What a quantization does before its kernel."""
    ops = torch.ops.lite_attention
    _, tile_n = tile_shape(q.shape[3], q.dtype, q.device, quantization)

    def call() -> None:
        mean = ops.key_mean(k, None)
        ops.quantize_query(q, mean, scale=None)
        ops.quantize_key(k, mean, None, tile_n=tile_n)
        if QUANTIZATIONS[quantization].values is not None:
            ops.quantize_value(v, None)

    return call, 0.0


def stateless(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    attention = lite_attention.attention
    return lambda: attention(q, k, v), 0.0


def voted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    clusters = torch.randn(32, 1, q.shape[3], device=q.device)
    which = torch.arange(q.shape[1], device=q.device) * 32 // q.shape[1]
    qc, kc = ((0.8 * clusters[which] + 0.5 * torch.randn_like(q)).to(q.dtype) for _ in range(2))
    return skipping(qc, kc, v, accumulated(qc, kc, v))


def contenders(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, only: Collection[str], others: Collection[str]
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Yield (name, what makes it ready)."""
    heads = q.shape[2]

    def planting(share: float | torch.Tensor, quantization: str = "none") -> Contender:
        shares = torch.as_tensor(share).reshape(-1, 1).expand(heads, 1)
        state = planted(q, k, v, partial(runs_of_tiles, shares), quantization=quantization)
        return skipping(q, k, v, state, quantization=quantization)

    def flex_planted(share: float) -> Contender:
        return peers.flex(q, k, v, partial(runs_of_tiles, torch.full((heads, 1), share)))

    for peer in others:
        if "dense" in only or ("int8" in only and peer in IN_8_BITS):
            name, make = PEERS[peer]
            yield name, partial(make, q, k, v)
    if "dense" in only:
        yield "ours, dense", partial(stateless, q, k, v)
        yield "ours, dense flag", partial(dense_flag, q, k, v)
    if "sparse" in only:
        for share in SPARSITIES:
            yield f"ours, mask in use, {share:.0%}", partial(planting, share)
        for share in SOME_SPARSITIES if "flex" in others else ():
            yield f"FlexAttention, mask, {share:.0%}", partial(flex_planted, share)
    for name, quantization in QUANTIZED.items() if "int8" in only else ():
        yield f"ours, {name}, dense flag", partial(dense_flag, q, k, v, quantization)
        yield "of that, quantizing", partial(quantizing, q, k, v, quantization)
        for share in SOME_SPARSITIES:
            yield f"ours, {name}, mask in use, {share:.0%}", partial(planting, share, quantization)
    if "residual" in only:
        yield from residual_steps.contenders(q, k, v)
    if "uneven" in only:
        shares = torch.where(torch.arange(heads) % 2 == 0, 0.2, 0.8)
        yield "ours, half the heads 20 %, half 80 %", partial(planting, shares)
        yield "ours, all heads 50 %", partial(planting, 0.5)
    if "voted" in only:
        yield "ours, voted mask, clustered inputs", partial(voted, q, k, v)


def sqnr(out: Any, reference: Any) -> float:
    """Return the signal-to-quantization-noise ratio of an output, dB; each may come with an LSE behind it."""
    out, reference = (x[0] if isinstance(x, tuple) else x for x in (out, reference))
    out = out if out.shape == reference.shape else out.transpose(1, 2)
    noise = (out.float() - reference.float()).square().mean()
    return float(10 * torch.log10(reference.float().square().mean() / noise))


def measure_shape(
    sizes: tuple[int, ...], only: Collection[str], others: Collection[str], seconds: float
) -> list[dict[str, Any]]:
    """Time all contenders at one shape, and print a line each."""
    batch, heads, seq, dim = sizes
    text = ",".join(map(str, sizes))
    torch._dynamo.reset()  # FlexAttention is compiled for each shape: it must not run into the limit of recompiles
    q, k, v = (torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flops = 4 * batch * heads * seq * seq * dim
    columns = f"{'ratio':>7}{'ms':>9}{'FA3 ms':>9}{'TFLOP/s':>9}{'skipped':>9}{'SQNR':>9}"
    print(f"\n(B, H, S, D) = ({text}), bf16\n{'':42}{columns}")
    fa3, _ = peers.fa3(q, k, v)
    rows: list[dict[str, Any]] = []
    for name, make in contenders(q, k, v, only, others):
        with going_on(name):
            call, share = make()
            out = call()  # compiles outside of the blocks, and fails before FA3 is timed for it
            decibels = None if share or out is None else sqnr(out, fa3())
            del out
            before, ours, after = block(fa3, seconds), block(call, seconds), block(fa3, seconds)
            peer = (before + after) / 2
            speed = flops * (1 - share) / ours / 1e9
            quality = "" if decibels is None else f"{decibels:6.1f} dB"
            print(f"{name:42}{ours / peer:7.3f}{ours:9.3f}{peer:9.3f}{speed:9.0f}{share:9.1%}{quality}", flush=True)
            rows.append({
                "shape": text, "name": name, "ratio": ours / peer, "ms": ours, "fa3_ms": [before, after],
                "tflops": speed, "skipped": share, "sqnr": decibels,
            })  # fmt: skip
    for name, cost, ratio, like in residual_steps.generations({row["name"]: row["ratio"] for row in rows}):
        print(f"{name:42}{ratio:7.3f}  votes {like:.3f}  {cost:9.1%} computed", flush=True)
        rows.append({"shape": text, "name": name, "ratio": ratio, "votes": like, "computed": cost})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of_calls(__doc__, SHAPES, 1.5)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some contenders instead of all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["cudnn"], help="beside FlashAttention-3")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the figures there")
    args = parser.parse_args(arguments)

    about = begin()
    result: dict[str, Any] = {**about, "rows": []}
    if "host" in args.only:
        with going_on("host time"):
            result["host"] = report_host()
    for sizes in args.shapes if set(args.only) - {"host"} else ():
        with going_on(f"shape {sizes}"):
            result["rows"] += measure_shape(sizes, args.only, args.peers, args.seconds)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        draw(result["rows"], about, args.plot)


def draw(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
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
    for name in ("FlashAttention-4", "FlexAttention", "cuDNN"):
        plot(name, name)
    speed.set(xlabel="tokens", ylabel="TFLOP/s", title="Dense attention, bf16, head dim 128", ylim=(0, None))
    speed.legend()
    for text in dict.fromkeys(r["shape"] for r in rows):
        found = [
            (r["skipped"], r["ratio"]) for r in rows if r["shape"] == text and r["name"].startswith("ours, mask in use")
        ]
        if found:
            time_axis.plot(*zip(*found, strict=True), "o-", label=f"({text})")
    time_axis.plot([0, 1], [1, 0], "k:", label="ideal: FA3 x (1 - skipped)")
    time_axis.set(xlabel="share of tiles skipped", ylabel="time / FlashAttention-3 dense", title="Skipping, bf16")
    time_axis.legend(fontsize=8)
    figure.suptitle(f"{about['device']}, torch {about['torch']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
