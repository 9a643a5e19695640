"""Time of one forward of a diffusers video transformer on a Hopper GPU, compiled, by what computes its self-attention.

    python -m benchmarks.model [--model 14B 1.3B LTX] [--size short long] [--layers N] [--sparsities 0 0.42 0.77]
                               [--only none fa3 cudnn dense ours] [--profile] [--seconds 1.5] [--json FILE]

Random weights, since only time is measured. Each variant runs in a block of its own, the default attention of PyTorch
before and after it. Skipped tiles are planted through an initial mask at threshold -inf, so nothing else changes.
Cross-attention is PyTorch's in all variants. Needs diffusers; FlashAttention-3 is `fa3-fwd`.

    none      no attention: the site copies v. What is missing then, is the share of attention in a step
    fa3       FlashAttention-3 as a custom op
    cudnn     PyTorch's attention, cuDNN asked for
    dense     our op without a state, called at the sites
    ours      our backend, at each sparsity

`--profile` counts the GPU kernels of a step: layout copies around an op would show as more of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import lite_attention
from benchmarks.attention import SPARSITIES, runs_of_tiles
from benchmarks.measure import Call, block, going_on, one_line, require_gpu, where
from lite_attention.cli.arguments import integer, number
from lite_attention.ops.bitmask import pack_bits

DEVICE = "cuda"
WAN = {"1.3B": (12, 8960), "14B": (40, 13824)}  # heads of 128, width of the feed-forward
LAYERS = {"1.3B": 2, "14B": 2, "LTX": 4}  # enough that the rest of a step is small beside them
# Frames, height and width of the latent. Wan: 81 frames, 480p and 720p, of which 1x2x2 make a token; LTX-Video: 121
# frames of 768x512 and 257 of 1216x704.
LATENTS = {
    "Wan": {"short": (21, 60, 104), "long": (21, 90, 160)},
    "LTX": {"short": (16, 16, 24), "long": (33, 22, 38)},
}
VARIANTS = ("none", "fa3", "cudnn", "dense", "ours")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (B, S, H, D)
SDPA: Callable[..., torch.Tensor] = functional.scaled_dot_product_attention


@torch.library.custom_op("lite_attention_benchmarks::fa3", mutates_args=())
def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return attended


@torch.library.custom_op("lite_attention_benchmarks::no_attention", mutates_args=())
def no_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Copy v, so that q and k are still computed: returned as it is, v would let the compiler drop them."""
    return v.clone(memory_format=torch.contiguous_format)


@fa3.register_fake
@no_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def build(name: str, layers: int) -> nn.Module:
    with torch.device(DEVICE):
        if name == "LTX":
            model: Any = LTXVideoTransformer3DModel(num_layers=layers)
        else:
            heads, ffn_dim = WAN[name]
            model = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_dim, num_layers=layers, in_channels=16,
                out_channels=16, text_dim=4096,
            )  # fmt: skip
    ready: nn.Module = model.to(torch.bfloat16).eval().requires_grad_(False)
    return ready


def inputs_of(name: str, size: str) -> tuple[dict[str, Any], int]:
    """Return the arguments of a forward, and the number of tokens."""
    frames, height, width = LATENTS["LTX" if name == "LTX" else "Wan"][size]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    timestep = torch.tensor([500.0], device=DEVICE)
    if name != "LTX":
        latent, text = noise(1, 16, frames, height, width), noise(1, 512, 4096)
        tokens = frames * height * width // 4
        return {"hidden_states": latent, "timestep": timestep, "encoder_hidden_states": text}, tokens
    tokens = frames * height * width
    return {
        "hidden_states": noise(1, tokens, 128), "timestep": timestep, "encoder_hidden_states": noise(1, 128, 4096),
        "encoder_attention_mask": torch.ones(1, 128, device=DEVICE), "num_frames": frames, "height": height,
        "width": width,
    }, tokens  # fmt: skip


def instead_of_sdpa(attend: Attend) -> Callable[..., torch.Tensor]:
    """Return what takes the place of PyTorch's attention where queries and keys are alike and nothing is masked."""

    def function(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        if attn_mask is not None or query.shape != key.shape:
            return SDPA(query, key, value, attn_mask=attn_mask, **rest)
        out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return out.transpose(1, 2)

    return function


@contextlib.contextmanager
def sdpa_is(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let diffusers' native attention backend find a function in the place of scaled_dot_product_attention."""
    functional.scaled_dot_product_attention = function
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = SDPA


class Variants:
    """Compiled forms of one model that share its weights; a call puts its own in place first."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs

    @torch.inference_mode()
    def step(self) -> Any:
        return self.model(**self.inputs, return_dict=False)

    def compiled(self, attend: Attend | None = None, backends: SDPBackend | None = None) -> Call:
        """Return a step, compiled by inductor.

        Args:
            attend: what self-attention calls; None = PyTorch's.
            backends: what PyTorch's attention may use; None = all.
        """
        from torch._inductor.compile_fx import compile_fx

        def inductor(gm: Any, example_inputs: Any) -> Any:  # a function of its own: dynamo shares code by backend
            return compile_fx(gm, example_inputs)

        function = SDPA if attend is None else instead_of_sdpa(attend)
        self.model._compiled_call_impl = None
        self.model.compile(backend=inductor)
        implementation = self.model._compiled_call_impl

        def call() -> Any:
            self.model._compiled_call_impl = implementation
            chosen = contextlib.nullcontext() if backends is None else sdpa_kernel(backends)
            with sdpa_is(function), chosen:
                return self.step()

        return call

    def ours(self) -> Call:
        """Return a step with our backend; `plant` says what is skipped."""
        self.model._compiled_call_impl = None
        # Initial masks without a tile in them, so that all sparsities run the same compiled code.
        lite_attention.enable(self.model, threshold=-math.inf, num_steps=50, slots=1, initial_mask=lambda site: None)
        implementation = self.model._compiled_call_impl

        def call() -> Any:
            self.model._compiled_call_impl = implementation
            return self.step()

        return call

    def plant(self, call: Call, share: float) -> float:
        """Write an initial mask into all states of `ours`, and return the share of tiles skipped from then on."""
        call()
        report = lite_attention.report(self.model, file=io.StringIO())
        lite_attention.reset(self.model)
        for row in report.swapped:
            assert row.state is not None
            assert row.state.initial_mask is not None
            _, heads, seq_q, seq_k = row.state.capacity
            tiles = math.ceil(seq_q / row.state.tile_m), math.ceil(seq_k / row.state.tile_n)
            row.state.initial_mask.copy_(pack_bits(runs_of_tiles(torch.full((heads, 1), share), *tiles)))
        call()
        return report.swapped[0].sparsity[0]


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


def measure_all(
    model: nn.Module, inputs: dict[str, Any], seconds: float, only: Collection[str], shares: Collection[float],
    profiling: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time all variants of a forward, each against PyTorch's default, and print a line each."""
    variants = Variants(model, inputs)
    default = variants.compiled()
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, Counter[str]] = {}
    print(f"{'':28}{'/ default':>10}{'/ FA3':>8}{'ms':>9}{'default ms':>12}{'attention':>11}", flush=True)

    def show(name: str, ms: float, peer: float, around: list[float]) -> None:
        ratio = ms / peer
        row = rows[name] = {"name": name, "ratio": ratio, "ms": ms, "default_ms": around}
        cells = ["", ""]
        if "FlashAttention-3" in rows:
            row["ratio_to_fa3"] = ratio / rows["FlashAttention-3"]["ratio"]
            cells[0] = f"{row['ratio_to_fa3']:.3f}"
        if "no attention" in rows:
            row["attention_share"] = 1 - rows["no attention"]["ratio"] / ratio
            cells[1] = f"{row['attention_share']:.1%}"
        print(f"{name:28}{ratio:10.3f}{cells[0]:>8}{ms:9.1f}{peer:12.1f}{cells[1]:>11}", flush=True)

    def measure(name: str, call: Call) -> None:
        call()  # compiles outside of the blocks
        before, time, after = block(default, seconds), block(call, seconds), block(default, seconds)
        show(name, time, (before + after) / 2, [before, after])
        kind = "ours, skipping" if name.endswith("skipped") else name  # the same code at all sparsities
        if profiling and kind not in counts:
            counts[kind] = kernels(call)

    default()
    if profiling:
        with going_on("profile of the default"):
            counts["default"] = kernels(default)
    replacing: dict[str, tuple[str, Callable[[], Call]]] = {
        "none": ("no attention", lambda: variants.compiled(no_attention)),
        "fa3": ("FlashAttention-3", lambda: variants.compiled(fa3)),
        "cudnn": ("cuDNN", lambda: variants.compiled(backends=SDPBackend.CUDNN_ATTENTION)),
        "dense": ("ours, dense op", lambda: variants.compiled(lite_attention.attention)),
    }
    for key, (name, make) in replacing.items():
        if key in only:
            with going_on(name):
                measure(name, make())
    around = [ms for row in rows.values() for ms in row["default_ms"]]
    if around:
        mean = sum(around) / len(around)
        show("default", mean, mean, around)
    if "ours" in only:
        with going_on("ours"):
            call = variants.ours()
            for share in shares:
                skipped = variants.plant(call, share)
                measure(f"ours, {skipped:.1%} skipped", call)
            lite_attention.disable(model)
    print_kernels(counts)
    model._compiled_call_impl = None
    torch._dynamo.reset()
    return list(rows.values())


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
    parser.add_argument("--profile", action="store_true", help="count the GPU kernels of a step")
    parser.add_argument("--seconds", type=number(above=0), default=1.5, help="length of a block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)
    require_gpu()
    torch._dynamo.config.recompile_limit = 64  # the variants of a model are compiled code of one function
    about = where()
    print(one_line(about))
    rows: list[dict[str, Any]] = []
    for name in args.model:
        layers = args.layers or LAYERS[name]
        model = build(name, layers)
        for size in args.size:
            inputs, tokens = inputs_of(name, size)
            label = {"model": name if name == "LTX" else f"Wan {name}", "layers": layers, "tokens": tokens}
            print(f"\n{one_line(label)}, bf16, torch.compile")
            with going_on(f"{name}, {size}"):
                found = measure_all(model, inputs, args.seconds, args.only, args.sparsities, args.profile)
                rows += [{**label, **row} for row in found]
            if args.json:
                args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
