"""Which share of its tiles each site skips in each step of a generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.quality_metrics import Pair
from examples.moving_shapes.model import VideoDiT
from lite_attention.inspection import named_states
from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.plan import SPARSE
from lite_attention.ops.tiles import ceil_div, diagonal_tile


class DenseShares:
    """What dense attention skips, and what all others begin with: nothing.

    Args:
        batch: videos.
        steps: of the generation.
    """

    def __init__(self, batch: int, steps: int) -> None:
        self._found: list[dict[str, torch.Tensor]] = [{} for _ in range(steps)]  # by step and site, (batch,)
        self._none = torch.zeros(batch)

    @property
    def shares(self) -> torch.Tensor:
        """The share of its tiles that each site skips in each step, (batch, sites, steps); one site where none skips.

        All sites of the moving shapes cost the same when they skip nothing: whatever their head dims, their heads make
        up the same width.
        """
        sites = list(dict.fromkeys(site for step in self._found for site in step)) or [""]
        rows = [torch.stack([step.get(site, self._none) for step in self._found], -1) for site in sites]
        return torch.stack(rows, 1)

    def after_step(self, step: int) -> None:
        """Note what there is to see after a step."""


class SkipShares(DenseShares):
    """Notes what states of votes skip.

    Args:
        model_or_pipe: given to `enable`.
        batch: see `DenseShares`.
        steps: likewise.
    """

    def __init__(self, model_or_pipe: Any, batch: int, steps: int) -> None:
        super().__init__(batch, steps)
        self.model_or_pipe = model_or_pipe

    def after_step(self, step: int) -> None:
        """Note what the next step skips: a state tells only that."""
        for site, state in named_states(self.model_or_pipe).items():
            share = state.sparsity(per="batch")
            if step == 0 and state.initial_mask is not None:  # static, at threshold -inf: all steps skip the same
                self._found[0][site] = share
            if step + 1 < len(self._found):
                self._found[step + 1][site] = share


class ResidualShares(DenseShares):
    """Notes what the sparse steps of the residual skip.

    Args:
        model_or_pipe: given to `enable` with the residual as its method.
        batch: see `DenseShares`.
        steps: likewise.
    """

    def __init__(self, model_or_pipe: Any, batch: int, steps: int) -> None:
        super().__init__(batch, steps)
        self.model_or_pipe = model_or_pipe
        self._ready: set[str] = set()  # sites whose next step may be sparse

    def after_step(self, step: int) -> None:
        """Note what the step skipped: what is not in the mask, where it was sparse."""
        states: dict[str, Any] = dict(named_states(self.model_or_pipe))
        for site, state in states.items():
            sparse = site in self._ready and int(state.plan[step]) == SPARSE
            self._found[step][site] = state.sparsity(per="batch") if sparse else torch.zeros(state.capacity[0])
        self._ready = {site for site, state in states.items() if self._has_residuals(state)}

    @staticmethod
    def _has_residuals(state: ResidualState) -> bool:
        words = c.control_list(state.control)
        used = [slot for slot in range(state.slots) if words[c.slot_word(slot, c.BATCH)]]
        return all(words[c.slot_word(slot, c.RESIDUALS)] for slot in used)


class RandomSkips(SkipShares):
    """Puts random tiles into the skip states after each step, as many as another method skipped in the next one.

    Each head has as many, of all its q-tiles together. The model's threshold is -inf, so it votes nothing out itself.

    Args:
        model: given to `enable`.
        wanted: shares to skip, (B, sites, steps).
        pairs: prompt and seed of each video, which decide its tiles.
    """

    def __init__(self, model: VideoDiT, wanted: torch.Tensor, pairs: Sequence[Pair]) -> None:
        super().__init__(model, len(wanted), wanted.shape[2])
        self.model = model
        self.wanted, self.pairs = wanted, pairs
        self._ranks: list[torch.Tensor] = []

    def after_step(self, step: int) -> None:
        """Plant, then note."""
        if step + 1 < self.wanted.shape[2]:
            states: list[Any] = list(named_states(self.model).values())
            if not self._ranks:
                self._ranks = [self._order(site, state) for site, state in enumerate(states)]
            for site, state in enumerate(states):
                ranks = self._ranks[site]
                count = (self.wanted[:, site, step + 1] * ranks[0, 0, 0].numel()).round().to(ranks.device)
                state.skip_mask.copy_(pack_bits(ranks < count.view(1, -1, 1, 1, 1)))
        super().after_step(step)

    def _order(self, site: int, state: SkipState) -> torch.Tensor:
        """Return the places of tiles in a random order, (slots, B, heads, q_tiles, k_tiles); the diagonal is last."""
        _, heads, seq_q, seq_k = state.capacity
        q_tiles, k_tiles = ceil_div(seq_q, state.tile_m), ceil_div(seq_k, state.tile_n)
        drawn = []
        for prompt, seed in self.pairs:
            generator = torch.Generator().manual_seed((1_000_003 * prompt + seed) * 1_009 + site)
            drawn.append(torch.rand(state.slots, heads, q_tiles, k_tiles, generator=generator))
        places = torch.stack(drawn, 1).to(state.skip_mask.device)
        for row in range(q_tiles):
            places[:, :, :, row, diagonal_tile(row, seq_q, seq_k, state.tile_m, state.tile_n)] = math.inf
        return places.flatten(3).argsort(-1).argsort(-1).view_as(places)
