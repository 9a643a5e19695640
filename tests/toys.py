"""A small transformer whose attention really skips, and a reference with one explicit state per layer and branch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention.ops import SkipState

TILE = (16, 16)
THRESHOLD = -4.0

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, norm_q: nn.Module | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = norm_q
        self.attend: Attend = F.scaled_dot_product_attention

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q = self.to_q(x) if self.norm_q is None else self.norm_q(self.to_q(x))
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, self.to_k(context), self.to_v(context))
        )
        return self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, norm_q: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, norm_q)
        self.attn2 = Attention(dim, heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm(x))
        x = x + self.attn2(x, context)
        return x + 0.1 * self.out(x)


class Toy(nn.Module):
    """`layers` blocks of self-attention, cross-attention and a linear layer."""

    def __init__(
        self, layers: int = 4, dim: int = 32, heads: int = 2, *, share_norm: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norm_q = nn.LayerNorm(dim) if share_norm else None
        self.blocks = nn.ModuleList(Block(dim, heads, norm_q) for _ in range(layers))
        for block in self.blocks:
            for linear in (block.attn1.to_q, block.attn1.to_k):
                linear.weight.data.mul_(3.0)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, context)
        return x


def tokens(step: int, batch: int = 1, seq: int = 96, dim: int = 32, seed: int = 0) -> torch.Tensor:
    """Clustered tokens (batch, seq, dim) that drift a little with the step, as latents do."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randn(6, dim, generator=generator).repeat_interleave((seq + 5) // 6, 0)[:seq]
    noise = torch.randn(batch, seq, dim, generator=generator)
    drift = torch.randn(batch, seq, dim, generator=generator)
    return 2 * clusters + 0.3 * noise + 0.05 * step * drift


def context(batch: int = 1, seq: int = 24, dim: int = 32) -> torch.Tensor:
    return torch.randn(batch, seq, dim, generator=torch.Generator().manual_seed(7))


class Reference:
    """The toy with explicit states: one per layer, branch and size; `reset` drops them."""

    def __init__(self, model: Toy, threshold: float = THRESHOLD) -> None:
        self.model = copy.deepcopy(model)
        self.threshold = threshold
        self.states: dict[tuple[object, ...], SkipState] = {}
        self.branch = ""
        for layer, block in enumerate(self.model.blocks):
            block.attn1.attend = self._attend(layer)

    def _attend(self, layer: int) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            key = (layer, self.branch, q.shape[0], q.shape[1])
            if key not in self.states:
                self.states[key] = SkipState(
                    batch=q.shape[0], heads=q.shape[2], seq_q=q.shape[1], seq_k=k.shape[1], tile_m=TILE[0],
                    tile_n=TILE[1], slots=1, threshold=self.threshold,
                )  # fmt: skip
            return lite_attention.skip_attention(q, k, v, self.states[key]).transpose(1, 2)

        return attend

    @torch.no_grad()
    def __call__(self, *args: torch.Tensor, branch: str = "") -> torch.Tensor:
        self.branch = branch
        return self.model(*args)

    def reset(self) -> None:
        self.states.clear()

    @property
    def skipped(self) -> int:
        return sum(int((~state.kept_tiles()).sum()) for state in self.states.values())
