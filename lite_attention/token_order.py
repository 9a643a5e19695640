"""Tokens in an order in which a tile of attention is a compact block of the video.

A model lays its tokens out frame by frame, row by row, so the tokens of a q-tile are a few long thin rows. In the order
"tile3d" they are a block, such as 4 frames x 6 rows x 8 columns: what is near in the video shares tiles, and more
tiles can be told not to matter. Attention does not care about the order as long as the rotary positions move along, so
the tokens are permuted once, behind the patch embedding, and put back once, behind the last projection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lite_attention.ops.targets import target_of
from lite_attention.ops.threads import PerThread
from lite_attention.ops.tiles import tile_shape

__all__ = ["TokenOrder", "block_of", "check", "tile3d_order", "tile3d_rank"]

Block = tuple[int, int, int]  # frames, rows, columns
Grid = tuple[int, int, int]  # of tokens: frames, height, width


def tile3d_rank(
    frames: int, height: int, width: int, block: Block = (4, 6, 8), device: torch.device | str | None = None
) -> torch.Tensor:
    """Return int64 (tokens,): where each token, counted frame by frame and row by row, stands in the order "tile3d".

    Blocks follow each other in raster order, and so do the tokens in a block. Blocks at the far edges are cut off where
    the video ends.

    Args:
        frames: of the grid of tokens, that is, after patching.
        height: rows of the grid.
        width: columns of the grid.
        block: frames, rows and columns of a block.
        device: where the result lives.

    Raises:
        ValueError: a size below 1.
    """
    for name, sizes in {"frames, height, width": (frames, height, width), "block": block}.items():
        if min(sizes) < 1:
            raise ValueError(f"{name}: expected at least 1, got {sizes}")
    # By axis: the start of the block that an index is in, its size, and the place within.
    f0, df, f = _blocks(frames, block[0], (-1, 1, 1), device)
    h0, dh, h = _blocks(height, block[1], (1, -1, 1), device)
    w0, dw, w = _blocks(width, block[2], (1, 1, -1), device)
    before = f0 * (height * width) + df * (h0 * width + dh * w0)
    return (before + (f * dh + h) * dw + w).flatten()


def _blocks(
    size: int, block: int, shape: tuple[int, ...], device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.arange(size, device=device).view(shape)
    start = index // block * block
    return start, (size - start).clamp(max=block), index - start


def tile3d_order(
    frames: int, height: int, width: int, block: Block = (4, 6, 8), device: torch.device | str | None = None
) -> torch.Tensor:
    """Return int64 (tokens,): which token stands at each place of the order "tile3d"; `tile3d_rank` is its inverse."""
    rank = tile3d_rank(frames, height, width, block, device)
    return torch.empty_like(rank).scatter_(0, rank, torch.arange(rank.shape[0], device=rank.device))


def check(token_order: str | Sequence[int], model: nn.Module | None = None) -> None:
    """Check what `enable(token_order=)` takes: "tile3d", or the (frames, rows, columns) of a block.

    Raises:
        ValueError: it is neither, or the model is of a class whose tokens cannot be reordered.
    """
    if model is not None:
        _supported_class(model)
    if token_order == "tile3d":
        return
    if isinstance(token_order, str) or len(token_order) != 3 or any(type(n) is not int or n < 1 for n in token_order):
        raise ValueError(f"token_order: expected 'tile3d' or a block (frames, rows, columns), got {token_order!r}")


def block_of(token_order: str | Sequence[int], tile_m: int) -> Block:
    """Return the block of a token order: as given, or for "tile3d" the most cube-like one of tile_m tokens.

    4 x 6 x 8 for 192, 4 x 4 x 8 for 128, 4 x 4 x 4 for 64. Shorter in time than in space, since frames differ more than
    rows.
    """
    check(token_order)
    if not isinstance(token_order, str):
        frames, rows, columns = token_order
        return frames, rows, columns
    best: Block = (1, 1, tile_m)
    for frames in range(1, tile_m + 1):
        for rows in range(frames, tile_m // frames + 1):
            columns = tile_m // (frames * rows)
            if rows <= columns and frames * rows * columns == tile_m and frames + rows + columns < sum(best):
                best = (frames, rows, columns)
    return best


@dataclass
class _Video:
    """The video of one call."""

    grid: Grid = (1, 1, 1)
    block: Block = (1, 1, 1)


class _Hooks:
    """The hooks of one model. All is computed from the sizes of the call, so compiled code may have dynamic shapes."""

    def __init__(
        self, token_order: str | Sequence[int], tiles: tuple[int, int] | None, head_dim: int, quantization: str
    ) -> None:
        self.token_order, self.tiles, self.head_dim, self.quantization = token_order, tiles, head_dim, quantization
        self._of_thread = PerThread(_Video)
        self._compiled = _Video()

    @property
    def video(self) -> _Video:
        # Dynamo does not trace what belongs to a thread; a graph reads what was written in the same run.
        return self._compiled if torch.compiler.is_compiling() else self._of_thread()

    def begin(self, hidden_states: torch.Tensor, grid: Grid) -> None:
        """Note what the call is about; `rope` is the first that runs."""
        device, dtype = hidden_states.device, hidden_states.dtype
        # What no kernel quantizes so is left dense, in any order.
        quantizes = target_of(device).quantizes(self.head_dim, self.quantization)
        quantization = self.quantization if quantizes else "none"
        tile_m, _ = self.tiles or tile_shape(self.head_dim, dtype, device, quantization)
        self.video.grid, self.video.block = grid, block_of(self.token_order, tile_m)

    def there(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return tokens in the new order."""
        frames, height, width = self.video.grid
        if tokens.shape[dim] != frames * height * width:
            raise ValueError(
                f"token_order: expected {frames} x {height} x {width} = {frames * height * width} tokens, "
                f"got {tokens.shape[dim]}"
            )
        return tokens.index_select(dim, tile3d_order(*self.video.grid, self.video.block, tokens.device))

    def back(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Put the tokens of an output (batch, tokens, channels) back in their places."""
        return output.index_select(1, tile3d_rank(*self.video.grid, self.video.block, output.device))


class _Wan(_Hooks):
    """Of `WanTransformer3DModel`: the patch embedding is a convolution, and its output is flattened afterwards."""

    def rope(self, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        sizes, patch = args[0].shape[2:], module.patch_size
        self.begin(args[0], (sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]))
        return tuple(self.there(part) for part in output)

    def embed(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.there(output.flatten(2), 2).view(output.shape)

    def time(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        count = kwargs.get("timestep_seq_len")
        if count is None:  # one for the whole video
            return args, kwargs
        timestep, *rest = args
        return (self.there(timestep.view(-1, count)).flatten(), *rest), kwargs


class _LTX(_Hooks):
    """Of `LTXVideoTransformer3DModel`: tokens come in as a sequence, with the sizes of the grid beside them."""

    def rope(self, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_states, *grid = args[:4]
        if None in grid:
            raise ValueError(f"token_order: expected a call with num_frames, height and width, got {grid}")
        self.begin(hidden_states, (grid[0], grid[1], grid[2]))
        return tuple(self.there(part) for part in output)

    def embed(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.there(output)

    def time(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        timestep, *rest = args
        batch = kwargs["batch_size"]
        if timestep.shape[0] == batch:  # one for the whole video
            return args, kwargs
        return (self.there(timestep.view(batch, -1)).flatten(), *rest), kwargs


# By class: hooks, and the modules that make tokens and look at the timestep. Both have a `rope` and a `proj_out`.
_SUPPORTED: dict[str, tuple[type[_Wan] | type[_LTX], str, str]] = {
    "WanTransformer3DModel": (_Wan, "patch_embedding", "condition_embedder"),
    "LTXVideoTransformer3DModel": (_LTX, "proj_in", "time_embed"),
}


def _supported_class(model: nn.Module) -> str:
    """Return by which class of diffusers a model's tokens can be reordered.

    Raises:
        ValueError: by none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _SUPPORTED:
            return cls.__name__
    raise ValueError(
        f"token_order: expected a model out of {', '.join(_SUPPORTED)}, got {type(model).__name__}; "
        "leave token_order out for others"
    )


class TokenOrder:
    """A model that computes on reordered tokens until `detach`.

    Args:
        model: a `WanTransformer3DModel` or `LTXVideoTransformer3DModel` of diffusers.
        token_order: "tile3d", or the (frames, rows, columns) of a block.
        tiles: (tile_m, tile_n) that the attention uses; None = the table's.
        quantization: of the attention, which the table goes by.

    Raises:
        ValueError: another model, or another order; later, in a call: the model gets other tokens than its grid has.
    """

    def __init__(
        self,
        model: Any,
        token_order: str | Sequence[int],
        tiles: tuple[int, int] | None = None,
        quantization: str = "none",
    ) -> None:
        check(token_order)
        kind, embed, time = _SUPPORTED[_supported_class(model)]
        hooks = kind(token_order, tiles, model.config.attention_head_dim, quantization)
        self._model = weakref.ref(model)
        self._hooks: dict[str, Callable[[nn.Module], RemovableHandle]] = {
            "rope": lambda module: module.register_forward_hook(hooks.rope),
            embed: lambda module: module.register_forward_hook(hooks.embed),
            time: lambda module: module.register_forward_pre_hook(hooks.time, with_kwargs=True),
            "proj_out": lambda module: module.register_forward_hook(hooks.back),
        }
        self._attached: dict[str, tuple[weakref.ref[nn.Module], RemovableHandle]] = {}
        self._attach()

    def _attach(self) -> None:
        """Put each hook on the module that has its name now: an adapter may have taken the place of another."""
        model = self._model()
        assert model is not None
        for name, register in self._hooks.items():
            module = model.get_submodule(name)
            before = self._attached.get(name)
            if before is None or before[0]() is not module:
                if before is not None:
                    before[1].remove()
                self._attached[name] = weakref.ref(module), register(module)

    def check(self, args: Any, kwargs: Any) -> None:
        """Prepare a forward of the model.

        Raises:
            ValueError: its tokens are split over processes.
        """
        if getattr(self._model(), "_parallel_config", None) is not None:
            raise ValueError(
                "token_order: expected None with context parallelism, which splits the tokens before they could be "
                "reordered"
            )
        self._attach()

    def detach(self) -> None:
        """Let the model compute on its tokens as they come."""
        for _, handle in self._attached.values():
            handle.remove()
        self._attached.clear()
