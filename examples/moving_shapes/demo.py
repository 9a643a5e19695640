"""The demo: a short video from the trained model, dense and skip-aware, from the same noise and prompt. On the CPU.

python -m examples.moving_shapes.demo [--prompt shape=star color=red] [--threshold -3] [--tile 24] [--steps 12]
    [--size 10 48 48] [--seed 0] [--output demo.png]

Prints and draws both videos, which attention tiles were skipped, where and when, what that changed, and what the judge
sees in them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import lite_attention
from examples.moving_shapes.arguments import VideoSize, prompt_field
from examples.moving_shapes.judge import Judge, load_judge
from examples.moving_shapes.model import PATCH, VideoDiT, load_weights
from examples.moving_shapes.sample import generate, read_prompt
from examples.moving_shapes.scenes import FIELDS, Size
from lite_attention import plot
from lite_attention.cli.arguments import integer, threshold
from lite_attention.inspection import named_states
from lite_attention.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Generated", "Options", "Result", "draw", "main", "run"]


@dataclass(frozen=True)
class Options:
    """What the command line chooses.

    Args:
        prompt: fields, as "shape=star".
        size: frames, height and width in pixels, the latter two multiples of 4.
        steps: denoising steps.
        threshold: in log2 units; lower skips less.
        tile: queries, and keys, of an attention tile.
        seed: of the noise.
    """

    prompt: tuple[str, ...] = ("shape=star", "color=red", "motion=right", "speed=fast", "count=1", "pan=left")
    size: Size = (10, 48, 48)
    steps: int = 12
    threshold: float = -3.0
    tile: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """A video, how long it took, and what the judge sees in it."""

    video: torch.Tensor  # [F, 3, H, W], 0 to 1
    seconds: float
    seen: dict[str, str]  # by field of a prompt; the judge does not look at the pan
    certainty: float  # that there is one main shape, 0 to 1
    path: torch.Tensor  # [F, 2] of the main shape's center, in sides of the frame


@dataclass(frozen=True)
class Result:
    """What a run measured."""

    options: Options
    dense: Generated
    skip_aware: Generated
    sparsity: torch.Tensor  # [steps, layers] share of tiles that the step skipped, over heads and both branches
    kept: torch.Tensor  # bool [steps, heads, q_tiles, k_tiles] of the middle layer, branch cond: computed by the step

    @property
    def psnr(self) -> float:
        """PSNR of the skip-aware video against the dense one, dB."""
        error = float((self.skip_aware.video - self.dense.video).double().square().mean())
        return -10 * math.log10(error) if error else math.inf

    @property
    def path_distance(self) -> float:
        """How far apart the main shapes of both are, mean over frames, in sides."""
        return float((self.skip_aware.path - self.dense.path).norm(dim=1).mean())


def run(options: Options) -> Result:
    """Generate dense, then skip-aware."""
    model, judge = load_weights().eval().requires_grad_(False), load_judge()
    generate(model, read_prompt(options.prompt), options.size, steps=1)  # the first forward takes longer
    dense = _generate("dense", model, judge, options)

    lite_attention.enable(
        model,
        threshold=options.threshold,
        num_steps=options.steps,
        tile_shape=(options.tile, options.tile),
        compile=False,
    )
    sparsity, kept = [], []

    def record() -> None:
        states = list(named_states(model).values())
        sparsity.append(torch.stack([state.sparsity() for state in states]))
        kept.append(states[len(states) // 2].kept_tiles()[0, 0])

    skip_aware = _generate("skip-aware", model, judge, options, record)
    # What a step votes out, the next one skips; the first one skips nothing.
    return Result(
        options,
        dense,
        skip_aware,
        torch.stack([torch.zeros_like(sparsity[0]), *sparsity[:-1]]),
        torch.stack([torch.ones_like(kept[0]), *kept[:-1]]),
    )


def _generate(
    name: str, model: VideoDiT, judge: Judge, options: Options, record: Callable[[], None] = lambda: None
) -> Generated:
    with tqdm(total=options.steps, desc=name, unit="step", file=sys.stderr) as bar:

        def on_step() -> None:
            record()
            bar.update()

        start = time.perf_counter()
        prompt = read_prompt(options.prompt)
        video = generate(model, prompt, options.size, options.steps, seed=options.seed, on_step=on_step)
        seconds = time.perf_counter() - start
    verdict = judge(video)
    return Generated(
        video=(video[0].transpose(0, 1).clamp(-1, 1) + 1) / 2,
        seconds=seconds,
        seen={name: values[int(verdict.logits[name].argmax())] for name, values in FIELDS.items() if name != "pan"},
        certainty=float(verdict.certainty.mean()),
        path=verdict.path[0],
    )


# ---- what came out -------------------------------------------------------------------------------------------------


def _tokens(size: Size) -> int:
    return math.prod(size) // PATCH**2


def _say(result: Result) -> None:
    options, sparsity = result.options, result.sparsity
    print(
        f"VideoDiT, trained, {sparsity.shape[1]} layers; {options.size[0]} frames of {options.size[1]} x "
        f"{options.size[2]} pixels, {_tokens(options.size):,} tokens; {options.steps} steps; "
        f"threshold {options.threshold:g}, tiles of {options.tile} x {options.tile}\n"
    )
    layers = [f"layer {layer}" for layer in range(sparsity.shape[1])]
    rows = [
        [str(step), *(f"{share:.0%}" for share in (*shares.tolist(), float(shares.mean())))]
        for step, shares in enumerate(sparsity)
    ]
    print(f"Attention tiles skipped\n{text_table(['step', *layers, 'all'], rows)}\n")

    asked = dict(field.split("=") for field in options.prompt)
    table = [["asked for", *(asked.get(name, "") for name in result.dense.seen)]]
    for name, made in (("dense", result.dense), ("skip-aware", result.skip_aware)):
        table.append([name, *made.seen.values(), f"{made.certainty:.3f}", f"{made.seconds:.1f} s"])
    table[0] += ["", ""]
    print(f"What the judge sees\n{text_table(['', *result.dense.seen, 'certainty', 'time'], table)}\n")
    print(
        f"Skipped: {float(sparsity.mean()):.0%} of all attention, {float(sparsity[-1].mean()):.0%} in the last step.\n"
        f"Skip-aware against dense: PSNR {result.psnr:.1f} dB, paths of the main shape "
        f"{result.path_distance:.4f} of a side apart, {result.skip_aware.seconds / result.dense.seconds:.2f} of the "
        "time.\nNo measure of speed: this is a CPU, at few tokens. docs/performance.md has figures of GPUs."
    )


def draw(result: Result) -> Figure:
    """Return the demo's picture: frames of both videos, skip maps over the steps, and sparsity by layer.

    Raises:
        ImportError: matplotlib is missing.
    """
    options, (steps, layers) = result.options, result.sparsity.shape
    figure = plot.new_figure(
        13,
        9.5,
        f"{', '.join(options.prompt)}: {_tokens(options.size):,} tokens, {options.steps} steps, "
        f"threshold {options.threshold:g}, {float(result.sparsity.mean()):.0%} of the attention skipped",
    )
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    upper, (left, right) = panels[0], panels[1].subfigures(1, 2, width_ratios=(1.5, 1))

    upper.suptitle(f"Same noise; PSNR {result.psnr:.1f} dB", fontsize=10)
    dense, skip_aware = result.dense.video, result.skip_aware.video
    videos = {"dense": dense, "skip-aware": skip_aware, "difference x 5": (5 * (skip_aware - dense).abs()).clamp(max=1)}
    count = min(len(dense), 10)
    plot.draw_frames(upper, videos, [i * (len(dense) - 1) // max(count - 1, 1) for i in range(count)])

    shown = sorted({min(1, steps - 1), steps // 2, steps - 1})  # step 0 skips nothing
    left.suptitle(
        f"Layer {layers // 2}, with the prompt: tiles of {options.tile} queries x {options.tile} keys; "
        "blue = computed, gray = skipped",
        fontsize=10,
    )
    heads = [f"head {head}" for head in range(result.kept.shape[1])]
    plot.draw_skip_maps(left, list(result.kept[shown]), [f"step {step}" for step in shown], heads)

    axes = right.subplots()
    axes.set_title("Skipped, mean over heads, with and without the prompt", fontsize=10)
    plot.draw_sparsity(axes, result.sparsity, [f"layer {layer}" for layer in range(layers)])
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo as the command line asks, and write the picture."""
    default = Options()
    parser = argparse.ArgumentParser(
        description="Generate a video dense and skip-aware, and show what was skipped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--prompt", type=prompt_field, nargs="+", default=default.prompt, help=f"fields of {', '.join(FIELDS)}"
    )
    parser.add_argument("--size", action=VideoSize, default=default.size, help="of the video")
    parser.add_argument("--steps", type=integer(1), default=default.steps, help="denoising steps")
    parser.add_argument("--threshold", type=threshold, default=default.threshold, help="log2 units; lower skips less")
    parser.add_argument("--tile", type=integer(1), default=default.tile, help="queries, and keys, of an attention tile")
    parser.add_argument("--seed", type=integer(0), default=default.seed, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write")
    args = parser.parse_args(arguments)
    args.prompt = tuple(args.prompt)
    plot.require_matplotlib()  # before a minute of work, not after it
    result = run(Options(**{field.name: getattr(args, field.name) for field in fields(Options)}))
    _say(result)
    draw(result).savefig(args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
