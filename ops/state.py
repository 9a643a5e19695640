"""`SkipState`: the memory of a site that votes: which tiles to skip, which step it is at, and how bold it may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.ops.arguments import threshold_values
from lite_attention.ops.bitmask import WORD_BITS
from lite_attention.ops.buffers import vote_buffers
from lite_attention.ops.options import StateOptions, check_options
from lite_attention.ops.saved_parts import check_same_thresholds
from lite_attention.ops.site_state import DEFAULT_SLOTS, SiteState
from lite_attention.ops.tiles import tile_shape
from lite_attention.ops.validate import check_threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DEFAULT_SLOTS", "DEFAULT_THRESHOLD", "STATE_BUFFERS", "SkipState"]

DEFAULT_THRESHOLD = -10.0

STATE_BUFFERS = ("skip_mask", "control", "threshold", "initial_mask")  # as the op takes them; the last may be None


class SkipState(SiteState):
    """The buffers of one attention site, as `lite_attention::skip_attention` takes them, and their meaning.

    What holds of all states is said at `SiteState`.

    Args:
        batch: batch size, as are the others below, at most: the op may be called with less.
        heads: query heads, exactly.
        seq_q: query tokens.
        seq_k: key tokens.
        tile_m: query rows of a tile.
        tile_n: keys of a tile.
        slots: branches to tell apart.
        threshold: in log2 units, at most 0. A tile is skipped from the next step on if in every row its largest score
            lies at least this far below the largest seen before. A number, or a tensor that broadcasts to
            (slots, steps, heads); past its end the last slot and the last step hold.
        num_steps: denoising steps of a generation: after so many calls the next one starts fresh. None = unknown.
        refresh: every so many steps starts fresh; None = only the first.
        auto_step: the op counts the steps. False: the caller writes `step`.
        initial_mask: bool tensor (batch or 1, heads or 1, q_tiles, k_tiles), True = skipped from the start.
        persistent: save the buffers with the model that holds this module.
        allow_positive: accept thresholds above 0.
        device: where the buffers live.

    Raises:
        ValueError: an argument out of range, with what was expected and what came.
    """

    BUFFERS = STATE_BUFFERS

    threshold: torch.Tensor

    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        seq_q: int,
        seq_k: int,
        tile_m: int,
        tile_n: int,
        slots: int = DEFAULT_SLOTS,
        threshold: float | torch.Tensor = DEFAULT_THRESHOLD,
        num_steps: int | None = None,
        refresh: int | None = None,
        auto_step: bool = True,
        initial_mask: torch.Tensor | None = None,
        persistent: bool = False,
        allow_positive: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            batch=batch, heads=heads, seq_q=seq_q, seq_k=seq_k, tile_m=tile_m, tile_n=tile_n, auto_step=auto_step,
            persistent=persistent,
        )  # fmt: skip
        check_options(
            slots=slots, num_steps=num_steps, refresh=refresh, auto_step=auto_step, persistent=persistent,
            allow_positive=allow_positive,
        )  # fmt: skip
        self.allow_positive = allow_positive
        steps = threshold.shape[-2] if isinstance(threshold, torch.Tensor) and threshold.dim() > 1 else 1
        steps = max(steps, int(num_steps or 0))
        # A state born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            layout = vote_buffers(self.sizes, slots=int(slots), steps=steps, has_initial_mask=initial_mask is not None)
            buffers = self._new_buffers(
                layout, slots=slots, num_steps=num_steps, refresh=refresh, initial_mask=initial_mask, device=device
            )
        self._hold(buffers)
        self.set_threshold(threshold)

    @classmethod
    def for_inputs(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        *,
        quantization: str = "none",
        implementation: str | None = None,
        **options: Unpack[StateOptions],
    ) -> SkipState:
        """Return a state sized for q [B, Sq, Hq, D] and k [B, Sk, Hkv, D], with the tile sizes of the table."""
        tile_m, tile_n = tile_shape(q.shape[-1], q.dtype, q.device, quantization, implementation)
        sizes: dict[str, Any] = {"batch": q.shape[0], "heads": q.shape[2], "seq_q": q.shape[1], "seq_k": k.shape[1]}
        return cls(**{**sizes, "tile_m": tile_m, "tile_n": tile_n, "device": q.device, **options})

    @classmethod
    def over(cls, buffers: Mapping[str, torch.Tensor], tile_m: int, tile_n: int) -> SkipState:
        """Return a state that shares existing buffers, by name, such as those of an exported program."""
        slots, batch, heads, q_tiles, words = buffers["skip_mask"].shape
        state = cls(
            batch=batch, heads=heads, seq_q=q_tiles * tile_m, seq_k=words * WORD_BITS * tile_n, tile_m=tile_m,
            tile_n=tile_n, slots=slots, allow_positive=True, device="meta",
        )  # fmt: skip
        state._buffers.update(buffers)
        return state

    def set_threshold(self, threshold: float | torch.Tensor) -> None:
        """Write the threshold in place: a number, or a tensor that broadcasts to (slots, steps, heads).

        Raises:
            ValueError: no numbers, NaN, above 0 without `allow_positive`, or a table that does not broadcast.
        """
        self.threshold.copy_(self.threshold_table(threshold))

    def threshold_table(self, threshold: float | torch.Tensor, heads: int | None = None) -> torch.Tensor:
        """Return what `set_threshold` would write, float32 (slots, steps, heads), and raise what it would raise.

        Args:
            threshold: a number or a tensor.
            heads: those of all ranks that share them; None = those of this state.
        """
        check_threshold(threshold, allow_positive=self.allow_positive)
        shape = torch.Size((*self.threshold.shape[:2], heads or self.threshold.shape[2]))
        table = threshold_values("threshold", threshold)
        try:
            for dim in (-2, -3):  # past its end the last step, and the last slot, hold
                if table.dim() >= -dim and 1 < table.shape[dim] < shape[dim]:
                    last = table.narrow(dim, table.shape[dim] - 1, 1)
                    table = torch.cat([table, last.repeat_interleave(shape[dim] - table.shape[dim], dim)], dim)
            return table.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"threshold: expected a number or a tensor that broadcasts to (slots, steps, heads) = "
                f"{tuple(shape)}, got {tuple(table.shape)}; a longer table needs a state made with num_steps"
            ) from None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy saved buffers into this state, in place, as `SiteState.load_state_dict` does.

        Raises:
            ValueError: as there; or a module deals its heads, and thresholds by head are not those of the module.
        """
        if self.is_dealt and "threshold" in state_dict:
            check_same_thresholds(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], *, device: Any = None, **options: Any) -> SkipState:
        """Return a state of the geometry that was saved, holding what was saved.

        Raises:
            ValueError: a tensor is missing, unknown or not one.
        """
        geometry = cls._saved_geometry(state_dict)
        table = state_dict["threshold"]
        named: dict[str, Any] = {**geometry, "allow_positive": bool((table > 0).any()), **options}
        state = cls(
            **named, slots=table.shape[0], threshold=table, device=device,
            initial_mask=cls._saved_initial_mask(state_dict, geometry),
        )  # fmt: skip
        state.hold_place(state_dict.get("part"))
        state.load_state_dict(state_dict)
        return state
