"""What the quality benchmarks generate: prompts, noise, and videos of the moving shapes by a solver."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lite_attention
from benchmarks.quality_metrics import Pair
from benchmarks.quality_solvers import SOLVERS, Solver
from examples.moving_shapes.judge import HOLD_OUT, Judge
from examples.moving_shapes.model import PATCH, VideoDiT
from examples.moving_shapes.scenes import NULL_PROMPT, Scenes, Size, draw_scenes
from lite_attention.ops import tile_shape

_OWN_PROMPTS = HOLD_OUT + 2**30  # seeds of scenes that neither the model nor the judge has seen

# Numbers of prompts. Those below were looked at while methods were made; so they are not reported.
REPORTED = 1_000
CALIBRATION = 1_000_000  # tables are calibrated on those from here on
CHOOSING = 2_000_000  # presets are chosen on those from here on

AfterStep = Callable[[int], None]


@dataclass
class Setup:
    """What is generated, and with what.

    Args:
        model: on its device, neither training nor given to `enable`.
        judge: on the model's device; None = the truth is not judged.
        size: frames, height, width of the videos.
        steps: denoising steps of a generation.
        solver: one of `SOLVERS`.
        guidance: of classifier-free guidance.
        batch: videos at a time; each has a skip state of its own.
        tile: (tile_m, tile_n); None = as the kernel has them.
        kept: prompts of which the videos of all methods are kept, not only the dense ones.
        tables: threshold files by name.
    """

    model: VideoDiT
    judge: Judge | None
    size: Size
    steps: int
    solver: str = "euler"
    guidance: float = 3.0
    batch: int = 16
    tile: tuple[int, int] | None = None
    kept: Collection[int] = (0,)
    tables: dict[str, Path] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.to_patch.weight.device

    @property
    def grid(self) -> Size:
        """Frames, height and width in tokens."""
        frames, height, width = self.size
        return frames, height // PATCH, width // PATCH

    @property
    def sites(self) -> list[str]:
        """Names of the self-attention, in the order of the calls."""
        return [f"blocks.{block}.self_attention" for block in range(len(self.model.blocks))]

    @property
    def tile_shapes(self) -> dict[str, tuple[int, int]]:
        """Tiles by site, where nothing is quantized."""
        weight, dims = self.model.to_patch.weight, self.model.config.head_dim_of_blocks
        shapes = [self.tile or tile_shape(dim, weight.dtype, weight.device) for dim in dims]
        return dict(zip(self.sites, shapes, strict=True))

    def new_solver(self, steps: int) -> Solver:
        """Return what solves one generation of so many steps."""
        return SOLVERS[self.solver](steps, self.size)


# ---- samples -------------------------------------------------------------------------------------------------------


def scene(prompt: int) -> Scenes:
    """Return the one scene that a prompt of this number describes; it does not depend on how many prompts there are."""
    return draw_scenes(1, torch.Generator().manual_seed(_OWN_PROMPTS + prompt))


def noise(pair: Pair, size: Size) -> torch.Tensor:
    """Return the noise (3, F, H, W) of a video: the same for all methods, and whatever else is in its batch."""
    prompt, seed = pair
    return torch.randn(3, *size, generator=torch.Generator().manual_seed(1_000_003 * prompt + seed))


@torch.no_grad()
def denoise(
    model: VideoDiT,
    prompt: torch.Tensor,
    video: torch.Tensor,
    solver: Solver,
    guidance: float,
    after_step: AfterStep | None = None,
) -> torch.Tensor:
    """Return videos (B, 3, F, H, W) made from given noise; by `Euler` as `examples.moving_shapes.sample` makes them.

    Args:
        model: perhaps given to `lite_attention.enable`.
        prompt: (B, fields).
        video: noise (B, 3, F, H, W).
        solver: new.
        guidance: of classifier-free guidance.
        after_step: called with the number of each step after its two forwards.
    """
    prompts = {"cond": prompt, "uncond": torch.tensor(NULL_PROMPT, device=prompt.device).expand_as(prompt)}
    lite_attention.reset(model)
    for step, now in enumerate(solver.times):
        velocity = {}
        for name, asked in prompts.items():
            with lite_attention.branch(name, step, time=now, model=model):
                velocity[name] = model(video, torch.full((len(video),), now, device=video.device), asked)
        if after_step is not None:
            after_step(step)
        video = solver.step(video, velocity["uncond"] + guidance * (velocity["cond"] - velocity["uncond"]))
    return video


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """Return uint8 videos of those in [-1, 1]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(video: torch.Tensor) -> torch.Tensor:
    """Return videos in [-1, 1] of uint8 ones."""
    return video.float() / 127.5 - 1


def sample(setup: Setup, pairs: Sequence[Pair], steps: int, after_step: AfterStep | None = None) -> torch.Tensor:
    """Return uint8 videos (B, 3, F, H, W) of some prompts and seeds, made by the model as it is."""
    prompt = torch.cat([scene(number).prompt() for number, _ in pairs]).to(setup.device)
    start = torch.stack([noise(pair, setup.size) for pair in pairs]).to(setup.device)
    return to_bytes(denoise(setup.model, prompt, start, setup.new_solver(steps), setup.guidance, after_step))
