"""Time of one forward of a diffusers Wan transformer on a Hopper GPU, compiled, with and without our backend.

    python benchmarks/model.py [--model 14B] [--resolution 480p 720p] [--layers 2] [--json FILE]

Random weights, since only time is measured. Each variant runs in a block of its own, the default attention of PyTorch
before and after it. Skipped tiles are planted through an initial mask at threshold -inf, so nothing else changes.
Needs diffusers.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import SPARSITIES, block, runs_of_tiles
from diffusers import WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lite_attention
from lite_attention.compile import Site
from lite_attention.ops import tile_shape

HEADS = {"1.3B": (12, 8960), "14B": (40, 13824)}  # heads of 128, width of the feed-forward
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # 81 frames


def build(model: str, layers: int) -> nn.Module:
    heads, ffn_dim = HEADS[model]
    with torch.device("cuda"):
        wan = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_dim, num_layers=layers, in_channels=16,
            out_channels=16, text_dim=4096,
        )  # fmt: skip
    return wan.to(torch.bfloat16).eval().requires_grad_(False)


def planted(share: float) -> Callable[[Site], torch.Tensor]:
    """Return what gives each site an initial mask with this share of its tiles skipped."""

    def mask(site: Site) -> torch.Tensor:
        _, seq_q, heads, head_dim = site.q_shape
        tile_m, tile_n = tile_shape(head_dim, site.dtype, site.device)
        tiles = math.ceil(seq_q / tile_m), math.ceil(site.k_shape[1] / tile_n)
        return runs_of_tiles(torch.full((heads, 1), share), *tiles).unsqueeze(0)

    return mask


def measure_all(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Time all variants of a forward, each against PyTorch's default, and print a line each."""
    rows = []

    @torch.inference_mode()
    def step() -> Any:
        return model(**inputs, return_dict=False)

    model.compile()
    compiled_default = model._compiled_call_impl

    def default() -> Any:
        model._compiled_call_impl = compiled_default
        return step()

    def measure(name: str, call: Callable[[], Any]) -> None:
        before, ours, after = block(default, seconds), block(call, seconds), block(default, seconds)
        peer = (before + after) / 2
        print(f"{tokens:>7} tokens  {name:24}{ours / peer:7.3f}{ours:9.1f} ms{peer:9.1f} ms default", flush=True)
        rows.append({"tokens": tokens, "name": name, "ratio": ours / peer, "ms": ours, "default_ms": [before, after]})

    def cudnn() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return default()

    measure("cuDNN", cudnn)
    for share in SPARSITIES:
        model._compiled_call_impl = None
        lite_attention.enable(model, threshold=-math.inf, num_steps=50, slots=1, initial_mask=planted(share))
        ours = model._compiled_call_impl
        step()
        report = lite_attention.report(model, file=io.StringIO())

        def skipping(ours: Any = ours) -> Any:
            model._compiled_call_impl = ours
            return step()

        measure(f"ours, {report.swapped[0].sparsity[0]:.1%} skipped", skipping)
        lite_attention.disable(model)
    model._compiled_call_impl = None
    torch._dynamo.reset()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=HEADS, default="14B")
    parser.add_argument("--resolution", choices=LATENTS, nargs="+", default=list(LATENTS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a block")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    where = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        "model": f"Wan {args.model}, {args.layers} layers, bf16, torch.compile",
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[dict[str, Any]] = []
    model = build(args.model, args.layers)
    for resolution in args.resolution:
        frames, height, width = LATENTS[resolution]
        inputs = {
            "hidden_states": torch.randn(1, 16, frames, height, width, device="cuda", dtype=torch.bfloat16),
            "timestep": torch.tensor([500.0], device="cuda"),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
        }
        tokens = frames * height * width // 4

        rows += measure_all(model, inputs, tokens, args.seconds)
        if args.json:
            args.json.write_text(json.dumps({**where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
