"""The demo: a short video from the trained model, dense, by votes and by the residual, from the same noise and prompt.

python -m examples.moving_shapes.demo [--prompt shape=star color=red] [--threshold -2] [--keep 0.3] [--full-every 3]
    [--tile 24] [--steps 12] [--size 8 48 48] [--seed 0] [--output demo.png]

On the CPU. Prints and draws the videos, which attention tiles were computed, where and when, what that changed, and
what the judge sees in them. Writes the videos side by side as a GIF beside the picture.
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
from examples.moving_shapes.sample import generate, read_prompt, save_gif
from examples.moving_shapes.scenes import FIELDS, Size
from lite_attention import plot
from lite_attention.cli.arguments import integer, number, threshold
from lite_attention.inspection import named_states
from lite_attention.ops import step_plan
from lite_attention.ops.plan import SPARSE
from lite_attention.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Generated", "Options", "Result", "SkipAware", "draw", "main", "run"]


@dataclass(frozen=True)
class Options:
    """What the command line chooses.

    Args:
        prompt: fields, as "shape=star".
        size: frames, height and width in pixels, the latter two multiples of 4.
        steps: denoising steps.
        threshold: of the votes, in log2 units; lower skips less.
        keep: share of tiles that sparse steps of the residual compute.
        full_every: of the residual, every so many steps computes all tiles.
        tile: queries, and keys, of an attention tile.
        seed: of the noise.
    """

    prompt: tuple[str, ...] = ("shape=star", "color=red", "motion=right", "speed=fast", "count=1", "pan=left")
    size: Size = (8, 48, 48)
    steps: int = 12
    threshold: float = -2.0
    keep: float = 0.3
    full_every: int = 3
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
class SkipAware(Generated):
    """A video for which tiles were skipped."""

    computed: torch.Tensor  # [steps, layers] share of tiles that the step computed, over heads and both branches
    kept: torch.Tensor  # bool [steps, heads, q_tiles, k_tiles] of the middle layer, branch cond: computed by the step

    def psnr(self, dense: Generated) -> float:
        """Return the PSNR against the dense video, dB."""
        error = float((self.video - dense.video).double().square().mean())
        return -10 * math.log10(error) if error else math.inf

    def path_distance(self, dense: Generated) -> float:
        """Return how far the main shape is from that of the dense video, mean over frames, in sides."""
        return float((self.path - dense.path).norm(dim=1).mean())


@dataclass(frozen=True)
class Result:
    """What a run made."""

    options: Options
    dense: Generated
    skip_aware: dict[str, SkipAware]  # "votes" and "residual"


class _Masks:
    """Notes after each step of a generation which tiles the masks of the layers keep."""

    def __init__(self, model: VideoDiT) -> None:
        self.model = model
        self._shares: list[torch.Tensor] = []
        self._tiles: list[torch.Tensor] = []

    def note(self) -> None:
        states = list(named_states(self.model).values())
        self._shares.append(torch.stack([1 - state.sparsity() for state in states]))
        self._tiles.append(states[len(states) // 2].kept_tiles()[0, 0])

    @property
    def after_steps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares (steps, layers), and the tiles of the middle layer (steps, heads, q_tiles, k_tiles)."""
        return torch.stack(self._shares), torch.stack(self._tiles)


def run(options: Options) -> Result:
    """Generate dense, by votes, and by the residual."""
    model, judge = load_weights().eval().requires_grad_(False), load_judge()
    generate(model, read_prompt(options.prompt), options.size, steps=1)  # the first forward takes longer
    dense = _generate("dense", model, judge, options)
    settings: dict[str, Any] = {
        "num_steps": options.steps, "tile_shape": (options.tile, options.tile), "compile": False,
    }  # fmt: skip

    lite_attention.enable(model, threshold=options.threshold, **settings)
    masks = _Masks(model)
    votes = _generate("votes", model, judge, options, masks.note)
    # What a step votes out, the next one skips; the first one skips nothing.
    of_votes = [torch.cat([torch.ones_like(kept[:1]), kept[:-1]]) for kept in masks.after_steps]

    lite_attention.enable(model, method="residual", keep=options.keep, full_every=options.full_every, **settings)
    masks = _Masks(model)
    residual = _generate("residual", model, judge, options, masks.note)
    # The mask is there in full steps, too, which compute the other tiles besides.
    full = [step for step, kind in enumerate(step_plan(options.steps, full_every=options.full_every)) if kind != SPARSE]
    of_residual = [kept.index_fill(0, torch.tensor(full), 1) for kept in masks.after_steps]
    made = {"votes": SkipAware(**vars(votes), computed=of_votes[0], kept=of_votes[1])}
    made["residual"] = SkipAware(**vars(residual), computed=of_residual[0], kept=of_residual[1])
    return Result(options, dense, made)


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
    options, made = result.options, result.skip_aware
    layers = made["votes"].computed.shape[1]
    print(
        f"VideoDiT, trained, {layers} layers; {options.size[0]} frames of {options.size[1]} x {options.size[2]} "
        f"pixels, {_tokens(options.size):,} tokens; {options.steps} steps; tiles of {options.tile} x {options.tile}\n"
        f"votes: threshold {options.threshold:g}; residual: keeps {options.keep:.0%}, every {options.full_every} steps "
        "a full one\n"
    )
    rows = [
        [str(step), *(f"{float(of.computed[step].mean()):.0%}" for of in made.values())]
        for step in range(options.steps)
    ]
    rows.append(["all", *(f"{float(of.computed.mean()):.0%}" for of in made.values())])
    print(f"Attention tiles computed\n{text_table(['step', *made], rows)}\n")

    asked = dict(field.split("=") for field in options.prompt)
    table = [["asked for", *(asked.get(name, "") for name in result.dense.seen), "", ""]]
    for name, of in {"dense": result.dense, **made}.items():
        table.append([name, *of.seen.values(), f"{of.certainty:.3f}", f"{of.seconds:.1f} s"])
    print(f"What the judge sees\n{text_table(['', *result.dense.seen, 'certainty', 'time'], table)}\n")
    for name, of in made.items():
        print(
            f"By {name}: {float(of.computed.mean()):.0%} of the attention; against dense PSNR "
            f"{of.psnr(result.dense):.1f} dB, paths of the main shape {of.path_distance(result.dense):.4f} of a side "
            f"apart, {of.seconds / result.dense.seconds:.2f} of the time."
        )
    print("No measure of speed: this is a CPU, at few tokens. docs/performance.md has figures of GPUs.")


def draw(result: Result) -> Figure:
    """Return the demo's picture: frames of the videos, maps of tiles over the steps, and how many were computed.

    Raises:
        ImportError: matplotlib is missing.
    """
    options, dense, made = result.options, result.dense, result.skip_aware
    title = f"{', '.join(options.prompt)}: {_tokens(options.size):,} tokens, {options.steps} steps"
    figure = plot.new_figure(13, 12, title)
    panels: Any = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    upper, (left, right) = panels[0], panels[1].subfigures(1, 2, width_ratios=(1.5, 1))

    said = [
        f"{name} {of.psnr(dense):.1f} dB with {float(of.computed.mean()):.0%} of the tiles" for name, of in made.items()
    ]
    upper.suptitle(f"Same noise; PSNR against dense: {', '.join(said)}", fontsize=10)
    videos = {"dense": dense.video, **{name: of.video for name, of in made.items()}}
    for name, of in made.items():
        videos[f"{name}\ndifference x 5"] = (5 * (of.video - dense.video).abs()).clamp(max=1)
    count = min(len(dense.video), 10)
    plot.draw_frames(upper, videos, [i * (len(dense.video) - 1) // max(count - 1, 1) for i in range(count)])

    layers = made["votes"].computed.shape[1]
    left.suptitle(
        f"Layer {layers // 2}, with the prompt: tiles of {options.tile} queries x {options.tile} keys; "
        "blue = computed, gray = skipped",
        fontsize=10,
    )
    shown = [(name, step) for name in made for step in _shown(made[name])]
    maps = [made[name].kept[step] for name, step in shown]
    plot.draw_skip_maps(
        left, maps, [f"{name}, step {step}" for name, step in shown], [f"head {head}" for head in range(len(maps[0]))]
    )

    axes = right.subplots()
    axes.set_title("Tiles computed, mean over layers, heads and branches", fontsize=10)
    for name, of in made.items():
        axes.plot(100 * of.computed.mean(1), marker="o", markersize=3, label=f"{name}, {float(of.computed.mean()):.0%}")
    axes.set(xlabel="denoising step", ylabel="tiles computed in the step (%)", ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _shown(made: SkipAware) -> list[int]:
    """Return the steps whose tiles are drawn: the middle one and the last one of those that skipped any."""
    sparse = [step for step, share in enumerate(made.computed.mean(1).tolist()) if share < 1]
    return sorted({sparse[len(sparse) // 2], sparse[-1]}) if sparse else [len(made.computed) - 1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo as the command line asks, and write the picture."""
    default = Options()
    parser = argparse.ArgumentParser(
        description="Generate a video dense, by votes and by the residual, and show what was skipped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--prompt", type=prompt_field, nargs="+", default=default.prompt, help=f"fields of {', '.join(FIELDS)}"
    )
    parser.add_argument("--size", action=VideoSize, default=default.size, help="of the video")
    parser.add_argument("--steps", type=integer(1), default=default.steps, help="denoising steps")
    parser.add_argument(
        "--threshold", type=threshold, default=default.threshold, help="of the votes, log2 units; lower skips less"
    )
    parser.add_argument(
        "--keep",
        type=number(above=0, most=1),
        default=default.keep,
        help="share of tiles in sparse steps of the residual",
    )
    parser.add_argument(
        "--full-every", type=integer(1), default=default.full_every, help="steps of the residual from a full one on"
    )
    parser.add_argument("--tile", type=integer(1), default=default.tile, help="queries, and keys, of an attention tile")
    parser.add_argument("--seed", type=integer(0), default=default.seed, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write, and a GIF beside it")
    args = parser.parse_args(arguments)
    args.prompt = tuple(args.prompt)
    plot.require_matplotlib()  # before a minute of work, not after it
    result = run(Options(**{field.name: getattr(args, field.name) for field in fields(Options)}))
    _say(result)
    draw(result).savefig(args.output)
    animation = args.output.with_suffix(".gif")
    videos = torch.stack([of.video.transpose(0, 1) for of in (result.dense, *result.skip_aware.values())])
    save_gif(2 * videos - 1, animation)
    print(f"picture: {args.output}; dense, votes and residual side by side: {animation}")


if __name__ == "__main__":
    main()
