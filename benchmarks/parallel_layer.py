"""The calls that `benchmarks.parallel` times and compares: one layer, on one GPU and on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.attention import runs_of_tiles
from lite_attention import LiteAttention, SkipState, skip_attention
from lite_attention.cli.planted import planted
from lite_attention.cli.timing import Call
from lite_attention.ops.tiles import ceil_div, tile_shape
from lite_attention.parallel import ulysses_attention
from lite_attention.parallel.exchange import begin_gather, begin_scatter, end_gather, end_scatter, spread
from lite_attention.parallel.group import ALONE, Group

Captured = Callable[[], tuple[float, Call]]  # makes it; returns the largest difference to eager, and a call


class Layer:
    """q, k and v of all tokens, alike on all ranks, and the part of this rank."""

    def __init__(self, tokens: int, heads: int, head_dim: int, device: torch.device) -> None:
        self.tokens, self.heads, self.head_dim, self.device = tokens, heads, head_dim, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.group = Group.of(dist.group.WORLD)
        self.noise = torch.Generator(device).manual_seed(0)
        self.whole = [self._normal() for _ in range(3)]
        self.local = [self._part(x) for x in self.whole]
        remote = (self.group.ranks - 1) / self.group.ranks
        self.sent_of_a_tensor = self.local[0].numel() * self.local[0].element_size() * remote  # bytes, by a rank

    def _normal(self) -> torch.Tensor:
        shape = (1, self.tokens, self.heads, self.head_dim)
        return torch.randn(shape, generator=self.noise, device=self.device).to(self.dtype)

    def _part(self, x: torch.Tensor) -> torch.Tensor:
        return x.tensor_split(self.group.ranks, 1)[self.group.rank].contiguous()

    def mask(self, share: torch.Tensor, quantization: str = "none") -> torch.Tensor:
        """Return bool (heads, q_tiles, k_tiles), True = skipped, alike on all ranks; share is (heads, 1)."""
        tile_m, tile_n = tile_shape(self.head_dim, self.dtype, self.device, quantization)
        torch.manual_seed(0)
        return runs_of_tiles(share, ceil_div(self.tokens, tile_m), ceil_div(self.tokens, tile_n))

    def _planted(self, mask: torch.Tensor, quantization: str) -> SkipState:
        """Return a state in use of as many heads as the mask."""
        q = self.whole[0][:, :, : len(mask)]
        return planted(q, q, q, lambda *_: mask, quantization=quantization)

    def _own(self, mask: torch.Tensor, parts: int = 1) -> list[torch.Tensor]:
        """Return what this rank has of something by head, in parts."""
        return [*mask.tensor_split(self.group.ranks)[self.group.rank].tensor_split(parts)]

    # ---- what is timed -----------------------------------------------------------------------------------------------

    def on_one(self, mask: torch.Tensor, quantization: str = "none") -> Call:
        """Return attention with all heads on one GPU."""
        state = self._planted(mask, quantization)
        q, k, v = self.whole
        return lambda: skip_attention(q, k, v, state, quantization=quantization)

    def alone(self, mask: torch.Tensor, quantization: str = "none") -> Call:
        """Return attention with the heads of a rank, and no exchange."""
        (own,) = self._own(mask)
        q, k, v = (x[:, :, : len(own)].contiguous() for x in self.whole)
        state = self._planted(own, quantization)
        return lambda: skip_attention(q, k, v, state, quantization=quantization)

    def on_all(
        self, mask: torch.Tensor, quantization: str = "none", order: torch.Tensor | None = None, parts: int = 1
    ) -> Call:
        """Return Ulysses."""
        dealt = mask if order is None else mask[order]
        states = [self._planted(own, quantization) for own in self._own(dealt, parts)]
        on_device = None if order is None else order.to(self.device)
        q, k, v = self.local
        return lambda: ulysses_attention(
            q, k, v, states, self.group, seq_len=self.tokens, order=on_device, quantization=quantization
        )

    def exchanges(self) -> Iterator[tuple[str, Call, int]]:
        """Yield a name, a call, and how many tensors of the size of q it sends."""
        q, k, v = self.local
        tokens = spread(self.group, ALONE, self.tokens)
        shape = (self.heads // self.group.ranks, self.head_dim)

        def scatter() -> list[torch.Tensor]:
            return end_scatter(begin_scatter(q, k, v, tokens), [shape] * 3)

        out = scatter()[0].transpose(0, 1).contiguous().transpose(0, 1)  # as attention leaves it
        yield "q, k, v packed and sent", scatter, 3
        yield "output sent and unpacked", lambda: end_gather([begin_gather(out, tokens)], tokens), 1
        if self.tokens % self.group.ranks == 0:
            sent = q.unflatten(2, (self.group.ranks, -1)).permute(2, 1, 0, 3, 4).contiguous()
            received = torch.empty_like(sent)
            yield "one tensor sent, no copies", lambda: dist.all_to_all_single(received, sent), 1
            yield (
                "all four with a copy before and after each",
                lambda: [self._with_copies(x) for x in (q, k, v, out)],
                4,
            )

    def _with_copies(self, x: torch.Tensor) -> torch.Tensor:
        """As it is done where tensors are sent one by one; the output is as large as q, so it may stand for it."""
        sent = x.reshape(1, -1, self.group.ranks, self.heads // self.group.ranks, self.head_dim)[:, : self.tokens]
        packed = sent.flatten(1, 2).unflatten(1, (self.group.ranks, -1)).transpose(0, 1).contiguous()
        received = torch.empty_like(packed)
        dist.all_to_all_single(received, packed)
        return received.transpose(0, 1).flatten(1, 2).contiguous()

    # ---- what is compared --------------------------------------------------------------------------------------------

    def _clustered(self, step: int) -> list[torch.Tensor]:
        """q, k and v of all tokens; heads from hardly to strongly clustered, which vote out little and much."""
        noise = torch.Generator(self.device).manual_seed(5)
        shape = (self.tokens, self.heads, self.head_dim)
        centers = torch.randn(32, *shape[1:], generator=noise, device=self.device)
        pull = torch.linspace(0.3, 0.9, self.heads, device=self.device).view(1, -1, 1)
        middle = pull * centers[torch.arange(self.tokens, device=self.device) * 32 // self.tokens]
        noise.manual_seed(100 + step)
        q, k = (
            (middle + 0.5 * torch.randn(shape, generator=noise, device=self.device)).to(self.dtype)[None]
            for _ in range(2)
        )
        return [q, k, self.whole[2]]

    def compared(self) -> dict[str, float]:
        """Return how far a module with a process group is off one without, over generations that deal heads."""
        options: dict[str, Any] = {"threshold": -4.0, "slots": 1, "num_steps": 4}
        single, ours = LiteAttention(**options), LiteAttention(**options, process_group=dist.group.WORLD)
        worst = words = 0.0
        for step in range(12):
            x = self._clustered(step % 4)
            expected = self._part(single(*x))
            worst = max(worst, float((ours(*map(self._part, x), seq_len=self.tokens) - expected).abs().max()))
            assert single.state is not None
            assert ours.state is not None
            assert ours.exchange is not None
            own = ours.exchange.own_heads
            words += float((ours.state.skip_mask != single.state.skip_mask[:, :, own]).sum())
        moved = float(
            (own != torch.arange(self.heads, device=self.device).tensor_split(self.group.ranks)[self.group.rank]).sum()
        )
        skipped = float(single.sparsity())
        return {"skipped": skipped, "largest_difference": worst, "words_that_differ": words, "heads_that_moved": moved}

    def captured(self) -> Iterator[tuple[str, Captured | None]]:
        """Yield a name, and what makes it; None where there is no such thing."""
        yield "compiled whole, 0% skipped", self._compiled
        yield "CUDA graph, 0% skipped", self._graphed if self.device.type == "cuda" else None

    def _modules(self) -> tuple[LiteAttention, LiteAttention]:
        first, second = (
            LiteAttention(threshold=-4.0, slots=1, num_steps=6, process_group=dist.group.WORLD) for _ in range(2)
        )
        for module in (first, second):
            module.allocate(1, self.tokens, self.heads, self.head_dim, dtype=self.dtype, device=self.device)
        return first, second

    def _compiled(self) -> tuple[float, Call]:
        eager, module = self._modules()
        run = torch.compile(module, fullgraph=True)
        local = [self._part(x) for x in self._clustered(0)]

        def call() -> Any:
            return run(*local, seq_len=self.tokens)

        differ = [float((eager(*local, seq_len=self.tokens) - call()).abs().max()) for _ in range(3)]
        return max(differ), call

    def _graphed(self) -> tuple[float, Call]:
        eager, module = self._modules()
        local = [self._part(x) for x in self._clustered(0)]
        expected = [eager(*local, seq_len=self.tokens).clone() for _ in range(3)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(*local, seq_len=self.tokens)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = module(*local, seq_len=self.tokens)
        module.reset_skip_state()
        differ = []
        for of_eager in expected:
            graph.replay()
            differ.append(float((out - of_eager).abs().max()))
        return max(differ), graph.replay
