"""A small transformer whose attention really skips, and a reference with one explicit state per layer and branch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lite_attention.compile import LiteAttentionBackend
from lite_attention.ops import ResidualState, Session, SkipState, step_plan
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site_state import SiteState

TILE = (16, 16)
THRESHOLD = -4.0
KEEP = 0.4
# What the swap is asked for, by method.
OPTIONS: dict[str, dict[str, Any]] = {
    "votes": {"threshold": THRESHOLD},
    "residual": {"method": "residual", "keep": KEEP},
}
ENOUGH = {"votes": 3, "residual": 8}  # steps after which the methods have done all that they do

Attend = Callable[..., torch.Tensor]


class Attention(nn.Module):
    """Attention with projections; further arguments go to `attend`, which may be replaced."""

    def __init__(
        self, dim: int = 32, heads: int = 2, norm_q: nn.Module | None = None, kv_heads: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        kv_dim = dim // heads * self.kv_heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, d) for d in (dim, kv_dim, kv_dim, dim))
        for linear in (self.to_q, self.to_k):
            linear.weight.data.mul_(3.0)  # peaked scores, so that tiles are skipped
        self.norm_q = norm_q
        self.attend: Attend = F.scaled_dot_product_attention
        self.requires_grad_(False)

    def project(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        context = x if context is None else context
        q = self.to_q(x) if self.norm_q is None else self.norm_q(self.to_q(x))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for t in (self.to_k(context), self.to_v(context)))
        return q, k, v

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        return self.to_out(self.attend(*self.project(x, context), **arguments).transpose(1, 2).flatten(2))


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
    """A model with explicit states: one per attention other than `attn2`, branch and size; `reset` drops them."""

    def __init__(
        self,
        model: nn.Module,
        threshold: float | torch.Tensor = THRESHOLD,
        quantization: str = "none",
        method: str = "votes",
    ) -> None:
        self.model = copy.deepcopy(model)
        self.threshold = threshold
        self.quantization = quantization
        self.method = method
        self.states: dict[tuple[str, str, int, int], SiteState] = {}  # path, branch, batch, seq
        self.branch = ""
        for path, module in self.model.named_modules():
            if isinstance(module, Attention) and not path.endswith("attn2"):
                module.attend = self._attend(path)

    def _attend(self, path: str) -> Attend:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            key = (path, self.branch, q.shape[0], q.shape[1])
            if key not in self.states:
                self.states[key] = self._new_state(q, k, v)
            key_mask = None if attn_mask is None else attn_mask[:, 0, 0]
            attention = METHODS[self.method].attend
            return attention(q, k, v, self.states[key], key_mask=key_mask, quantization=self.quantization).transpose(
                1, 2
            )

        return attend

    def _new_state(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> SiteState:
        sizes: dict[str, Any] = {
            "batch": q.shape[0], "heads": q.shape[2], "seq_q": q.shape[1], "seq_k": k.shape[1], "tile_m": TILE[0],
            "tile_n": TILE[1], "slots": 1,
        }  # fmt: skip
        if self.method == "votes":
            return SkipState(**sizes, threshold=self.threshold)
        return ResidualState(**sizes, value_dim=v.shape[3], plan=step_plan(100), keep=KEEP, residual_dtype="bf16")

    @torch.no_grad()
    def __call__(self, *args: torch.Tensor, branch: str = "", **kwargs: torch.Tensor) -> torch.Tensor:
        self.branch = branch
        return self.model(*args, **kwargs)

    def reset(self) -> None:
        self.states.clear()

    @property
    def skipped(self) -> int:
        return sum(int((~state.kept_tiles()).sum()) for state in self.states.values())


class Inner:
    """What compiles the changed graphs in tests: keeps them, and runs them as they are or through a dynamo backend."""

    def __init__(self, backend: str = "eager") -> None:
        self.graphs: list[fx.GraphModule] = []
        self._backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return self._backend(gm, example_inputs)

    def calls(self, target: Any = torch.ops.lite_attention.skip_attention.default) -> list[fx.Node]:
        """Return the calls of our op in all graphs."""
        return [node for gm in self.graphs for node in gm.graph.find_nodes(op="call_function", target=target)]


def toy_backend(inner: str | Inner = "aot_eager", **options: Any) -> LiteAttentionBackend:
    """Return a backend with the toy's threshold, or share to keep, and tiles, and a session of its own."""
    of_method = OPTIONS[options.get("method", "votes")]
    return LiteAttentionBackend(
        inner=inner, **{"session": Session(), "tile_shape": TILE, "num_steps": 100, **of_method, **options}
    )


def compile_toy(model: nn.Module, backend: LiteAttentionBackend, how: str = "whole", **options: Any) -> nn.Module:
    """Compile a model in place, as a "whole" or its "blocks"."""
    for module in model.blocks if how == "blocks" else [model]:
        module.compile(backend=backend, **options)
    return model


def assert_same_states(backend: LiteAttentionBackend, model: nn.Module, reference: Reference) -> None:
    """Hold what each layer, branch and size of a compiled model remembers against the reference."""
    records = {record.name(model): record for record in backend.store.records if record.site.swapped}
    slots = backend.store.session.branches
    assert records.keys() == {path for path, *_ in reference.states}
    for path, record in records.items():
        sizes = {sizes[:2] for sizes, *_ in record.states}
        assert sizes == {(batch, seq) for at, _, batch, seq in reference.states if at == path}
    for (path, branch, batch, seq), expected in reference.states.items():
        (state,) = (s for (sizes, *_), s in records[path].states.items() if sizes[:2] == (batch, seq))
        slot = slots.get(branch, 0)
        assert torch.equal(state.kept_tiles()[slot], expected.kept_tiles()[0]), (path, branch)
        if isinstance(state, ResidualState) and isinstance(expected, ResidualState):
            assert torch.equal(state.control[8 + 8 * slot :][:8], expected.control[8:16]), (path, branch)
            torch.testing.assert_close(state.residual[slot], expected.residual[0], rtol=2e-2, atol=1e-3)
