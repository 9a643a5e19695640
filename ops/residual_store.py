"""How `residual_attention` keeps residuals: their dtype, their scales, and the order of their columns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lite_attention.ops.quantize import quantize_rows

__all__ = ["Residuals", "in_columns", "in_places"]

# Column 8a + 2t + b is at t * (Dv / 4) + 2a + b. So what a thread of the kernel has of a row, columns 8a + 2t + b of an
# accumulator, lies together.
_THREADS, _NEIGHBORS = 4, 2


class Residuals(NamedTuple):
    """The residuals of one slot, as far as a call reaches."""

    values: torch.Tensor  # [planes, B, Hq, Sq, Dv]
    scales: torch.Tensor | None  # [planes, B, Hq, Sq]
    lses: torch.Tensor  # [planes, B, Hq, Sq], what the mask of each leaves out of the LSE

    @classmethod
    def of(
        cls, residual: torch.Tensor, residual_scale: torch.Tensor | None, row_lse: torch.Tensor, slot: int,
        batch: int, seq_q: int,
    ) -> Residuals:  # fmt: skip
        """Return views of the op's tensors."""
        here = (slot, slice(None), slice(batch), slice(None), slice(seq_q))
        scales = None if residual_scale is None else residual_scale[here]
        return cls(residual[here], scales, row_lse[:, 1:][here])

    def put(self, plane: int, batch: int, head: int, residual: torch.Tensor, lse: torch.Tensor) -> None:
        """Store the residual [Sq, Dv] and LSE [Sq] of a head."""
        at = (plane, batch, head)
        values = in_places(residual.to(torch.float32))
        if self.scales is not None:
            values, self.scales[at] = quantize_rows(values)
        self.values[at], self.lses[at] = values, lse

    def get(self, plane: int, batch: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual float32 [Sq, Dv] and LSE [Sq] of a head."""
        at = (plane, batch, head)
        values = self.values[at].to(torch.float32)
        if self.scales is not None:
            values = values * self.scales[at].unsqueeze(-1)
        return in_columns(values), self.lses[at]


def in_places(x: torch.Tensor) -> torch.Tensor:
    """Return rows [..., Dv] as they are stored."""
    if x.shape[-1] % (_THREADS * _NEIGHBORS):
        return x
    by_thread: torch.Tensor = x.unflatten(-1, (-1, _THREADS, _NEIGHBORS)).transpose(-3, -2)
    return by_thread.flatten(-3)


def in_columns(x: torch.Tensor) -> torch.Tensor:
    """Return stored rows [..., Dv] with their columns in order."""
    if x.shape[-1] % (_THREADS * _NEIGHBORS):
        return x
    in_order: torch.Tensor = x.unflatten(-1, (_THREADS, -1, _NEIGHBORS)).transpose(-3, -2)
    return in_order.flatten(-3)
