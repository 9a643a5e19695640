"""`lite_attention::attention` on the CPU: torch's own flash kernel, which also returns the LSE."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from lite_attention.ops.allocate import empty_output
from lite_attention.ops.torch_internals import FLASH_ON_CPU
from lite_attention.ops.validate import check_dense_call

__all__ = ["attention_cpu"]

_SCORES = 2**22  # to look at, at once


def attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::attention`; see `lite_attention.ops.schema` for the contract.

    Raises:
        ValueError: an argument does not fit.
    """
    check_dense_call(q, k, v, key_mask, scale)
    batch, seq_q, heads, head_dim = q.shape
    value_dim = v.shape[3]
    scale = head_dim**-0.5 if scale is None else scale
    out = empty_output(q, v)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)

    # The kernel knows one head dim only. Zeros at the end of q and k leave the scores as they are, those of v are cut.
    width = max(head_dim, value_dim)
    q, k, v = (pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    # A mask given to the kernel would be added to the scores; leaving the keys out is exact whatever they hold.
    by_row = [slice(None)] if key_mask is None or len(key_mask) == 1 else [slice(b, b + 1) for b in range(batch)]
    for i, rows in enumerate(by_row):
        some_k, some_v = (x if key_mask is None else x[rows, key_mask[i]] for x in (k, v))
        if some_k.shape[1] == 0:
            out[rows], lse[rows] = 0, -math.inf
            continue
        # Older kernels take the last stride for 1, whatever it is.
        tensors = (x if x.stride(3) == 1 else x.contiguous() for x in (q[rows], some_k, some_v))
        weighted, sums = FLASH_ON_CPU(*(x.transpose(1, 2) for x in tensors), scale=scale)
        # The kernel says 0 also of a row whose scores are all -inf.
        sums.masked_fill_(_without_a_score(q[rows], some_k, scale, sums == 0), -math.inf)
        out[rows], lse[rows] = weighted.transpose(1, 2)[..., :value_dim], sums
    return out, lse


def _without_a_score(q: torch.Tensor, k: torch.Tensor, scale: float, asked: torch.Tensor) -> torch.Tensor:
    """Return the rows whose scores are all -inf, of those that are asked for, bool [B, Hq, Sq]."""
    found = torch.zeros_like(asked)
    group = q.shape[2] // k.shape[2]
    for b, h in asked.any(-1).nonzero().tolist():
        keys = k[b, :, h // group].float().T
        for rows in asked[b, h].nonzero().flatten().split(max(_SCORES // keys.shape[1], 1)):
            scores = q[b, rows, h].float() @ keys * scale
            found[b, h, rows] = (scores == -math.inf).all(-1)
    return found
