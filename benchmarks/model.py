"""Time of one forward of a diffusers video transformer on a Hopper GPU, compiled, by what computes its self-attention.

    python -m benchmarks.model [--model 14B 1.3B LTX] [--size short long] [--layers N] [--sparsities 0 0.42 0.77]
                               [--residual 0.2,3 0.3,3] [--steps 20 50] [--only none fa3 cudnn dense ours residual]
                               [--profile] [--seconds 1.5] [--json FILE]

Random weights, since only time is measured. Each variant runs in a block of its own, the default attention of PyTorch
before and after it. Votes: skipped tiles are planted through an initial mask at threshold -inf, so nothing else
changes. The residual: steps of each kind are timed, and weighed as the plan of a generation has them. Cross-attention
is PyTorch's in all variants. Needs diffusers; FlashAttention-3 is `fa3-fwd`.

    none      no attention: the site copies v. What is missing then, is the share of attention in a step
    fa3       FlashAttention-3 as a custom op
    cudnn     PyTorch's attention, cuDNN asked for
    dense     our op without a state, called at the sites
    ours      our backend with votes, at each sparsity
    residual  our backend with the residual: KEEP,EVERY is the share kept in sparse steps, and how often one is full

`--profile` counts the GPU kernels of a step: layout copies around an op would show as more of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import lite_attention
from benchmarks.attention import SPARSITIES
from benchmarks.measure import begin, going_on, one_line
from benchmarks.model_variants import LAYERS, Variants, build, fa3, inputs_of, no_attention
from lite_attention.cli.arguments import integer, new_file, number
from lite_attention.cli.timing import Call, block
from lite_attention.ops import step_plan
from lite_attention.ops.plan import DECIDING, FULL, SPARSE
from lite_attention.presets import PRESETS

VARIANTS = ("none", "fa3", "cudnn", "dense", "ours", "residual")

Residual = tuple[float, int]  # share kept, full_every


def kernels(call: Call) -> Counter[str]:
    """Return the GPU work of a call: how often each kernel runs, copies and memsets under their own names."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))


def print_kernels(counts: dict[str, Counter[str]]) -> None:
    """Print how many kernels each variant runs, and which ones differ from the default's."""
    base = counts.get("default", Counter())
    for name, count in counts.items():
        print(f"  GPU kernels in a step, {name}: {count.total()}", flush=True)
        for sign, difference in (("+", count - base), ("-", base - count)) if name != "default" else ():
            for kernel, times in difference.most_common():
                print(f"    {sign}{times:<4}{kernel[:120]}")


def over_steps(of_kind: Mapping[int, float], plan: Sequence[int]) -> float:
    """Return the mean over the steps of a generation of what a step of each kind has."""
    return sum(of_kind[kind] for kind in plan) / len(plan)


class Timing:
    """Times variants of a forward, each against PyTorch's default, and prints a line each.

    Args:
        variants: of one model.
        seconds: length of a block.
        profiling: count GPU kernels, too.
    """

    def __init__(self, variants: Variants, seconds: float, profiling: bool) -> None:
        self.variants, self.seconds, self.profiling = variants, seconds, profiling
        self.default = variants.compiled()
        self.rows: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Counter[str]] = {}
        print(f"{'':28}{'/ default':>10}{'/ FA3':>8}{'ms':>9}{'default ms':>12}{'attention':>11}", flush=True)

    def run(
        self, only: Collection[str], shares: Collection[float], residuals: Collection[Residual], steps: Collection[int]
    ) -> None:
        """Time what is asked for."""
        self.default()
        if self.profiling:
            with going_on("profile of the default"):
                self.counts["default"] = kernels(self.default)
        self.replace(only)
        methods: dict[str, Callable[[], None]] = {
            "ours": lambda: self.votes(shares),
            "residual": lambda: self.residual(residuals, steps),
        }
        for key, measure in methods.items():
            if key in only:
                with going_on(key):
                    measure()
                lite_attention.disable(self.variants.model)
        print_kernels(self.counts)

    def replace(self, only: Collection[str]) -> None:
        """Time what stands in for PyTorch's attention, and the default."""
        made: dict[str, tuple[str, Callable[[], Call]]] = {
            "none": ("no attention", lambda: self.variants.compiled(no_attention)),
            "fa3": ("FlashAttention-3", lambda: self.variants.compiled(fa3)),
            "cudnn": ("cuDNN", lambda: self.variants.compiled(backends=SDPBackend.CUDNN_ATTENTION)),
            "dense": ("ours, dense op", lambda: self.variants.compiled(lite_attention.attention)),
        }
        for key, (name, make) in made.items():
            if key in only:
                with going_on(name):
                    self.measure(name, make())
        if self.rows:
            self.show("default", self.default_ms, self.default_ms, self.around)

    def votes(self, shares: Collection[float]) -> None:
        """Time votes at each sparsity."""
        call = self.variants.ours()
        for share in shares:
            skipped = self.variants.plant(call, share)
            self.measure(f"ours, {skipped:.1%} skipped", call)

    def residual(self, residuals: Collection[Residual], steps: Collection[int]) -> None:
        """Time steps of each kind, and show their means over generations."""
        call = self.variants.residual()
        of_kind: dict[int, float] = {}
        for kind, name in ((FULL, "residual, full step"), (DECIDING, "residual, deciding step")):
            self.variants.become(call, kind, min(keep for keep, _ in residuals))
            of_kind[kind] = self.measure(name, call)
        of_sparse: dict[float, float] = {}
        for keep in dict.fromkeys(keep for keep, _ in residuals):
            skipped = self.variants.become(call, SPARSE, keep)
            of_sparse[keep] = self.measure(f"residual, {1 - skipped:.0%} kept", call)
        for (keep, every), count in itertools.product(residuals, steps):
            ratio = over_steps({**of_kind, SPARSE: of_sparse[keep]}, step_plan(count, full_every=every))
            self.show(f"residual {keep:g},{every}, {count} steps", ratio * self.default_ms, self.default_ms, [])

    @property
    def around(self) -> list[float]:
        """Times of the default before and after each block, ms."""
        return [ms for row in self.rows.values() for ms in row["default_ms"]]

    @property
    def default_ms(self) -> float:
        """Their mean."""
        return sum(self.around) / len(self.around)

    def measure(self, name: str, call: Call) -> float:
        """Time a variant, and return its time over the default's."""
        call()  # compiles outside of the blocks
        before, time, after = (block(what, self.seconds) for what in (self.default, call, self.default))
        self.show(name, time, (before + after) / 2, [before, after])
        kind = "ours, skipping" if name.endswith("skipped") else name  # the same code at all sparsities
        if self.profiling and kind not in self.counts:
            self.counts[kind] = kernels(call)
        return time / ((before + after) / 2)

    def show(self, name: str, ms: float, peer: float, around: list[float]) -> None:
        """Print a line, and keep it."""
        ratio = ms / peer
        row = self.rows[name] = {"name": name, "ratio": ratio, "ms": ms, "default_ms": around}
        cells = ["", ""]
        if "FlashAttention-3" in self.rows:
            row["ratio_to_fa3"] = ratio / self.rows["FlashAttention-3"]["ratio"]
            cells[0] = f"{row['ratio_to_fa3']:.3f}"
        if "no attention" in self.rows:
            row["attention_share"] = 1 - self.rows["no attention"]["ratio"] / ratio
            cells[1] = f"{row['attention_share']:.1%}"
        print(f"{name:28}{ratio:10.3f}{cells[0]:>8}{ms:9.1f}{peer:12.1f}{cells[1]:>11}", flush=True)


def residual(text: str) -> Residual:
    """Return (keep, full_every) of what the command line says, as "0.3,3"."""
    keep, _, every = text.partition(",")
    return number(above=0, most=1)(keep), integer(1)(every)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=LAYERS, nargs="+", default=["14B"], help="Wan 14B unless given; LTX is LTX-Video 2B"
    )
    parser.add_argument(
        "--size",
        choices=("short", "long"),
        nargs="+",
        default=["short", "long"],
        help="of the video, both unless given",
    )
    parser.add_argument("--layers", type=integer(1), help="2 of Wan, 4 of LTX-Video, unless given")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=VARIANTS, help="some variants instead of all")
    parser.add_argument(
        "--sparsities", type=number(least=0, most=1), nargs="+", default=SPARSITIES, help="shares of tiles skipped"
    )
    parser.add_argument(
        "--residual", type=residual, nargs="+", default=[*map(tuple, PRESETS.values())], metavar="KEEP,EVERY",
        help="share kept in sparse steps, and how often one is full; those of the presets unless given",
    )  # fmt: skip
    parser.add_argument("--steps", type=integer(1), nargs="+", default=[20, 50], help="of generations by the residual")
    parser.add_argument("--profile", action="store_true", help="count the GPU kernels of a step")
    parser.add_argument("--seconds", type=number(above=0), default=1.5, help="length of a block")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)
    about = begin()
    torch._dynamo.config.recompile_limit = 64  # the variants of a model are compiled code of one function
    rows: list[dict[str, Any]] = []
    for name in args.model:
        layers = args.layers or LAYERS[name]
        model = build(name, layers)
        for size in args.size:
            inputs, tokens = inputs_of(name, size)
            label = {"model": name if name == "LTX" else f"Wan {name}", "layers": layers, "tokens": tokens}
            print(f"\n{one_line(label)}, bf16, torch.compile")
            with going_on(f"{name}, {size}"):
                timing = Timing(Variants(model, inputs), args.seconds, args.profile)
                timing.run(args.only, args.sparsities, args.residual, args.steps)
                rows += [{**label, **row} for row in timing.rows.values()]
                model._compiled_call_impl = None
                torch._dynamo.reset()
            if args.json:
                args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
