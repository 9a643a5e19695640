"""Make videos from prompts, dense and skip-aware, and measure how true they are.

python -m examples.moving_shapes.sample --out DIR [--threshold -6] [--count 8] [--size 10 48 48] [--steps 30]
    [--guidance 3] [--prompt shape=star color=red] [--device cuda] [--weights WEIGHTS] [--judge JUDGE]

Writes DIR/dense.png, a row of frames for each video, and DIR/dense.gif; the same for "skip" with a threshold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import lite_attention
from examples.moving_shapes.arguments import VideoSize, prompt_field
from examples.moving_shapes.judge import HOLD_OUT, JUDGE, load_judge, measure, measure_truth, path_distance
from examples.moving_shapes.model import WEIGHTS, VideoDiT, load_weights, time_shift
from examples.moving_shapes.scenes import NULL_PROMPT, Size, draw_scenes, prompt_ids, tile
from lite_attention.cli.arguments import add_device, integer, number, threshold
from lite_attention.inspection import named_states

__all__ = ["generate", "read_prompt", "save_gif", "save_videos", "time_steps"]


def time_steps(steps: int, size: Size) -> torch.Tensor:
    """Return the times [steps + 1] from 1 down to 0 at which a video of a size is denoised."""
    shift = time_shift(size)
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


@torch.no_grad()
def generate(
    model: VideoDiT,
    prompt: torch.Tensor,
    size: Size = (10, 48, 48),
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Return videos [B, 3, F, H, W] in about [-1, 1], on the model's device.

    Each step is two forwards, announced as the branches "cond" and "uncond", and one Euler step along the guided
    velocity. Noise is drawn on the CPU, so that a seed means the same on every device.

    Args:
        model: perhaps given to `lite_attention.enable`.
        prompt: [B, fields], see `prompt_ids`.
        size: frames, height, width of the videos; the latter two are multiples of 4.
        steps: denoising steps.
        guidance: of classifier-free guidance; 1 = none, which is still computed.
        seed: of the noise.
        on_step: called after each step.
    """
    device = model.to_patch.weight.device
    prompt = prompt.to(device)
    prompts = {"cond": prompt, "uncond": torch.tensor(NULL_PROMPT, device=device).expand_as(prompt)}
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(len(prompt), 3, *size, generator=generator).to(device)
    times = time_steps(steps, size)
    lite_attention.reset(model)
    for step, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        velocity = {}
        for name, asked in prompts.items():
            with lite_attention.branch(name, step, time=now, model=model):
                velocity[name] = model(video, torch.full((len(prompt),), now, device=device), asked)
        guided = velocity["uncond"] + guidance * (velocity["cond"] - velocity["uncond"])
        video = video + (then - now) * guided
        if on_step:
            on_step()
    return video


def save_videos(videos: torch.Tensor, path: Path) -> None:
    """Write videos [B, 3, F, H, W] as `path`.png, a row of frames each, and `path`.gif, side by side.

    Without Pillow it writes nothing, and says so: the measurements matter more.
    """
    try:
        from PIL import Image
    except ImportError:
        print(f"no {path}.png and .gif: there is no Pillow")
        return

    Image.fromarray(tile(videos).numpy()).save(path.with_suffix(".png"))
    save_gif(videos, path.with_suffix(".gif"))


def save_gif(videos: torch.Tensor, path: Path) -> None:
    """Write videos [B, 3, F, H, W] in [-1, 1] side by side.

    Raises:
        ImportError: there is no Pillow.
    """
    from PIL import Image

    moments = [Image.fromarray(tile(moment.transpose(0, 1).unsqueeze(0)).numpy()) for moment in videos.unbind(2)]
    moments[0].save(path, save_all=True, append_images=moments[1:], duration=100, loop=0)


def skipped(model: VideoDiT) -> float:
    """Return the share of attention tiles that the last step of a generation skipped, the mean over blocks."""
    return float(torch.stack([state.sparsity() for state in named_states(model).values()]).mean())


def read_prompt(fields: Sequence[str]) -> torch.Tensor:
    """Return the prompt [1, fields] of what the command line says, as "shape=star".

    Raises:
        ValueError: no such field, or no such value of it.
    """
    return prompt_ids(**{name: value for name, _, value in (field.partition("=") for field in fields)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and measure videos as the command line asks."""
    parser = argparse.ArgumentParser(description="Make videos, dense and skip-aware, and measure how true they are.")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="what train.py wrote; the trained ones")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--judge", type=Path, default=JUDGE, help="what judge.py wrote; the trained one")
    parser.add_argument("--threshold", type=threshold, help="also skip-aware, at this threshold (log2 units)")
    parser.add_argument("--count", type=integer(1), default=8, help="videos")
    parser.add_argument("--size", action=VideoSize, default=(10, 48, 48), help="of the videos")
    parser.add_argument("--steps", type=integer(1), default=30, help="denoising steps")
    parser.add_argument("--guidance", type=number(), default=3.0, help="of classifier-free guidance")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the noise, and of prompts")
    parser.add_argument(
        "--prompt",
        type=prompt_field,
        nargs="*",
        help="such as shape=star color=red; without it, one drawn for each video",
    )
    add_device(parser)
    args = parser.parse_args(arguments)
    size: Size = args.size
    if args.prompt is None:
        prompt = draw_scenes(args.count, torch.Generator().manual_seed(HOLD_OUT + args.seed)).prompt()
    else:
        prompt = read_prompt(args.prompt).expand(args.count, -1)
    model = load_weights(args.weights).to(args.device).eval().requires_grad_(False)
    if args.device.startswith("cuda"):
        model.bfloat16()
    judge = load_judge(args.judge).to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    _say("rendered", measure_truth(judge, args.count, size, args.device))

    dense = generate(model, prompt, size, args.steps, args.guidance, args.seed)
    save_videos(dense, args.out / "dense")
    _say("dense", measure(judge, dense, prompt.to(args.device)))
    if args.threshold is None:
        return
    lite_attention.enable(model, threshold=args.threshold, num_steps=args.steps, compile=False)
    skip = generate(model, prompt, size, args.steps, args.guidance, args.seed)
    save_videos(skip, args.out / "skip")
    measured = measure(judge, skip, prompt.to(args.device))
    measured["path_to_dense"] = path_distance(judge, dense, skip)
    measured["skipped_at_last"] = skipped(model)
    measured["difference"] = float((skip - dense).abs().mean())
    _say("skip", measured)


def _say(what: str, measured: dict[str, float]) -> None:
    print(f"{what:>8}", json.dumps({name: round(value, 4) for name, value in measured.items()}), flush=True)


if __name__ == "__main__":
    main()
