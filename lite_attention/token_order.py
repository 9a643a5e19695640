"""Tokens in an order in which a tile of attention is a compact block of the video.

A model lays its tokens out frame by frame, row by row, so the tokens of a q-tile are a few long thin rows. In the order
"tile3d" they are a block, such as 4 frames x 6 rows x 8 columns: what is near in the video shares tiles, and more
tiles can be told not to matter. Attention does not care about the order as long as the rotary positions move along, so
the tokens are permuted once, behind the patch embedding, and put back once, behind the last projection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lite_attention.ops.targets import target_of
from lite_attention.ops.threads import PerThread
from lite_attention.ops.tiles import tile_shape
from lite_attention.token_grid import parameters_of

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

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    def there(self, tokens: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return tokens in the new order."""
        if tokens.shape[dim] != self.tokens:
            frames, height, width = self.grid
            raise ValueError(
                f"token_order: expected {frames} x {height} x {width} = {self.tokens} tokens, got {tokens.shape[dim]}"
            )
        return tokens.index_select(dim, tile3d_order(*self.grid, self.block, tokens.device))

    def back(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (batch, tokens, channels) in their own order."""
        return tokens.index_select(1, tile3d_rank(*self.grid, self.block, tokens.device))


class _Hooks:
    """The hooks of one model. All is computed from the sizes of the call, so compiled code may have dynamic shapes.

    Where processes share the sequence, the model splits it: what it is given, and what its patch embedding and its last
    projection return, is whole. Its rotary embedding alone returns a part.
    """

    modules: tuple[str, ...]  # whose outputs are changed, by the method of that name

    def __init__(
        self, token_order: str | Sequence[int], tiles: tuple[int, int] | None, model: Any, quantization: str
    ) -> None:
        self.token_order, self.tiles, self.quantization = token_order, tiles, quantization
        self.head_dim = model.config.attention_head_dim
        self.place = (0, 1)  # rank and number of the processes that share the sequence
        self._arguments = parameters_of(type(model).forward)
        self._of_thread = PerThread(_Video)
        self._compiled = _Video()

    @property
    def video(self) -> _Video:
        # Dynamo does not trace what belongs to a thread; a graph reads what was written in the same run.
        return self._compiled if torch.compiler.is_compiling() else self._of_thread()

    def arguments(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of a call with what is by token in the new order."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        changed = self.reordered(model, given)
        return ((), {**given, **changed}) if changed else (args, kwargs)

    def reordered(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that are by token, in the new order."""
        raise NotImplementedError

    def block_for(self, hidden_states: torch.Tensor) -> Block:
        """Return the block that suits the tiles of a call."""
        device, dtype = hidden_states.device, hidden_states.dtype
        # What no kernel quantizes so is left dense, in any order.
        quantizes = target_of(device).quantizes(self.head_dim, self.quantization)
        quantization = self.quantization if quantizes else "none"
        tile_m, _ = self.tiles or tile_shape(self.head_dim, dtype, device, quantization)
        return block_of(self.token_order, tile_m)

    def positions(
        self, module: Any, args: tuple[Any, ...], output: tuple[torch.Tensor, ...], grid: Grid
    ) -> tuple[torch.Tensor, ...]:
        """Note what the call is about, and return rotary positions (..., tokens, ...) along dim 1 in the new order."""
        video, (rank, ranks) = self.video, self.place
        video.grid, video.block = grid, self.block_for(args[0])
        if ranks == 1 or output[0].shape[1] == video.tokens:
            return tuple(video.there(x) for x in output)
        whole = type(module).forward(module, *args)  # without what splits it
        return tuple(video.there(x).tensor_split(ranks, 1)[rank] for x in whole)

    def proj_out(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.video.back(output)


class _Wan(_Hooks):
    """Of `WanTransformer3DModel`: the patch embedding is a convolution, and its output is flattened afterwards."""

    modules = ("rope", "patch_embedding", "proj_out")

    def reordered(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        hidden_states, timestep = given["hidden_states"], given["timestep"]
        if timestep.dim() != 2:  # one for the whole video
            return {}
        video = _Video(_grid_of_latents(hidden_states, model.config.patch_size), self.block_for(hidden_states))
        return {"timestep": video.there(timestep)}

    def rope(self, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.positions(module, args, output, _grid_of_latents(args[0], module.patch_size))

    def patch_embedding(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.video.there(output.flatten(2), 2).view(output.shape)


def _grid_of_latents(latents: torch.Tensor, patch: Sequence[int]) -> Grid:
    frames, height, width = latents.shape[2:]
    return frames // patch[0], height // patch[1], width // patch[2]


class _LTX(_Hooks):
    """Of `LTXVideoTransformer3DModel`: tokens come in as a sequence, with the sizes of the grid beside them."""

    modules = ("rope", "proj_out")

    def reordered(self, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        tokens, timestep = given["hidden_states"], given["timestep"]
        grid = [given.get(name) for name in ("num_frames", "height", "width")]
        video = _Video(self._checked(grid), self.block_for(tokens))
        if timestep.numel() != len(tokens):  # one for each token, not for the video
            timestep = video.there(timestep.reshape(len(tokens), -1))
        return {"hidden_states": video.there(tokens), "timestep": timestep}

    def rope(self, module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.positions(module, args, output, self._checked(args[1:4]))

    @staticmethod
    def _checked(grid: Sequence[Any]) -> Grid:
        if None in grid:
            raise ValueError(f"token_order: expected a call with num_frames, height and width, got {[*grid]}")
        frames, height, width = grid
        return frames, height, width


_SUPPORTED: dict[str, type[_Wan] | type[_LTX]] = {"WanTransformer3DModel": _Wan, "LTXVideoTransformer3DModel": _LTX}


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
        self._of_model = hooks = _SUPPORTED[_supported_class(model)](token_order, tiles, model, quantization)
        self._model = weakref.ref(model)
        self._hooks: dict[str, Callable[[nn.Module], RemovableHandle]] = {
            "": lambda module: module.register_forward_pre_hook(hooks.arguments, with_kwargs=True)
        }
        for name in hooks.modules:
            hook = getattr(hooks, name)
            self._hooks[name] = lambda module, hook=hook: module.register_forward_hook(hook)  # type: ignore[misc]
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
        """Prepare a forward of the model."""
        from lite_attention.parallel.shard import context_parallel_of

        split = context_parallel_of(self._model())
        if split is not None:
            rank = split._ring_local_rank * split.ulysses_degree + split._ulysses_local_rank
            self._of_model.place = (rank, split.ring_degree * split.ulysses_degree)
        self._attach()

    def detach(self) -> None:
        """Let the model compute on its tokens as they come."""
        for _, handle in self._attached.values():
            handle.remove()
        self._attached.clear()
