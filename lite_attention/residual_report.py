"""What the residual of a model does: steps by kind, what they compute, the memory it takes, and who tells the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lite_attention.model_sites import ModelSite
from lite_attention.ops import ResidualState, default_session
from lite_attention.ops import control as c
from lite_attention.ops.buffers import readable
from lite_attention.ops.plan import DECIDING, FULL, SPARSE
from lite_attention.ops.site_state import SiteState
from lite_attention.presets import computed_share

__all__ = ["ResidualReport", "residual_report", "skipped_by_next"]


@dataclass
class ResidualReport:
    """The residual of the sites of a model in one generation."""

    plan: list[int]  # the kind of each step
    kept: float  # share of the tiles that sparse steps compute, over all sites
    tiles: int  # of these sites, over the batch
    nbytes: int  # of all states
    time_sources: list[str]  # who tells the flow's time: branch, cache_context, scheduler, timestep, or else the step

    @property
    def computed(self) -> float:
        """Share of all tiles that the generation computes."""
        return computed_share(self.plan, self.kept) if self.plan else 1.0

    def __str__(self) -> str:
        """Return it as a line."""
        steps = Counter(self.plan)
        kinds = f"{steps[DECIDING]} deciding, {steps[FULL]} full, {steps[SPARSE]} sparse"
        return (
            f"residual: {len(self.plan)} steps, {kinds}, which compute {self.kept:.1%} of the tiles, all steps "
            f"{self.computed:.1%}; states take {readable(self.nbytes)}; "
            f"time of the flow by {', '.join(self.time_sources) or 'nobody yet'}"
        )


def residual_report(sites: Sequence[ModelSite]) -> ResidualReport | None:
    """Return what the residual of some sites does, None where none has been called. Waits for the device."""
    last = [(site, state) for site in sites for state in site.latest if isinstance(state, ResidualState)]
    if not last:
        return None
    sessions = [default_session if site.store is None else site.store.session for site, _ in last]
    begun = max(session.steps for session in sessions)
    steps = last[0][0].num_steps or max(begun, *(state.step(slot) for _, state in last for slot in range(state.slots)))
    plan: list[int] = last[0][1].plan.tolist()
    tiles = [_tiles(state) for _, state in last]
    kept = sum(_kept(state) * count for (_, state), count in zip(last, tiles, strict=True)) / sum(tiles)
    return ResidualReport(
        plan=(plan + plan[-1:] * steps)[:steps],
        kept=kept,
        tiles=sum(tiles),
        nbytes=sum(state.nbytes for site in sites for state in site.states if isinstance(state, ResidualState)),
        time_sources=sorted({source for session in sessions for source in session.time_sources.values()}),
    )


def skipped_by_next(state: SiteState) -> float:
    """Return the share of tiles that the next call skips, over the branches that ran. Waits for the device."""
    if not isinstance(state, ResidualState):
        return float(state.sparsity())
    words, plan, shares = c.control_list(state.control), state.plan.tolist(), state.sparsity(per="slot").tolist()
    ran = [slot for slot in range(state.slots) if words[c.slot_word(slot, c.BATCH)]]
    skipped = [shares[slot] for slot in ran if _is_sparse(words, plan, slot)]
    return float(sum(skipped) / max(len(ran), 1))


def _is_sparse(words: list[int], plan: list[int], slot: int) -> bool:
    step = words[c.slot_word(slot, c.STEP)]
    return plan[min(step, len(plan) - 1)] == SPARSE and words[c.slot_word(slot, c.RESIDUALS)] > 0


def _tiles(state: ResidualState) -> int:
    batch, heads, *_ = state.capacity
    q_tiles, k_tiles = state.tiles
    return batch * heads * q_tiles * k_tiles


def _kept(state: ResidualState) -> float:
    """Return the share of tiles in the mask in use; before there is one, what is to be kept."""
    words = c.control_list(state.control)
    has_mask = any(words[c.slot_word(slot, c.TAKEN)] for slot in range(state.slots))
    return 1 - float(state.sparsity()) if has_mask else float(state.keep.mean())
