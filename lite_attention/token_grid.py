"""The grid of tokens, frames x height x width, that a video transformer of diffusers makes of its latents."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Grid", "arguments_of", "grid_of", "grid_of_call", "parameters_of"]

Grid = tuple[int, int, int]  # frames, height, width, in tokens

# Where frames, height and width stand in `hidden_states`, by the class of the model; names are arguments of `forward`.
_CHANNELS_FIRST, _FRAMES_FIRST, _CHANNELS_LAST = (2, 3, 4), (1, 3, 4), (1, 2, 3)
_SIZES: dict[str, tuple[int | str, ...]] = {
    "AllegroTransformer3DModel": _CHANNELS_FIRST,
    "ChronoEditTransformer3DModel": _CHANNELS_FIRST,
    "CogVideoXTransformer3DModel": _FRAMES_FIRST,
    "ConsisIDTransformer3DModel": _FRAMES_FIRST,
    "CosmosTransformer3DModel": _CHANNELS_FIRST,
    "HunyuanVideo15Transformer3DModel": _CHANNELS_FIRST,
    "HunyuanVideoTransformer3DModel": _CHANNELS_FIRST,
    "Kandinsky5Transformer3DModel": _CHANNELS_LAST,
    "LTX2VideoTransformer3DModel": ("num_frames", "height", "width"),
    "LTXVideoTransformer3DModel": ("num_frames", "height", "width"),
    "MochiTransformer3DModel": _CHANNELS_FIRST,
    "SkyReelsV2Transformer3DModel": _CHANNELS_FIRST,
    "WanTransformer3DModel": _CHANNELS_FIRST,
    "WanVACETransformer3DModel": _CHANNELS_FIRST,
}


def grid_of(model: Any, frames: int, height: int, width: int) -> Grid:
    """Return the grid of tokens (frames, height, width) that a diffusers model makes of latents of these sizes.

    Args:
        model: with a `config.patch_size`, a number or three, as Wan and LTX have.
        frames: of the latents.
        height: of the latents.
        width: of the latents.

    Raises:
        ValueError: the model has no patch size.
    """
    config = getattr(model, "config", None)
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise ValueError(f"model: expected one with config.patch_size, got {type(model).__name__} without")
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    of_frames, of_rows, of_columns = patch
    return frames // of_frames, height // of_rows, width // of_columns


def grid_of_call(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Grid | None:
    """Return the grid of tokens of one call of a model; None where the model, or the call, is not known.

    Args:
        model: a video transformer of diffusers, or of a class derived from one.
        args: what its `forward` is called with.
        kwargs: likewise.
    """
    sizes = next((_SIZES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _SIZES), None)
    if sizes is None:
        return None
    given = arguments_of(model, args, kwargs)
    latents = given.get("hidden_states")
    shape = latents.shape if isinstance(latents, torch.Tensor) and latents.dim() == 5 else [None] * 5
    found: list[Any] = [shape[size] if isinstance(size, int) else given.get(size) for size in sizes]
    if not all(isinstance(size, int) for size in found):  # as where LTX is given coordinates in their place
        return None
    return grid_of(model, *found)


def arguments_of(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's `forward` is called with, by name."""
    return {**dict(zip(parameters_of(type(model).forward), args, strict=False)), **kwargs}


@functools.cache
def parameters_of(forward: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a `forward`."""
    return list(inspect.signature(forward).parameters)[1:]  # without self
