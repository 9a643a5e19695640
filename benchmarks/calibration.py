"""What calibrating costs, in dense generations.

    python -m benchmarks.calibration [--weights FILE] [--size 32 64 64] [--steps 20] [--error 0.05] [--device cuda]
    python -m benchmarks.calibration --untrained WIDTH LAYERS HEAD_DIM --size 32 128 128 --steps 6

From the root of the repository: of the trained moving shapes, or of an untrained model as large as is asked for. The
unit is a dense generation of the model by itself, with PyTorch's attention: the fastest of three. One that is
calibrated on costs what is measured in it besides, and that its calls of attention are caught one by one. An untrained
model skips next to nothing, so verifying it is verifying a dense one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import lite_attention
from benchmarks.quality_setup import CALIBRATION, Setup, sample
from examples.moving_shapes.arguments import VideoSize
from examples.moving_shapes.model import WEIGHTS, Config, VideoDiT, load_weights
from lite_attention.calibration import CalibrationResult
from lite_attention.calibration.measurement import now
from lite_attention.cli.arguments import add_device, integer, number


def generator(setup: Setup, taken: list[float]) -> Callable[[int], torch.Tensor]:
    """Return what generates for a prompt, and adds the seconds that it took."""

    def generate(prompt: int) -> torch.Tensor:
        start = now()
        video = sample(setup, [(prompt, 0)], setup.steps).float()
        taken.append(now() - start)
        return video

    return generate


def calibrate(setup: Setup, error: float) -> tuple[list[float], CalibrationResult]:
    """Return the seconds of each generation that `calibrate` runs, verification last, and its result."""
    taken: list[float] = []
    found = lite_attention.calibrate(
        setup.model, generator(setup, taken), num_steps=setup.steps, target_error=error, prompts=[CALIBRATION],
        progress=False,
    )  # fmt: skip
    return taken, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate once, and print what each part took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the model")
    parser.add_argument("--untrained", type=integer(1), nargs=3, help="width, layers and head dim of another model")
    parser.add_argument("--size", action=VideoSize, default=(32, 64, 64), help="of the videos")
    parser.add_argument("--steps", type=integer(1), default=20, help="denoising steps")
    parser.add_argument("--error", type=number(above=0), default=0.05, help="the bound, for each head and step")
    add_device(parser)
    args = parser.parse_args(arguments)
    if args.untrained:
        width, layers, head_dim = args.untrained
        torch.manual_seed(0)
        model = VideoDiT(Config(width=width, layers=layers, head_dims=(head_dim,)))
    else:
        model = load_weights(args.weights)
    model.eval().requires_grad_(False).to(args.device)
    if args.device.startswith("cuda"):
        model.bfloat16()
    setup = Setup(model, None, args.size, args.steps)
    calibrate(replace(setup, steps=2), args.error)  # loads kernels
    alone: list[float] = []
    for _ in range(3):
        generator(setup, alone)(CALIBRATION)
    dense = min(alone)
    (*passes, verification), found = calibrate(setup, args.error)
    config, name = model.config, torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(
        f"width {config.width}, {config.layers} layers, head dims {config.head_dims}, {math.prod(setup.grid)} tokens, "
        f"{args.steps} steps, torch {torch.__version__}, {name}"
    )
    print(f"dense generation {dense:.2f} s; in such generations:")
    calibrated = ", ".join(f"{taken / dense:.2f}" for taken in passes)
    print(f"calibrating {sum(passes) / dense:.2f} (passes {calibrated}), verifying {verification / dense:.2f}")
    print(found)


if __name__ == "__main__":
    main()
