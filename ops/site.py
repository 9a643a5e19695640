"""`Site`: one attention call of a model, as the swap, thresholds, masks and reports see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Site", "SiteKeep", "SiteThreshold", "Threshold"]


@dataclass
class Site:
    """One attention call of a model. Symbolic sizes are torch.SymInt.

    `select` gets it to decide, a callable threshold or initial mask to tell sites apart, `report` prints it.
    """

    name: str  # path of the module that calls attention, in the model; relative to what was compiled if that is unknown
    class_name: str  # of that module
    ordinal: int  # among the sites of its graph
    q_shape: tuple[Any, ...]  # batch, seq_len, heads, head_dim
    k_shape: tuple[Any, ...]
    v_shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    is_self_attention: bool | None = None  # None: no evidence in the graph
    reason: str | None = None  # why it does not skip; None = swapped
    fits_dense_kernel: bool = False  # the settings ask for `lite_attention::attention`, and it computes this call
    tile_shape: tuple[int, int] | None = None  # (tile_m, tile_n) of its state; None before that is born
    owner_paths: tuple[str, ...] = ()  # of the parameters that tell its layer, where its graph was compiled, as `name`

    @property
    def value_dim(self) -> Any:
        """Width of a value vector."""
        return self.v_shape[3]

    @property
    def swapped(self) -> bool:
        """Whether the skip-aware op took the place of the original attention."""
        return self.reason is None

    @property
    def dense_kernel(self) -> bool:
        """Whether `lite_attention::attention` took the place of the original attention."""
        return self.fits_dense_kernel and not self.swapped


# Log2 units, at most 0: a number, or a tensor that broadcasts to (slots, steps, heads).
Threshold = float | torch.Tensor
# One for all sites, or a callable that returns one for a `Site` whose sizes are numbers.
SiteThreshold = Threshold | Callable[[Site], Threshold]
# Share of tiles, above 0 and at most 1: a number, or a tensor (steps,). One for all sites, or by `Site` likewise.
SiteKeep = float | torch.Tensor | Callable[[Site], float | torch.Tensor]
