"""Finding thresholds: how bold each site, branch, step and head may be, from what leaving tiles out really costs.

Calibrating runs generations in which every attention call returns its dense output, and measures at each call what
error it would have at each candidate threshold of the step before: votes take effect one step later, on other queries
and keys than they were cast on. Verifying runs the generations again with the thresholds found, on the sparse
trajectory.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lite_attention.calibration.error_report import Curve, ErrorReport, ErrorRow
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, Output, Place
from lite_attention.calibration.tile_statistics import METRICS, error_of, error_parts, loss_of, measure_tiles
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.tiles import ceil_div

__all__ = ["QUERIES", "THRESHOLDS", "Calibration", "Choose", "Recorder", "Verification", "now"]

# Candidates, log2 units: finer where the error moves fast.
THRESHOLDS = (
    *(-20.0, -17.0, -15.0, -13.0, -12.0, -11.0, -10.0, -9.0, -8.0, -7.25, -6.5, -6.0),
    *(-5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0),
)

Choose = Callable[[Place, Curve], torch.Tensor]  # returns the choice of each head, [heads]
QUERIES = 2000  # of a head, at least, whose rows of tiles are measured at a call, unless a stride is given
APART = 4  # errors are of at least a so many-th of these
HEADROOM = 0.9  # of the bound: the rest is for what changes while tiles stay out

_State = tuple[str, int, int]  # site, number of the state among those of that name, slot


def now() -> float:
    """Return the time in seconds, when the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Measurement(AttentionProbe):
    """Curves of the calls of a model, and their report."""

    def __init__(
        self, model_or_pipe: Any, metric: str, bound: float | None, num_steps: int | None, settings: dict[str, Any]
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
        self.metric, self.bound, self.num_steps = metric, bound, num_steps
        self.curves: dict[Place, Curve] = {}
        super().__init__(model_or_pipe, num_steps, **settings)

    def _check(self, call: CaughtCall) -> None:
        """Raise ValueError where the step of a call is past the last."""
        if self.num_steps is not None and call.control.step >= self.num_steps:
            raise ValueError(
                f"num_steps: expected at least the steps of a generation, got {self.num_steps}, and this call is "
                f"{call.where}: begin each generation with lite_attention.reset(model), or give the states num_steps"
            )

    def _check_finite(self, call: CaughtCall, dense: torch.Tensor) -> None:
        """Raise FloatingPointError where a dense output [B, Sq, Hq, Dv] is not finite. Waits for the device."""
        # A sum is one launch, and keeps what is not finite; it may overflow where no value does.
        if not (math.isfinite(dense.sum(dtype=torch.float32)) or bool(dense.isfinite().all())):
            raise FloatingPointError(f"{call.where}: attention gives NaN or infinity")

    def _merged(self, call: CaughtCall, curve: Curve) -> Curve:
        """Return the curve of a call joined with those of earlier prompts."""
        known = self.curves.get(call.place)
        if known is None:
            return curve
        if known.errors.shape != curve.errors.shape:
            heads = known.errors.shape[1], curve.errors.shape[1]
            raise ValueError(f"{call.where}: expected {heads[0]} heads, as in an earlier call, got {heads[1]}")
        return known.merged(curve, worst=self.bound is not None)

    @property
    def report(self) -> ErrorReport:
        """What was measured so far."""
        rows = []
        for place, curve in self.curves.items():
            choice = self._choice(place, curve).unsqueeze(0)
            error, left_out = (of_choices.gather(0, choice)[0] for of_choices in (curve.errors, curve.left_out))
            rows.append(ErrorRow(*place, error, left_out / curve.tiles, curve.tiles))
        return ErrorReport(rows, self.metric, self.bound)

    def _choice(self, place: Place, curve: Curve) -> torch.Tensor:
        """Return the choice of each head, [heads]."""
        return torch.zeros(curve.errors.shape[1], dtype=torch.int64)


class Recorder(_Measurement):
    """Records curves on the dense trajectory, and lets `choose` decide what each step votes out.

    Args:
        model_or_pipe: as for `Calibration`, as are those not named here.
        choose: what each head leaves out at a place.
        rule: what tells this `choose` from others, in a saved file.
        bound: with one, the worst of several generations counts; without, their mean.
        lasting: the curves are of one threshold at all steps so far, whatever `choose` leaves out: a tile belongs to
            the least that has dropped it since the fresh step.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        choose: Choose,
        rule: str,
        bound: float | None = None,
        *,
        lasting: bool = False,
        metric: str = "L1",
        num_steps: int | None = None,
        thresholds: Sequence[float] = THRESHOLDS,
        stride: int | None = None,
        queries: int = QUERIES,
        autosave: str | Path | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        candidates = torch.tensor(thresholds, dtype=torch.float64)
        if not 1 <= len(candidates) <= 250 or not bool((candidates.diff() > 0).all()) or not candidates[-1] <= 0:
            raise ValueError(f"thresholds: expected 1 to 250 ascending numbers of at most 0, got {list(thresholds)}")
        if stride is not None and stride < 1:
            raise ValueError(f"stride: expected at least 1, got {stride}")
        if queries < 1:
            raise ValueError(f"queries: expected at least 1, got {queries}")
        self.thresholds, self.stride, self.queries = tuple(map(float, thresholds)), stride, queries
        self._choose, self._lasting = choose, lasting
        self._options: dict[str, Any] = {
            "rule": rule, "metric": metric, "num_steps": num_steps, "stride": stride, "queries": (queries, APART),
            "lasting": lasting, "thresholds": list(self.thresholds), "curves": list(Curve._fields),
        }  # fmt: skip
        self._autosave = None if autosave is None else Path(autosave)
        self._calls: Counter[_State] = Counter()
        self._measured: Counter[_State] = Counter()  # more than the calls, while what came before a resume is repeated
        self._masks: dict[_State, torch.Tensor] = {}  # words [B, Hq, q_tiles, k_words] of the last one measured
        self._votes: dict[_State, torch.Tensor] = {}  # that it cast
        self._slots: dict[str, int] = {}  # of a site's states
        self.seconds = 0.0  # spent with measuring
        self._bar = tqdm(total=num_steps, desc="calibrating", unit="step") if progress and num_steps else None
        super().__init__(model_or_pipe, metric, bound, num_steps, settings)

    # ---- measuring -------------------------------------------------------------------------------------------------

    def attend(self, call: CaughtCall) -> Output:
        """Measure a call, decide, and return its dense output."""
        self._check(call)
        dense = call.run_stateless()
        state = (call.site, call.ordinal, call.control.slot)
        self._show(state, call.control.step)
        self._calls[state] += 1
        if self._calls[state] > self._measured[state]:
            self._measure(call, state, dense[0])
        else:
            self._check_finite(call, dense[0])
        words, (batch, heads, q_tiles, _) = self._masks[state], call.skipped.shape
        if words.shape[:3] != (batch, heads, q_tiles):
            raise ValueError(
                f"{call.where}: expected (batch, heads, q_tiles) = {tuple(words.shape[:3])}, as before the interrupt, "
                f"got {(batch, heads, q_tiles)}: repeat the same generations in the same order"
            )
        call.finish(words)
        return dense

    def _measure(self, call: CaughtCall, state: _State, dense: torch.Tensor) -> None:
        start = now()
        q, k, v, skip_mask, *_, must_do, key_mask = call.args
        stride, apart = self._sampling(call)
        voted = None if call.control.fresh else self._votes.get(state)
        voted = None if voted is None else voted.to(q.device)
        found = measure_tiles(
            q, k, v, call.skipped, voted, must_do, key_mask, thresholds=self.thresholds, metric=self.metric,
            stride=stride, apart=apart, **call.kwargs,
        )  # fmt: skip
        self._check_finite(call, dense)
        tiles = float(call.skipped[:, 0].numel())
        # As many as in all rows: sites of other lengths or tiles, and other passes, measure another share of theirs.
        left_out = found.left_out * (tiles / found.tiles)
        curve = self._merged(call, Curve(error_of(self.metric, found.parts), loss_of(found.parts), left_out, tiles))
        skipped = call.skipped
        if voted is not None:
            choice = self._choice(call.place, curve).to(voted)
            skipped[:, :, ::stride] |= voted <= choice.view(-1, 1, 1)
        votes = found.votes(skipped)
        if self._lasting and voted is not None:
            votes = torch.minimum(votes, voted)
        # Together, so that an interrupt leaves all or nothing.
        self._masks[state], self._votes[state], self.curves[call.place] = pack_bits(skipped), votes, curve
        self._slots[call.site] = skip_mask.shape[0]
        self._measured[state] = self._calls[state]
        self.seconds += now() - start

    def _sampling(self, call: CaughtCall) -> tuple[int, int]:
        """Return every how many-th row of tiles is measured, and every how many-th of their queries for errors."""
        rows, tile_m = call.skipped.shape[2], call.kwargs["tile_m"]
        if self.stride is not None:
            return self.stride, min(self.stride, APART)
        stride = max(1, rows * tile_m // self.queries)
        return stride, min(max(1, ceil_div(rows, stride) * tile_m * APART // self.queries), APART)

    def _choice(self, place: Place, curve: Curve) -> torch.Tensor:
        choice = self._choose(place, curve)
        # No bolder than it takes: where nothing was voted out, any candidate does the same.
        return (curve.left_out >= curve.left_out.gather(0, choice.unsqueeze(0))).int().argmax(0)

    def _show(self, state: _State, step: int) -> None:
        if self._bar is not None and state == next(iter(self._calls), state):
            if step == 0 and self._bar.n:
                self._bar.reset()
            self._bar.update(step + 1 - self._bar.n)

    # ---- results ---------------------------------------------------------------------------------------------------

    def table(self) -> dict[str, torch.Tensor]:
        """Return thresholds by site, float32 (slots, steps, heads), or (1, steps, heads) if only slot 0 was in use.

        What was not measured has -inf: the last step, of which the votes take no effect, or another branch.
        """
        values = torch.tensor([-math.inf, *self.thresholds])
        tables: dict[str, torch.Tensor] = {}
        for site in dict.fromkeys(place[0] for place in self.curves):
            choices = {p[1:]: self._choice(p, curve) for p, curve in self.curves.items() if p[0] == site}
            slots = self._slots[site] if any(slot > 0 for slot, _ in choices) else 1
            steps = self.num_steps or 1 + max(step for _, step in choices)
            tables[site] = torch.full((slots, steps, len(next(iter(choices.values())))), -math.inf)
            for (slot, step), choice in choices.items():
                if step:
                    tables[site][slot, step - 1] = values[choice]
        return tables

    def detach(self) -> None:
        """Leave the model as it was; its skip states start fresh. Table and report stay."""
        if self._bar is not None:
            self._bar.close()
        super().detach()

    # ---- saving and resuming ---------------------------------------------------------------------------------------

    def after_forward(self) -> None:
        """Write the autosave file."""
        if self._autosave is not None and self.curves:
            self.save(self._autosave)

    def save(self, path: str | Path) -> None:
        """Write all that was found so far; a file that is there is replaced when the new one is complete."""
        unfinished = Path(f"{path}.tmp")
        content = {
            "options": self._options,
            "curves": {place: tuple(curve) for place, curve in self.curves.items()},
            "measured": dict(self._measured),
            "masks": {state: words.cpu() for state, words in self._masks.items()},
            "votes": {state: votes.cpu() for state, votes in self._votes.items()},
            "slots": self._slots,
        }
        torch.save(content, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: str | Path) -> None:
        """Go on from what was saved: repeat the same generations from the first; what was measured costs nothing again.

        Raises:
            ValueError: generations have run already, or the file was saved with other options.
            OSError: the file cannot be read.
        """
        if self._calls:
            raise ValueError(
                f"resume: expected a calibration that has not run yet, got one with {len(self.curves)} steps"
            )
        content = torch.load(path, weights_only=True, map_location="cpu")
        saved = content["options"]
        differing = [name for name in {**self._options, **saved} if self._options.get(name) != saved.get(name)]
        if differing:
            expected, got = ({name: options.get(name) for name in differing} for options in (self._options, saved))
            raise ValueError(f"{path}: expected a calibration with {expected}, got {got}")
        self.curves = {place: Curve(*curve) for place, curve in content["curves"].items()}
        self._measured, self._masks = Counter(content["measured"]), dict(content["masks"])
        self._votes = dict(content["votes"])
        self._slots = dict(content["slots"])


class Calibration(Recorder):
    """Finds the most aggressive thresholds whose error stays under a bound, while the model generates densely.

    From now until `detach` the model runs eagerly, and each call of its skip-aware attention returns the dense output.
    At each step a head gets the highest candidate for which the error of the site's output at the next step is at most
    its limit, with everything left out that was voted out until then; where that is too much by itself, it gets -inf.
    What was voted out stays out while the attention moves on, so the limit lies below the bound: by default by a share
    for the drift that is to be expected, see `limits_after`. The criterion is that of arXiv 2511.11062, for every head
    and against the dense output. Over several generations the worst one counts.

        with Calibration(model, target_error=0.05, num_steps=50) as calibration:
            generate()
        thresholds = calibration.table()

    Args:
        model_or_pipe: an nn.Module, or a diffusers pipeline; given to `enable`, holding `LiteAttention`, or neither.
        target_error: the bound.
        limits: for each (site, slot), [heads]; None = `HEADROOM` of the bound.
        metric: of the output of a head: "L1" = sum|sparse - dense| / sum|dense|, "RMSE" = that of Euclidean lengths,
            "Cossim" = 1 - cosine similarity.
        num_steps: denoising steps of a generation; None = as many as come.
        thresholds: candidates, ascending, in log2 units.
        stride: measure only every so many rows of tiles, evenly spread, which costs so much less, and errors of only
            every so many of their queries, at most `APART`; None = by `queries`.
        queries: measure the rows of tiles of at least so many, and errors of at least a quarter as many.
        autosave: file that is written after each forward, for `resume`.
        progress: show a bar with the time left; needs num_steps.
        settings: as for `enable`, of a model that is not enabled yet.

    Raises:
        ValueError: an argument out of range.
        FloatingPointError: while generating: attention gives NaN or infinity; names site, slot and step.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        *,
        target_error: float,
        limits: Mapping[tuple[str, int], torch.Tensor] | None = None,
        metric: str = "L1",
        num_steps: int | None = None,
        **options: Any,
    ) -> None:
        if not target_error >= 0:
            raise ValueError(f"target_error: expected a number of at least 0, got {target_error}")
        self._limits = dict(limits or {})

        def choose(place: Place, curve: Curve) -> torch.Tensor:
            fits = curve.errors <= self._limits.get(place[:2], HEADROOM * target_error)
            highest = (fits * torch.arange(len(fits)).unsqueeze(-1)).amax(0)
            return torch.where(fits[0], highest, 0)

        rule = f"error of each head at most {target_error}" + (", with limits" if limits else "")
        super().__init__(model_or_pipe, choose, rule, target_error, metric=metric, num_steps=num_steps, **options)

    def limits_after(self) -> dict[tuple[str, int], torch.Tensor]:
        """Return limits for a second calibration: they bring the largest error of a head to `HEADROOM` of the bound."""
        peaks: dict[tuple[str, int], torch.Tensor] = {}
        for row in self.report.rows:
            place = row.site, row.slot
            peaks[place] = torch.maximum(peaks.get(place, row.error), row.error)
        bound = self.bound or 0.0
        aim = HEADROOM * bound
        return {
            place: (self._limits.get(place, aim) * aim / peak.clamp(min=1e-12)).clamp(max=bound)
            for place, peak in peaks.items()
        }


class Verification(_Measurement):
    """Runs a model skip-aware with given thresholds, and measures each call against dense attention of the same inputs.

    Args:
        model_or_pipe: as for `Calibration`.
        table: by site, (slots or 1, steps or 1, heads or 1).
        metric: as for `Calibration`.
        bound: that the report holds the errors against. With one, the worst of several generations counts; without,
            their mean.
        num_steps: as for `Calibration`.
        settings: likewise.

    Raises:
        ValueError: while generating: a site is not in the table.
        FloatingPointError: likewise: attention gives NaN or infinity.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        table: Mapping[str, torch.Tensor],
        *,
        metric: str = "L1",
        bound: float | None = None,
        num_steps: int | None = None,
        **settings: Any,
    ) -> None:
        self._table = dict(table)
        super().__init__(model_or_pipe, metric, bound, num_steps, settings)

    def attend(self, call: CaughtCall) -> Output:
        """Run the op with the table's thresholds."""
        threshold = self._table.get(call.site)
        if threshold is None:
            raise ValueError(f"table: expected thresholds for {call.site}, got them for {sorted(self._table)}")
        self._check(call)
        dense, _ = call.run_stateless()
        threshold = self._table[call.site] = threshold.to(dense.device)
        out, lse = call.run(threshold)
        precise = torch.promote_types(out.dtype, torch.float32)
        parts = error_parts(self.metric, *(x.transpose(1, 2).to(precise) for x in (out, dense))).sum(1)
        left_out = call.skipped.sum((0, 2, 3), dtype=torch.float64)
        parts, left_out = torch.cat([parts, left_out.unsqueeze(0)]).cpu().split([4, 1])
        self._check_finite(call, dense)
        tiles = call.skipped[:, 0].numel()
        curve = Curve(error_of(self.metric, parts).unsqueeze(0), loss_of(parts).unsqueeze(0), left_out, tiles)
        self.curves[call.place] = self._merged(call, curve)
        return out, lse
