"""Time of a forward of a small enabled model: what telling branch, step and generation takes, beside the model itself.

    python -m benchmarks.runner [--layers 4] [--tokens 2048] [--json FILE]

A model of N layers, each of 4 heads of 64, in bf16. The threshold is -inf, so nothing is skipped. 20 generations of 50
steps run one after the other, and the host waits for the GPU behind each. A figure is the median time of a generation,
divided by its steps. The timesteps are on the GPU, so reading one waits for it, as in a pipeline that tells no step.

    without LiteAttention    the model with PyTorch's attention
    timestep read            nothing is told: the timestep tells the step
    step told                inside lite_attention.branch(name, step)
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import lite_attention
from benchmarks.measure import begin, going_on
from lite_attention.cli.arguments import integer, new_file

DEVICE = "cuda"
WIDTH, HEADS = 256, 4
STEPS, GENERATIONS = 50, 20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out: torch.Tensor = self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out


class Denoiser(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = latent * timestep
        for layer in self.layers:
            x = layer(x)
        return x


class Generation:
    """The steps of one generation on the same latent."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model = model
        self.latent = torch.randn(1, tokens, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        self.timesteps = torch.linspace(1, 0.02, STEPS, device=DEVICE, dtype=torch.bfloat16)[:, None].unbind()

    def untold(self) -> None:
        for timestep in self.timesteps:
            self.model(self.latent, timestep)

    def told(self) -> None:
        for step, timestep in enumerate(self.timesteps):
            with lite_attention.branch("cond", step, model=self.model):
                self.model(self.latent, timestep)


def forward_us(generate: Callable[[], None]) -> float:
    """Return the time of a forward in us: of whole generations, the median, by their steps."""
    times = []
    for generation in range(GENERATIONS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        if generation:  # the first one compiles and warms up
            times.append(time.perf_counter() - start)
    return statistics.median(times) / STEPS * 1e6


def measure(layers: int, tokens: int, compile: bool) -> dict[str, float]:
    """Return the time of a forward in us, by what tells the step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Denoiser(layers).to(DEVICE, torch.bfloat16).eval()
    plain: Any = torch.compile(model) if compile else model
    result = {"without LiteAttention": forward_us(Generation(plain, tokens).untold)}
    lite_attention.enable(model, threshold=-math.inf, num_steps=STEPS, compile=compile)
    generation = Generation(model, tokens)
    result["timestep read"] = forward_us(generation.untold)
    result["step told"] = forward_us(generation.told)
    swapped = len(lite_attention.report(model, file=io.StringIO()).swapped)
    if swapped != layers:
        raise RuntimeError(f"{swapped} of {layers} sites were swapped")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=integer(1), default=4, help="N: layers of the model")
    parser.add_argument("--tokens", type=integer(256), default=2048, help="tokens of the latent, at least 256")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(arguments)
    about = begin()
    rows: list[dict[str, Any]] = []
    print(f"\ntime of a forward, us, {args.layers} layers, {(1, args.tokens, WIDTH)}, {HEADS} heads, bf16")
    with torch.inference_mode():
        for name in ("compiled", "eager"):
            with going_on(name):
                for told, us in measure(args.layers, args.tokens, compile=name == "compiled").items():
                    rows.append({"kind": name, "name": told, "us": us})
                    print(f"  {name:10}{told:24}{us:10.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
