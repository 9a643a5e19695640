"""A table of the attention of a model: what is swapped, what is not and why, and how much is skipped."""

from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lite_attention.model_sites import sites_of
from lite_attention.ops.site_state import SiteState
from lite_attention.report_rows import Report, ReportRow, row_of
from lite_attention.residual_report import residual_report, skipped_by_next

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Report", "ReportRow", "SparsityLog", "named_states", "report"]


class SparsityLog:
    """How much each site skips over the steps of a generation: `record()` after every step, or, for a pipeline,

        log = lite_attention.SparsityLog(pipe)
        pipe(prompt, callback_on_step_end=log.on_step_end)

    Args:
        model_or_pipe: as for `report`.
    """

    def __init__(self, model_or_pipe: Any) -> None:
        self.model_or_pipe = model_or_pipe
        self.steps: list[dict[str, float]] = []  # by step: share of tiles that the next step skips, 0 to 1, by site

    def record(self) -> None:
        """Note the sparsity of all sites, over heads and branches. Reading it waits for the device."""
        shares = {
            site.name: [skipped_by_next(state) for state in site.latest]  # of as many tiles each
            for site in sites_of(self.model_or_pipe)
            if site.swapped and site.latest
        }
        self.steps.append({name: sum(of_site) / len(of_site) for name, of_site in shares.items()})

    def on_step_end(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Record; what diffusers' pipelines call after each step as `callback_on_step_end`."""
        self.record()
        return callback_kwargs

    @property
    def sites(self) -> list[str]:
        """Names of the sites met so far."""
        return list(dict.fromkeys(name for step in self.steps for name in step))

    def table(self) -> torch.Tensor:
        """Return the shares, float32 (sites, steps), NaN where a site had not been called yet."""
        rows = [[step.get(site, math.nan) for step in self.steps] for site in self.sites]
        return torch.tensor(rows).view(len(rows), len(self.steps))


def named_states(model_or_pipe: Any) -> dict[str, SiteState]:
    """Return the states of the latest calls of all skip-aware sites, those that have one, by the sites' names.

    Calls of one module have one name; the last of them stands for all.
    """
    sites = [site for site in sites_of(model_or_pipe) if site.swapped]
    return {site.name: state for site in sites for state in [site.last] if state is not None}


def report(model_or_pipe: Any, *, process_group: ProcessGroup | None = None, file: TextIO | None = None) -> Report:
    """Print and return a table of the attention sites that a model has shown so far, after its first call.

    A row says whether the site is skip-aware, or why it is left alone, and the share of tiles that the next call skips,
    by slot. "But it did not run in the last forward", or "but dense in its last call", says what the last forward of an
    enabled model did otherwise; shares are then left out. Warns when nothing was swapped. Reading the shares waits for
    the device. With method "residual" the share is that which sparse steps skip, and a last line says how many steps
    are of which kind, what they compute, what memory it takes, and who told the flow's time.

    Where several processes share the model, shapes are those of the whole, and a row says which heads and queries its
    shares are of, those here; no process waits for another. With `process_group` shares are of the whole model, memory
    is summed, and all processes get the same.

    Args:
        model_or_pipe: a model or pipeline, compiled with our backend, given to `enable`, or holding `LiteAttention`.
        process_group: gather over these processes, all of which call this; the first of them prints.
        file: where to print; None = standard output.

    Raises:
        ValueError: it is neither a model nor a pipeline with a transformer, or the group is none.
        RuntimeError: with a group: another process failed, or did not call this within the timeout of the group.
    """
    is_first = True
    if process_group is None:
        result = _report_of_here(model_or_pipe)
    else:
        from lite_attention.report_gather import gathered_report  # most run in one process

        result, is_first = gathered_report(lambda: _report_of_here(model_or_pipe), process_group)
    if is_first:
        print(result, file=sys.stdout if file is None else file)
    if not result.swapped:
        why = "; ".join(sorted({str(row.reason) for row in result.rows})) or (
            "no scaled_dot_product_attention was seen: has the model run, through our backend, "
            "with diffusers' native attention backend?"
        )
        warnings.warn(f"lite_attention: no attention of this model is skip-aware ({why})", stacklevel=2)
    return result


def _report_of_here(model_or_pipe: Any) -> Report:
    sites = sites_of(model_or_pipe)
    return Report([row_of(site) for site in sites], residual_report([site for site in sites if site.swapped]))
