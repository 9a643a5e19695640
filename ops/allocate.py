"""Empty results of the ops, as a caller gets them: for the CPU kernels, the CUDA kernels and the fakes."""

from __future__ import annotations

import torch

__all__ = ["empty_output"]


def empty_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return an empty [B, Sq, Hq, Dv]: dense, its dims in q's stride order, the head dim innermost."""
    like = torch.empty_like(q if q.stride(-1) == 1 else q.contiguous())
    if v.shape[-1] == q.shape[-1]:
        return like
    strides = like.stride()
    order = [*sorted(range(3), key=lambda dim: -strides[dim]), 3]
    return torch.empty_permuted((*q.shape[:-1], v.shape[-1]), order, dtype=q.dtype, device=q.device)
