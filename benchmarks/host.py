"""Host time of attention: what the CPU spends on a call before it can go on, however long the GPU takes.

    python -m benchmarks.host [--sites 8] [--json FILE]

Every timed call starts on an idle GPU and launches far fewer kernels than its queue holds, so the GPU is never waited
for. In compiled graphs a site is one small fused kernel that makes q, k and v, and the attention; its time is the
difference of graphs of N and of 2N sites, over N, so what a call costs once (guards, arguments) is not in it. The op
that does nothing allocates an output and launches nothing: the least that any site takes. Under CUDA graphs the whole
graph is replayed with one launch.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import lite_attention
from benchmarks.measure import begin, going_on
from benchmarks.peers import fa3
from lite_attention.cli.arguments import integer, new_file
from lite_attention.cli.timing import Call
from lite_attention.ops import SkipState

DEVICE = "cuda"
SHAPE = (1, 256, 1, 128)  # (B, S, H, D): two or more tiles each way

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Make = Callable[[], Attend]  # called for each site: it may have a state

_library = torch.library.Library("lite_attention_benchmarks", "DEF")
_library.define("nothing(Tensor q, Tensor k, Tensor v) -> Tensor")
_library.impl("nothing", lambda q, k, v: torch.empty_like(q), "CompositeExplicitAutograd")
nothing = torch.ops.lite_attention_benchmarks.nothing.default


class SDPA(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tokens = torch.empty(SHAPE, device=DEVICE, dtype=torch.bfloat16)
        self.state = SkipState.for_inputs(tokens, tokens, slots=1, num_steps=50)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return lite_attention.skip_attention(q, k, v, self.state)


class Site(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, SHAPE[-1]), requires_grad=False)
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x * self.weight[0], x * self.weight[1], x * self.weight[2])


def liteattn() -> Any:
    return lite_attention.LiteAttentionBackend(threshold=-10.0, num_steps=50, slots=1)


# name -> (what a site calls, the backend of torch.compile)
COMPILED: dict[str, tuple[Make, Callable[[], Any]]] = {
    "an op that does nothing": (lambda: nothing, lambda: "inductor"),
    "PyTorch's SDPA": (SDPA, lambda: "inductor"),
    "ours, attention": (lambda: lite_attention.attention, lambda: "inductor"),
    "ours, skip_attention": (Skipping, lambda: "inductor"),
    'ours, backend="liteattn"': (SDPA, liteattn),
}
REPLAYED = ("PyTorch's SDPA", "ours, skip_attention", 'ours, backend="liteattn"')


def host_us(call: Call, repeats: int = 300) -> float:
    """Return the median host time of a call in us; it must launch no more than some hundred kernels."""
    for _ in range(10):  # compiles, warms up, records CUDA graphs
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def eager_us(call: Call, calls: int = 100) -> float:
    """Return the host time of a call in us among many in a row."""

    def row() -> None:
        for _ in range(calls):
            call()

    return host_us(row, repeats=20) / calls


def eager() -> dict[str, Callable[[], Call]]:
    """Return what makes eager calls, by name, on one head and a few tokens."""
    q = torch.randn(SHAPE, device=DEVICE, dtype=torch.bfloat16)
    state = SkipState.for_inputs(q, q, slots=1)
    op = torch.ops.lite_attention.skip_attention.default
    arguments = (q, q, q, state.skip_mask, state.control, state.threshold, None, None, None)
    options = {"scale": None, "tile_m": state.tile_m, "tile_n": state.tile_n}

    return {
        "PyTorch's SDPA": lambda: functools.partial(SDPA().forward, q, q, q),
        "FlashAttention-3": lambda: fa3(q, q, q)[0],
        "ours, attention": lambda: functools.partial(lite_attention.attention, q, q, q),
        "ours, skip_attention": lambda: functools.partial(lite_attention.skip_attention, q, q, q, state),
        "ours, the op itself": lambda: functools.partial(op, *arguments, **options),
    }


def compiled_us(make: Make, backend: Any, sites: int, mode: str | None) -> float:
    """Return the host time in us of a compiled graph with so many sites."""
    torch._dynamo.reset()
    model = nn.Sequential(*(Site(make()) for _ in range(sites))).to(DEVICE, torch.bfloat16).eval()
    compiled: Any = torch.compile(model, backend=backend, mode=mode, fullgraph=True)
    x = torch.randn(SHAPE, device=DEVICE, dtype=torch.bfloat16)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    result = host_us(lambda: compiled(x))
    if backend != "inductor":
        swapped = len(lite_attention.report(model, file=io.StringIO()).swapped)
        if swapped != sites:
            raise RuntimeError(f"{swapped} of {sites} sites were swapped")
    if mode is not None and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] > skips:
        raise RuntimeError("inductor made no CUDA graph of it")
    return result


def report_host(sites: int = 8) -> list[dict[str, Any]]:
    """Measure and print all host times."""
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        print(f"\nhost time of one eager call, us, (B, S, H, D) = {SHAPE}, bf16")
        for name, make_call in eager().items():
            with going_on(name):
                rows.append({"kind": "eager", "name": name, "us": eager_us(make_call())})
                print(f"  {name:34}{rows[-1]['us']:8.1f}", flush=True)
        for mode in (None, "reduce-overhead"):
            kind = "compiled" if mode is None else "CUDA graphs"
            what = "compiled graph" if mode is None else 'replayed CUDA graph (mode="reduce-overhead")'
            print(f"\nhost time in a {what}, us{'a site':>12}{f'{sites} sites':>12}{f'{2 * sites} sites':>12}")
            for name in COMPILED if mode is None else REPLAYED:
                make, backend = COMPILED[name]
                with going_on(name):
                    one, two = (compiled_us(make, backend(), count, mode) for count in (sites, 2 * sites))
                    site = (two - one) / sites
                    rows.append({"kind": kind, "name": name, "us": site, "sites": sites, "calls_us": [one, two]})
                    print(f"  {name:34}{site:10.1f}{one:12.1f}{two:12.1f}", flush=True)
    torch._dynamo.reset()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=integer(1), default=8, help="N: sites of the smaller graph")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)
    about = begin()
    rows = report_host(args.sites)
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
