"""What a user of the node decides, and how blocks and tokens are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lite_attention.compile.settings import SkipSettings
from lite_attention.integrations.numbers import numbers_in
from lite_attention.ops import DEFAULT_THRESHOLD
from lite_attention.ops.arguments import check_count, check_switch, require
from lite_attention.ops.validate import check_threshold
from lite_attention.presets import PRESETS, preset_of
from lite_attention.token_slices import ranges_of, slice_in

__all__ = ["CHOICES", "DEFAULTS", "NodeOptions", "exact_ranges", "told_ranges"]

_VOTES = "votes"  # the method that needs no residual
CHOICES = [*PRESETS, _VOTES]

DEFAULTS: dict[str, Any] = {
    "preset": "balanced", "threshold": DEFAULT_THRESHOLD, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "",
    "exact_tokens": "auto", "min_tokens": 12288, "memory": "device", "verbose": False,
}  # fmt: skip

_TOKENS = "'auto', or slices of the sequence, such as '0:256' or '-512:'; several with commas between"

_Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class NodeOptions:
    """The inputs of the node.

    Args:
        preset: "quality", "balanced" or "fast", see `lite_attention.presets`; or "votes", the method without residuals.
        threshold: of "votes": log2 units, at most 0; more negative skips less.
        start_percent: of the sampling, 0 to 1: attention is dense before.
        end_percent: likewise, dense after.
        dense_blocks: blocks that are always dense, such as "0, 1, 47-49".
        exact_tokens: tokens that are never skipped, and whose own attention skips nothing, see `exact_ranges`.
        min_tokens: shorter sequences are dense.
        memory: where residuals live, "device" or "host".
        verbose: log for each kind of call why it is dense.

    Raises:
        ValueError: an input out of range.
    """

    preset: str = DEFAULTS["preset"]
    threshold: float = DEFAULTS["threshold"]
    start_percent: float = DEFAULTS["start_percent"]
    end_percent: float = DEFAULTS["end_percent"]
    dense_blocks: str = DEFAULTS["dense_blocks"]
    exact_tokens: str = DEFAULTS["exact_tokens"]
    min_tokens: int = DEFAULTS["min_tokens"]
    memory: Literal["device", "host"] = DEFAULTS["memory"]
    verbose: bool = DEFAULTS["verbose"]

    def __post_init__(self) -> None:
        require(self.preset in CHOICES, "preset", f"one of {CHOICES}", repr(self.preset))
        check_threshold(self.threshold, allow_positive=False)
        for name in ("start_percent", "end_percent"):
            percent = getattr(self, name)
            is_share = type(percent) in (int, float) and 0 <= percent <= 1
            require(is_share, name, "a number from 0 to 1", repr(percent))
        require(self.start_percent < self.end_percent, "start_percent", "less than end_percent", self.start_percent)
        numbers_in("dense_blocks", self.dense_blocks)
        exact_ranges(self.exact_tokens, {}, 0)
        check_count("min_tokens", self.min_tokens, least=0)
        require(self.memory in ("device", "host"), "memory", "'device' or 'host'", repr(self.memory))
        check_switch("verbose", self.verbose)

    def settings(self, steps: int, skipping: int) -> SkipSettings:
        """Return what states are made with, in a sampling of so many steps, of which so many may skip."""
        common: dict[str, Any] = {"num_steps": max(skipping, 1), "slots": 1}
        if self.preset == _VOTES:
            return SkipSettings(threshold=self.threshold, **common)
        preset = preset_of(self.preset, steps)._asdict()
        return SkipSettings(method="residual", memory=self.memory, **preset, **common)


def exact_ranges(text: str, told: Mapping[str, Any], tokens: int) -> _Ranges:
    """Return the ranges of tokens, ends excluded, that a text names in a sequence of so many.

    Args:
        text: slices as in Python with commas between: "0:256, -512:". "auto" is what the model tells, and "" none.
        told: the model's `transformer_options`.
        tokens: of the sequence; slices are cut off at its ends.

    Raises:
        ValueError: other text, or a slice that ends before it starts.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    slices = [slice_in("exact_tokens", part, _TOKENS) for part in parts if part != "auto"]
    return ranges_of([*slices, *(told_ranges(told, tokens) if "auto" in parts else [])], tokens)


def told_ranges(told: Mapping[str, Any], tokens: int) -> _Ranges:
    """Return the tokens that are not of the video or image itself: text, audio, references, as far as a model tells.

    MiniMax-H3 tells the segments of its packed sequence, others where the image stands in the joint one.
    """
    layout, image = told.get("minimax_h3_layout"), told.get("img_slice")
    if layout is not None and layout.seq_len == tokens:
        return [(start, end) for start, end, kind in layout.segments if kind != "video"]
    if isinstance(image, (list, tuple)) and len(image) == 2 and all(isinstance(end, int) for end in image):
        start, end = image
        if 0 <= start <= end <= tokens:
            return [(0, start), (end, tokens)]
    return []
