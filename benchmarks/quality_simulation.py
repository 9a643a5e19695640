"""Attention that takes the place of a model's own for a generation; here what there is no kernel of, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lite_attention.ops import step_plan, tile_shape
from lite_attention.ops.tiles import ceil_div, diagonal_tile

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_SCORES = 2**27  # at a time, in float32

_ARGUMENTS = ("query", "key", "value", "attn_mask")

Tiles = tuple[int, int]  # queries and keys of a tile


@dataclass(frozen=True)
class Simulated:
    """What is simulated: steps and budgets of the residual, but for one thing.

    Args:
        keep: share of all tiles of a call, over the heads of a video, that sparse steps compute.
        full_every: every so many steps is full.
        decide_every: every so many full steps decides what is kept.
        parts: of a tile, whose mean keys and values stand in for it where it is skipped, in place of a residual, as
            the zeroth order of PISA (arXiv 2602.01077) has it. 0 = a residual with its forecast, and tiles chosen by
            their largest score instead of their mass.
    """

    keep: float
    full_every: int
    decide_every: int = 2
    parts: int = 0


@dataclass
class _Site:
    """What one call of a step remembers."""

    mask: torch.Tensor | None = None  # bool [B, H, q_tiles, k_tiles], True = kept
    waiting: torch.Tensor | None = None
    residuals: list[tuple[float, torch.Tensor]] = field(default_factory=list)  # time, [B, H, S, D]


class StandIn(TorchFunctionMode):
    """Takes the place of self-attention in one generation, and notes what a kernel would skip in `shares`.

    Within the models, unmasked attention of as many queries as keys is self-attention. Calls of a step are told by
    their order.

    Args:
        models: of which only calls within them are meant.
        steps: of the generation.
    """

    def __init__(self, models: Iterable[nn.Module], steps: int) -> None:
        super().__init__()
        self.models = list(models)
        self._step = self._calls = self._within = 0
        self._hooks: list[RemovableHandle] = []
        self._skipped: list[list[torch.Tensor]] = [[] for _ in range(steps)]

    def attend(
        self, step: int, call: int, qkv: Sequence[torch.Tensor], dense: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output of a call of a step, like q, and what it skips of each video, (B,).

        Args:
            step: of the generation.
            call: which one of the step.
            qkv: (B, H, S, D) each.
            dense: computes the attention that the model meant.
        """
        raise NotImplementedError

    @property
    def shares(self) -> torch.Tensor:
        """What was skipped, (B, 1, steps): the mean over the calls of each step, less what stands in for it."""
        return torch.stack([torch.stack(calls).mean(0).cpu() for calls in self._skipped], 1).unsqueeze(1)

    def after_step(self, step: int) -> None:
        """Go on to the next step."""
        self._step, self._calls = step + 1, 0

    def __enter__(self) -> Self:
        """Begin, and follow when the models run."""
        for model in self.models:
            self._hooks.append(model.register_forward_pre_hook(lambda *_: self._go(1)))
            self._hooks.append(model.register_forward_hook(lambda *_: self._go(-1), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """End, and take the hooks off."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        while self._hooks:
            self._hooks.pop().remove()

    def _go(self, way: int) -> None:
        self._within += way

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attend, where it is self-attention; let all else be."""
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not self._within:
            return function(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        q, k, v = (given[name] for name in _ARGUMENTS[:3])
        if given.get("attn_mask") is not None or q.shape[2] != k.shape[2]:
            return function(*args, **kwargs)
        call, self._calls = self._calls, self._calls + 1
        out, skipped = self.attend(self._step, call, (q, k, v), lambda: function(*args, **kwargs))
        self._skipped[self._step].append(skipped)
        return out


class Simulation(StandIn):
    """Steps and budgets of the residual, but for one thing.

    Args:
        wanted: what to do.
        models: see `StandIn`.
        steps: of the generation.
        tile: (tile_m, tile_n); None = as the kernel has them.
        times: of the flow, by step; None = the numbers of the steps.
    """

    def __init__(
        self, wanted: Simulated, models: Iterable[nn.Module], steps: int, tile: Tiles | None = None,
        times: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(models, steps)
        self.wanted, self.tile = wanted, tile
        self.times = [float(step) for step in range(steps)] if times is None else times
        self.plan = step_plan(steps, full_every=wanted.full_every, decide_every=wanted.decide_every)
        self._sites: dict[int, _Site] = {}

    def attend(
        self, step: int, call: int, qkv: Sequence[torch.Tensor], dense: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute all in a full step, what is kept and what stands for the rest in a sparse one."""
        (q, k, v), site = qkv, self._sites.setdefault(call, _Site())
        if not self.plan[step]:
            return self._sparse(site, q, k, v)
        out = dense()
        self._after_full_step(site, q, k, v, out)
        return out, torch.zeros(len(q))

    def _tile(self, q: torch.Tensor) -> Tiles:
        return self.tile or tile_shape(q.shape[3], q.dtype, q.device)

    def _after_full_step(
        self, site: _Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        tile, decides = self._tile(q), self.plan[self._step] == 2
        if self.wanted.parts:
            if decides:
                site.mask = largest(masses(q, k, tile), self.wanted.keep, tile, q.shape[2])
            return
        if site.waiting is not None:
            site.mask, site.waiting, site.residuals = site.waiting, None, []
        if site.mask is not None:
            residual = out.float() - attend(q, k, v, site.mask, tile)
            site.residuals = [*site.residuals[-1:], (self.times[self._step], residual)]
        if decides:
            site.waiting = largest(maxima(q, k, tile), self.wanted.keep, tile, q.shape[2])

    def _sparse(
        self, site: _Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert site.mask is not None  # the first step decides
        tile, parts = self._tile(q), self.wanted.parts
        out = attend(q, k, v, site.mask, tile, parts)
        if not parts:
            out += forecast(site.residuals, self.times[self._step])
        return out.to(q.dtype), 1 - site.mask.float().mean((1, 2, 3)) - parts / tile[1]


# ---- parts of it ---------------------------------------------------------------------------------------------------


def forecast(residuals: list[tuple[float, torch.Tensor]], now: float) -> torch.Tensor:
    """Return the residual at a time: the last one, gone on with as the last two say."""
    (time, residual), (before, earlier) = residuals[-1], residuals[0]
    return residual if time == before else residual + (now - time) / (time - before) * (residual - earlier)


def largest(of_tiles: torch.Tensor, keep: float, tile: Tiles, tokens: int) -> torch.Tensor:
    """Return bool like [B, H, q_tiles, k_tiles], True for the `keep` share of each video with the largest values.

    The tiles on the diagonal are among them.
    """
    q_tiles = of_tiles.shape[2]
    diagonal = [diagonal_tile(row, tokens, tokens, *tile) for row in range(q_tiles)]
    of_tiles[:, :, range(q_tiles), diagonal] = torch.inf
    flat = of_tiles.flatten(1)
    count = max(round(keep * flat.shape[1]), int(flat[0].isposinf().sum()))
    chosen = flat.topk(count, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True).view_as(of_tiles)


def _scores(q: torch.Tensor, k: torch.Tensor, tile_m: int) -> Iterator[tuple[tuple[int, int], slice, torch.Tensor]]:
    """Yield ((video, head), q-tiles, float32 scores [rows, keys]) of a few q-tiles at a time."""
    batch, heads, tokens, head_dim = q.shape
    q_tiles, at_a_time = ceil_div(tokens, tile_m), max(1, _MOST_SCORES // (tile_m * tokens))
    for b in range(batch):
        for h in range(heads):
            for first in range(0, q_tiles, at_a_time):
                rows = q[b, h, first * tile_m : (first + at_a_time) * tile_m].float()
                yield (b, h), slice(first, first + at_a_time), rows @ k[b, h].float().T * head_dim**-0.5


def _by_tiles(of_keys: torch.Tensor, tile: Tiles, filled: float) -> torch.Tensor:
    """Return [rows, keys] as [q_tiles, tile_m, k_tiles, tile_n]; rows and keys that there are not are filled."""
    rows, keys = of_keys.shape
    padded = F.pad(of_keys, (0, -keys % tile[1], 0, -rows % tile[0]), value=filled)
    return padded.view(-1, tile[0], padded.shape[1] // tile[1], tile[1])


def _of_tiles(q: torch.Tensor, tile: Tiles) -> torch.Tensor:
    sizes = ceil_div(q.shape[2], tile[0]), ceil_div(q.shape[2], tile[1])
    return torch.empty(*q.shape[:2], *sizes, dtype=torch.float32, device=q.device)


def masses(q: torch.Tensor, k: torch.Tensor, tile: Tiles) -> torch.Tensor:
    """Return the share that each tile has in its rows' softmax, the mean over rows: [B, H, q_tiles, k_tiles]."""
    found = _of_tiles(q, tile)
    for (b, h), tiles, scores in _scores(q, k, tile[0]):
        summed = _by_tiles(scores.softmax(-1), tile, 0).sum((1, 3))
        found[b, h, tiles] = summed / summed.sum(1, keepdim=True)
    return found


def maxima(q: torch.Tensor, k: torch.Tensor, tile: Tiles) -> torch.Tensor:
    """Return the largest score of each tile, against the largest of its row, [B, H, q_tiles, k_tiles]."""
    found = _of_tiles(q, tile)
    for (b, h), tiles, scores in _scores(q, k, tile[0]):
        found[b, h, tiles] = _by_tiles(scores - scores.amax(-1, keepdim=True), tile, -torch.inf).amax((1, 3))
    return found


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, tile: Tiles, parts: int = 0
) -> torch.Tensor:
    """Return attention over the kept tiles, float32 [B, H, S, D].

    Args:
        q: (B, H, S, D), as are k and v.
        k: see above.
        v: see above.
        mask: bool [B, H, q_tiles, k_tiles], True = kept.
        tile: (tile_m, tile_n).
        parts: of each skipped tile that its means stand in for, each counting as many keys as it has; 0 = nothing does.
    """
    (tile_m, tile_n), tokens = tile, q.shape[2]
    out = torch.empty_like(v, dtype=torch.float32)
    means = [part_means(x, tile_n, parts).to(x.dtype).float() for x in (k, v)] if parts else []
    for (b, h), tiles, scores in _scores(q, k, tile_m):
        kept = mask[b, h, tiles].repeat_interleave(tile_m, 0)[: len(scores)]
        scores.masked_fill_(~kept.repeat_interleave(tile_n, 1)[:, :tokens], -torch.inf)
        rows, values = slice(tiles.start * tile_m, tiles.start * tile_m + len(scores)), v[b, h].float()
        if parts:
            stand_in = q[b, h, rows].float() @ means[0][b, h].T * q.shape[3] ** -0.5
            stand_in += part_sizes(tokens, tile_n, parts).to(q.device).log()
            stand_in.masked_fill_(kept.repeat_interleave(parts, 1), -torch.inf)
            scores, values = torch.cat([scores, stand_in], 1), torch.cat([values, means[1][b, h]])
        out[b, h, rows] = scores.softmax(-1) @ values
    return out


def part_sizes(tokens: int, tile_n: int, parts: int) -> torch.Tensor:
    """Return how many tokens each part of each k-tile has, float32 [k_tiles * parts]."""
    return F.pad(torch.ones(tokens), (0, -tokens % tile_n)).view(-1, tile_n // parts).sum(1)


def part_means(x: torch.Tensor, tile_n: int, parts: int) -> torch.Tensor:
    """Return the mean of the tokens of each part, float32 [B, H, k_tiles * parts, D]."""
    tokens = x.shape[2]
    summed = F.pad(x.float(), (0, 0, 0, -tokens % tile_n)).unflatten(2, (-1, tile_n // parts)).sum(3)
    sizes = part_sizes(tokens, tile_n, parts).to(x.device).clamp(min=1)
    means: torch.Tensor = summed / sizes.unsqueeze(1)
    return means
