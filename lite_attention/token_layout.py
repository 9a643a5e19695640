"""`Layout`: where the picture stands in a sequence that text, audio or references share with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lite_attention.token_grid import arguments_of, grid_of_call

__all__ = ["Layout", "Ranges", "layout_of_call", "tells_layout"]

Ranges = tuple[tuple[int, int], ...]  # (start, end) of tokens


class Layout(NamedTuple):
    """Where the tokens of the picture stand in the joint sequence; all others are of text, audio or references."""

    start: int
    tokens: int
    behind: int | None = None  # tokens behind it; None = any number
    is_one: bool = False  # processes split it as one sequence; otherwise text and picture apart

    def fits(self, tokens: int) -> bool:
        """Return whether a sequence of so many tokens may be the joint one."""
        end = self.start + self.tokens
        return tokens >= end if self.behind is None else tokens == end + self.behind

    def ranges(self, tokens: int) -> Ranges:
        """Return the ranges that are not of the picture in a sequence of so many tokens."""
        if self.fits(tokens):
            parts = (0, self.start), (self.start + self.tokens, tokens)
            return tuple((start, end) for start, end in parts if start < end)
        return () if tokens == self.tokens else ((0, tokens),)  # the picture alone, or text or audio alone


def _minimax_h3(given: Mapping[str, Any], _: int | None) -> Layout | None:
    """The picture is the last rows; rows of a picture before them are of references."""
    tags = given.get("token_tags")
    if not isinstance(tags, torch.Tensor) or tags.dim() != 1:
        return None
    others = torch.nonzero(tags)
    start = int(others[-1]) + 1 if len(others) else 0
    return Layout(start, tags.shape[0] - start, 0, is_one=True)


def _alone(given: Mapping[str, Any], _: int | None) -> Layout | None:
    latents = given.get("hidden_states")
    return (
        Layout(0, latents.shape[1], 0, is_one=True)
        if isinstance(latents, torch.Tensor) and latents.dim() == 3
        else None
    )


def _text_behind(_: Mapping[str, Any], tokens: int | None) -> Layout | None:
    return None if tokens is None else Layout(0, tokens)


def _text_first(given: Mapping[str, Any], tokens: int | None) -> Layout | None:
    text = given.get("encoder_hidden_states")
    return Layout(text.shape[1], tokens, 0) if tokens is not None and isinstance(text, torch.Tensor) else None


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], int | None], Layout | None]] = {
    "CogVideoXTransformer3DModel": _text_first,
    "ConsisIDTransformer3DModel": _text_first,
    "HunyuanVideo15Transformer3DModel": _text_behind,
    "HunyuanVideoTransformer3DModel": _text_behind,
    "LTX2VideoTransformer3DModel": _alone,  # its audio is a sequence of its own
    "MiniMaxH3Transformer3DModel": _minimax_h3,
    "MochiTransformer3DModel": _text_behind,
}


def tells_layout(model: Any) -> bool:
    """Return whether the layout of a model is known by its class."""
    return any(cls.__name__ in _LAYOUTS for cls in type(model).__mro__)


def layout_of_call(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout | None:
    """Return where the picture stands in a call of a model; None where the model, or the call, is not known."""
    layout = next((_LAYOUTS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _LAYOUTS), None)
    if layout is None:
        return None
    grid = grid_of_call(model, args, kwargs)
    return layout(arguments_of(model, args, kwargs), None if grid is None else math.prod(grid))
