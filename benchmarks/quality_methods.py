"""The methods of `benchmarks.quality`: how each makes its videos, and how much it skips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import lite_attention
from benchmarks.quality_metrics import Pair
from benchmarks.quality_report import DENSE, VOTING
from examples.moving_shapes.judge import HOLD_OUT, Judge
from examples.moving_shapes.model import PATCH, VideoDiT
from examples.moving_shapes.sample import time_steps
from examples.moving_shapes.scenes import NULL_PROMPT, Scenes, Size, draw_scenes
from lite_attention import masks, schedules
from lite_attention.inspection import named_states
from lite_attention.ops import tile_shape
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.tiles import ceil_div, diagonal_tile

RENDERED = "rendered"
_FAMILIES = (DENSE, RENDERED, *VOTING, "table", "radial", "spatial-temporal", "window", "random", "steps")
_OWN_PROMPTS = HOLD_OUT + 2**30  # seeds of scenes that neither the model nor the judge has seen
CALIBRATION = 1_000_000  # prompts from here on are only calibrated on

AfterStep = Callable[[int], None]


@dataclass
class Setup:
    """What is generated, and with what.

    Args:
        model: on its device, neither training nor given to `enable`.
        judge: on the model's device; None = the truth is not judged.
        size: frames, height, width of the videos.
        steps: denoising steps of a generation.
        guidance: of classifier-free guidance.
        batch: videos at a time; each has a skip state of its own.
        tile: (tile_m, tile_n); None = as the kernel has them.
        keep: of so many prompts the videos of all methods are kept, not only the dense ones.
        tables: threshold files by name.
    """

    model: VideoDiT
    judge: Judge | None
    size: Size
    steps: int
    guidance: float = 3.0
    batch: int = 16
    tile: tuple[int, int] | None = None
    keep: int = 1
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
    steps: int,
    guidance: float,
    after_step: AfterStep | None = None,
) -> torch.Tensor:
    """Return videos (B, 3, F, H, W) as `examples.moving_shapes.sample.generate` makes them, from given noise.

    Args:
        model: perhaps given to `lite_attention.enable`.
        prompt: (B, fields).
        video: noise (B, 3, F, H, W).
        steps: denoising steps.
        guidance: of classifier-free guidance.
        after_step: called with the number of each step after its two forwards.
    """
    prompts = {"cond": prompt, "uncond": torch.tensor(NULL_PROMPT, device=prompt.device).expand_as(prompt)}
    times = time_steps(steps, (video.shape[2], video.shape[3], video.shape[4])).tolist()
    lite_attention.reset(model)
    for step, (now, then) in enumerate(pairwise(times)):
        velocity = {}
        for name, asked in prompts.items():
            with lite_attention.branch(name, step, model=model):
                velocity[name] = model(video, torch.full((len(video),), now, device=video.device), asked)
        if after_step is not None:
            after_step(step)
        video = video + (then - now) * (velocity["uncond"] + guidance * (velocity["cond"] - velocity["uncond"]))
    return video


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """Return uint8 videos of those in [-1, 1]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(video: torch.Tensor) -> torch.Tensor:
    """Return videos in [-1, 1] of uint8 ones."""
    return video.float() / 127.5 - 1


# ---- what is skipped -----------------------------------------------------------------------------------------------


class SkipShares:
    """Notes which share of its tiles each site skips in each step of a generation.

    All sites cost the same when they skip nothing: whatever their head dims, their heads make up the same width.

    Args:
        model: given to `enable`.
        batch: videos.
        steps: of the generation.
    """

    def __init__(self, model: VideoDiT, batch: int, steps: int) -> None:
        self.model = model
        self.shares = torch.zeros(batch, len(model.blocks), steps)

    def after_step(self, step: int) -> None:
        """Note what the next step skips: a state tells only that."""
        for site, state in enumerate(named_states(self.model).values()):
            share = state.sparsity(per="batch")
            if step == 0 and state.initial_mask is not None:  # static, at threshold -inf: all steps skip the same
                self.shares[:, site, 0] = share
            if step + 1 < self.shares.shape[2]:
                self.shares[:, site, step + 1] = share


class RandomSkips(SkipShares):
    """Puts random tiles into the skip states after each step, as many as another method skipped in the next one.

    Each head has as many, of all its q-tiles together. The model's threshold is -inf, so it votes nothing out itself.

    Args:
        model: given to `enable`.
        wanted: shares to skip, (B, sites, steps).
        pairs: prompt and seed of each video, which decide its tiles.
    """

    def __init__(self, model: VideoDiT, wanted: torch.Tensor, pairs: Sequence[Pair]) -> None:
        super().__init__(model, len(wanted), wanted.shape[2])
        self.wanted, self.pairs = wanted, pairs
        self._ranks: list[torch.Tensor] = []

    def after_step(self, step: int) -> None:
        """Plant, then note."""
        if step + 1 < self.wanted.shape[2]:
            states = list(named_states(self.model).values())
            if not self._ranks:
                self._ranks = [self._order(site, state) for site, state in enumerate(states)]
            for site, state in enumerate(states):
                ranks = self._ranks[site]
                count = (self.wanted[:, site, step + 1] * ranks[0, 0, 0].numel()).round().to(ranks.device)
                state.skip_mask.copy_(pack_bits(ranks < count.view(1, -1, 1, 1, 1)))
        super().after_step(step)

    def _order(self, site: int, state: SiteState) -> torch.Tensor:
        """Return the places of tiles in a random order, (slots, B, heads, q_tiles, k_tiles); the diagonal is last."""
        _, heads, seq_q, seq_k = state.capacity
        q_tiles, k_tiles = ceil_div(seq_q, state.tile_m), ceil_div(seq_k, state.tile_n)
        drawn = []
        for prompt, seed in self.pairs:
            generator = torch.Generator().manual_seed((1_000_003 * prompt + seed) * 1_009 + site)
            drawn.append(torch.rand(state.slots, heads, q_tiles, k_tiles, generator=generator))
        places = torch.stack(drawn, 1).to(state.skip_mask.device)
        for row in range(q_tiles):
            places[:, :, :, row, diagonal_tile(row, seq_q, seq_k, state.tile_m, state.tile_n)] = math.inf
        return places.flatten(3).argsort(-1).argsort(-1).view_as(places)


class _HeadClasses(TorchFunctionMode):
    """Classifies the heads of each self-attention that runs inside, in the order of the calls."""

    def __init__(self, pattern: masks.Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.found: list[torch.Tensor] = []  # (heads,) by call

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at attention of as many queries and keys as the pattern has tokens."""
        if function is F.scaled_dot_product_attention and args[0].shape[2] == args[1].shape[2] == self.pattern.tokens:
            q, k, v = (tensor.transpose(1, 2) for tensor in args[:3])
            generator = torch.Generator().manual_seed(len(self.found))
            self.found.append(masks.classify_heads(self.pattern, q, k, v, generator=generator).cpu())
        return function(*args, **(kwargs or {}))


def head_classes(setup: Setup, pattern: masks.Pattern) -> dict[str, torch.Tensor]:
    """Return the class of each head, (heads,) by site: what most calls of a dense generation say.

    SparseVideoGen (arXiv 2502.01776) classifies anew in each generation.
    """
    lite_attention.disable(setup.model)
    with _HeadClasses(pattern) as classes:
        sample(setup, [(CALIBRATION, 0)], setup.steps)
    count = len(setup.sites)
    calls = {site: torch.stack(classes.found[i::count]) for i, site in enumerate(setup.sites)}  # (calls, heads)
    return {site: (of_site.float().mean(0) > 0.5).long() for site, of_site in calls.items()}


def pattern_of(setup: Setup, method: str) -> masks.Pattern:
    """Return the pattern of a method such as "window:8,16,16"."""
    family, _, value = method.partition(":")
    numbers = [int(number) for number in value.split(",")] if value else []
    if family == "radial":
        width: dict[str, Any] = dict(zip(("min_width",), numbers, strict=False))
        return masks.radial(*setup.grid, **width)
    if family == "window":
        frames, rows, columns = numbers
        return masks.window(*setup.grid, radius=(frames, rows, columns))
    reach: dict[str, Any] = dict(zip(("near_frames", "near_tokens"), numbers, strict=False))
    classes = head_classes(setup, masks.spatial_temporal(*setup.grid, **reach))
    heads: Callable[[Any], torch.Tensor] = lambda site: classes[site.name]  # noqa: E731
    return masks.spatial_temporal(*setup.grid, heads=heads, **reach)


def schedule_of(value: str) -> torch.Tensor:
    """Return the thresholds of a value such as "-3", or "-3,4": the first four steps are dense."""
    threshold, _, dense_steps = value.partition(",")
    return schedules.dense_first(float(threshold), int(dense_steps or 0))


# ---- methods -------------------------------------------------------------------------------------------------------


def sample(setup: Setup, pairs: Sequence[Pair], steps: int, after_step: AfterStep | None = None) -> torch.Tensor:
    """Return uint8 videos (B, 3, F, H, W) of some prompts and seeds, made by the model as it is."""
    prompt = torch.cat([scene(number).prompt() for number, _ in pairs]).to(setup.device)
    start = torch.stack([noise(pair, setup.size) for pair in pairs]).to(setup.device)
    return to_bytes(denoise(setup.model, prompt, start, steps, setup.guidance, after_step))


def check(method: str, tables: dict[str, Path]) -> None:
    """Check the name of a method.

    Raises:
        ValueError: there is no such method.
    """
    family, _, value = method.partition(":")
    try:
        if family not in _FAMILIES:
            raise ValueError(f"one of {', '.join(_FAMILIES)}")
        if family in VOTING and not bool((schedule_of(value) <= 0).all()):
            raise ValueError("a threshold of at most 0")
        if family == "table" and value not in tables:
            raise ValueError(f"a name out of {sorted(tables)}")
        if family == "window" and len([int(number) for number in value.split(",")]) != 3:
            raise ValueError("three numbers")
        if family == "random" or (family == "steps" and not value.isdigit()):
            if value.partition(":")[0] not in (*VOTING, "table"):
                raise ValueError("a threshold or a table behind it")
            check(value, tables)
    except ValueError as error:
        raise ValueError(f"method {method}: expected {error}") from None
