"""Calls of attention layers of a served model, and what they give by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lite_attention.ops import SkipState, skip_attention, tile_shape

__all__ = ["HEADS", "HEAD_DIM", "TOKENS", "ByHand", "inputs"]

HEADS, HEAD_DIM, TOKENS = 2, 32, 320


def inputs(layer: int, branch: str, step: int, tokens: int = TOKENS, request: int = 0) -> tuple[torch.Tensor, ...]:
    """Return q, k and v (1, tokens, heads, head_dim) for one call.

    Each run of 64 tokens attends to itself and to another one, which layer, branch and request choose.
    """
    seed = 1000 * request + 10 * layer + ("cond", "uncond").index(branch)
    base = torch.Generator().manual_seed(seed)
    runs = torch.arange(tokens) // 64
    directions = torch.randn(int(runs.max()) + 1, HEADS, HEAD_DIM, generator=base)
    others = directions[torch.randperm(len(directions), generator=base)]
    noise = torch.Generator().manual_seed(seed + 100_000 * (step + 1))
    q, k, v = (torch.randn(tokens, HEADS, HEAD_DIM, generator=noise) for _ in range(3))
    q, k = q / 4 + directions[runs] + others[runs], k / 4 + directions[runs]
    return q[None], k[None], v[None]


class ByHand:
    """Attention of the same calls with states that the test makes: one for each key.

    Args:
        threshold: of all.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold, self.states = threshold, dict[object, SkipState]()

    def __call__(
        self,
        key: object,
        qkv: Sequence[torch.Tensor],
        *,
        return_lse: bool = False,
        must_do: Sequence[int] | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = qkv
        if key not in self.states:
            tile_m, tile_n = tile_shape(HEAD_DIM, q.dtype, q.device)
            self.states[key] = SkipState(
                batch=q.shape[0], heads=HEADS, seq_q=q.shape[1], seq_k=k.shape[1], tile_m=tile_m, tile_n=tile_n,
                slots=1, threshold=self.threshold,
            )  # fmt: skip
        out: torch.Tensor = skip_attention(
            q, k, v, self.states[key], return_lse=return_lse, must_do=must_do, key_mask=key_mask
        )
        return out

    @property
    def skipped(self) -> float:
        """The least that a state skips."""
        return min(float(state.sparsity()) for state in self.states.values())
