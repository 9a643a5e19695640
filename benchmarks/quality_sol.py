"""Sol-Attn (arXiv 2607.24027) as comfy-kitchen has it, in the place of a model's own attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality_simulation import StandIn, part_means
from lite_attention.ops.units import LOG2_E

BLOCK = 64  # queries and keys of a block
_HEAD_DIM = 128  # the only one


@dataclass(frozen=True)
class Sol:
    """What a name such as "sol:1.3,4" says.

    Args:
        tau: blocks whose proxy score is so many standard deviations above the mean are attended exactly.
        dense_steps: so many steps at the beginning are dense.
        tail: a mean key and value stand in for each other block.
    """

    tau: float
    dense_steps: int = 0
    tail: bool = True


def sol_of(method: str) -> Sol | None:
    """Return what the name of a Sol-Attn, "sol:TAU[,STEPS][,no-tail]", says; None for all others.

    Raises:
        ValueError: it says nothing that makes sense.
    """
    family, _, value = method.partition(":")
    if family != "sol":
        return None
    tau, *words = value.split(",")
    tail = "no-tail" not in words
    counts = [word for word in words if word != "no-tail"]
    if len(counts) > 1 or not all(count.isdigit() for count in counts):
        raise ValueError("a number of standard deviations, dense steps, and no-tail")
    return Sol(float(tau), int(counts[0]) if counts else 0, tail)


class SolAttention(StandIn):
    """Calls its kernel, with heads of fewer channels filled up.

    Args:
        wanted: how.
        models: see `StandIn`.
        steps: of the generation.
    """

    def __init__(self, wanted: Sol, models: Iterable[nn.Module], steps: int) -> None:
        super().__init__(models, steps)
        self.wanted = wanted
        self._kernel: Callable[..., Any] = importlib.import_module("comfy_kitchen").sol_attn

    def attend(
        self, step: int, call: int, qkv: Sequence[torch.Tensor], dense: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let it attend once the dense steps are done; what it skips counts less the means that stand in for it."""
        q, k, _ = qkv
        if step < self.wanted.dense_steps:
            return dense(), torch.zeros(len(q))
        wide = [F.pad(x, (0, _HEAD_DIM - x.shape[3])).transpose(1, 2).contiguous() for x in qkv]
        out = self._kernel(*wide, tau=self.wanted.tau, scale=q.shape[3] ** -0.5, tail=self.wanted.tail)
        skipped = 1 - routed(q, k, self.wanted.tau).float().mean((1, 2, 3)).cpu()
        return out[..., : q.shape[3]].transpose(1, 2), skipped * (1 - self.wanted.tail / BLOCK)


def routed(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    """Return which blocks are attended exactly, bool [B, H, blocks, blocks], by the rule of its reference.

    Args:
        q: (B, H, S, D), as is k.
        k: see above.
        tau: see `Sol`.
    """
    unit = q.shape[3] ** -0.5 * LOG2_E
    of_q, of_k = (part_means(x, BLOCK, 1) for x in (q, k))
    of_k = of_k - of_k.mean(2, keepdim=True)
    scores = of_q @ of_k.transpose(2, 3) * unit
    variance = of_q.square() @ of_k.square().mean(2).unsqueeze(-1) * unit**2
    block = torch.arange(of_q.shape[2], device=q.device)
    exact: torch.Tensor = (scores > tau * (variance + 1e-6).sqrt()) | ((block.view(-1, 1) - block).abs() <= 1)
    return exact
