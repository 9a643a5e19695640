"""Static masks of the quality benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import lite_attention
from benchmarks.quality_setup import CALIBRATION, Setup, sample
from lite_attention import masks

PATTERNS = ("radial", "spatial-temporal", "window")


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
