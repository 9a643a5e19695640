"""Finding thresholds for each site, branch, step and head, from what leaving tiles out really costs.

Calibrating runs generations in which every attention call returns its dense output, and measures at each call what
error it would have at each candidate threshold of the step before: votes take effect one step later, on other queries
and keys than they were cast on.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lite_attention._version import __version__
from lite_attention.calibration import autosave as saved
from lite_attention.calibration.error_report import Curve
from lite_attention.calibration.measurement import Measurement, now
from lite_attention.calibration.probe import CaughtCall, EnableOptions, Output, Place
from lite_attention.calibration.tile_statistics import error_of, loss_of, measure_tiles
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.tiles import ceil_div
from lite_attention.threshold_table import ThresholdTable
from lite_attention.threshold_table.fit import branches_of, class_name, dtype_name, model_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["QUERIES", "THRESHOLDS", "Choose", "Recorder", "RecorderOptions", "check_candidates"]

# Candidates, log2 units: finer where the error moves fast.
THRESHOLDS = (
    *(-20.0, -17.0, -15.0, -13.0, -12.0, -11.0, -10.0, -9.0, -8.0, -7.25, -6.5, -6.0),
    *(-5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0),
)

Choose = Callable[[Place, Curve], torch.Tensor]  # returns the choice of each head, [heads]
QUERIES = 2000  # of a head, at least, whose rows of tiles are measured at a call, unless a stride is given
APART = 4  # errors are of at least a so many-th of these
_SAME = 0.05  # by so much of its length may a repeated output be off

_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are

_State = tuple[str, int, int]  # site, number of the state among those of that name, slot


def check_candidates(thresholds: Sequence[float]) -> list[float]:
    """Return candidates as a list; raise ValueError where they are not 1 to 250 ascending numbers of at most 0."""
    try:
        found = [float(threshold) for threshold in thresholds]
    except (TypeError, ValueError):
        found = []
    ascending = all(low < high for low, high in pairwise(found))
    if not 1 <= len(found) <= 250 or not ascending or not found[-1] <= 0:
        raise ValueError(f"thresholds: expected 1 to 250 ascending numbers of at most 0, got {thresholds!r}")
    return found


class RecorderOptions(EnableOptions, total=False):
    """The arguments of `Recorder` that those who choose for it hand on."""

    thresholds: Sequence[float]
    stride: int | None
    queries: int
    autosave: str | Path | None
    progress: bool
    of: Mapping[str, Any] | None


class Recorder(Measurement):
    """Records curves on the dense trajectory, and lets `choose` decide what each step votes out.

    Args:
        model_or_pipe: as for `Calibration`, as are those not named here.
        choose: what each head leaves out at a place.
        rule: what tells this `choose` from others, in a saved file.
        bound: with one, the worst of several generations counts; without, their mean.
        lasting: the curves are of one threshold at all steps so far, whatever `choose` leaves out: a tile belongs to
            the least that has dropped it since the fresh step.
        of: what tells this calibration from others in a saved file, beside the options; None = the model.
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
        of: Mapping[str, Any] | None = None,
        **settings: Unpack[EnableOptions],
    ) -> None:
        if stride is not None and stride < 1:
            raise ValueError(f"stride: expected at least 1, got {stride}")
        if queries < 1:
            raise ValueError(f"queries: expected at least 1, got {queries}")
        self.thresholds, self.stride, self.queries = tuple(check_candidates(thresholds)), stride, queries
        self._choose, self._lasting = choose, lasting
        self._options: dict[str, Any] = {
            "rule": rule, "metric": metric, "stride": stride, "queries": (queries, APART),
            "lasting": lasting, "thresholds": list(self.thresholds), "curves": list(Curve._fields),
        }  # fmt: skip
        self._autosave = None if autosave is None else Path(autosave)
        self._calls: Counter[_State] = Counter()
        self._measured: Counter[_State] = Counter()  # more than the calls, while what came before a resume is repeated
        self._masks: dict[_State, torch.Tensor] = {}  # words [B, Hq, q_tiles, k_words] of the last one measured
        self._votes: dict[_State, torch.Tensor] = {}  # that it cast
        self._kinds: dict[_State, list[Any]] = {}  # tile_m, tile_n and quantization
        self._traces: dict[_State, list[torch.Tensor]] = {}  # some of each dense output, to know it again
        self._slots: dict[str, int] = {}  # of a site's states
        self._of = None if of is None else dict(of)
        self._tile_shapes: dict[str, tuple[int, int]] = {}
        self._dtypes: set[torch.dtype] = set()
        self._tokens = 0
        self._branches: tuple[str, ...] = ()
        self.seconds = 0.0  # spent with measuring
        super().__init__(model_or_pipe, metric, bound, num_steps, settings)
        self._bar = tqdm(total=num_steps, desc="calibrating", unit="step") if progress and num_steps else None

    # ---- measuring -------------------------------------------------------------------------------------------------

    def attend(self, call: CaughtCall) -> Output:
        """Measure a call, decide, and return its dense output."""
        self._check(call)
        dense = call.run_stateless()
        state = (call.site, call.ordinal, call.control.slot)
        self._show(state, call.control.step)
        self._note(call)
        self._calls[state] += 1
        if self._calls[state] > self._measured[state]:
            self._measure(call, state, dense[0])
        else:
            self._check_finite(call, dense[0])
            self._check_repeated(call, state, dense[0])
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
            query_start=call.control.query_start, stride=stride, apart=apart, **call.kwargs,
        )  # fmt: skip
        counts = found.left_out.new_tensor([[call.skipped[:, 0].numel()], [found.tiles]]).expand(
            -1, call.skipped.shape[1]
        )
        parts, out_of_measured, counts = self._of_all(call, dense, found.parts.flatten(0, 1), found.left_out, counts)
        parts, (tiles, measured) = parts.unflatten(0, (4, -1)), counts[:, 0].tolist()
        # As many as in all rows: sites of other lengths or tiles, and other passes, measure another share of theirs.
        left_out = out_of_measured * (tiles / measured)
        curve = self._merged(call, Curve(error_of(self.metric, parts), loss_of(parts), left_out, tiles))
        skipped = call.skipped
        if voted is not None:
            choice = call.sharing.own_heads(self._choice(call.place, curve)).to(voted)
            skipped[:, :, ::stride] |= voted <= choice.view(-1, 1, 1)
        votes = found.votes(skipped)
        if self._lasting and voted is not None:
            votes = torch.minimum(votes, voted)
        # Together, so that an interrupt leaves all or nothing.
        self._masks[state], self._votes[state], self.curves[call.place] = pack_bits(skipped), votes, curve
        self._traces.setdefault(state, [])[self._calls[state] - 1 :] = [saved.sampled(dense)]
        self._kinds[state] = _kind_of(call)
        self._slots[call.site] = skip_mask.shape[0]
        self._measured[state] = self._calls[state]
        self.seconds += now() - start

    def _note(self, call: CaughtCall) -> None:
        """Keep what a table says of where it comes from."""
        query = call.args[0]
        self._tile_shapes[call.site] = call.kwargs["tile_m"], call.kwargs["tile_n"]
        self._dtypes.add(query.dtype)
        self._tokens = max(self._tokens, call.tokens)
        if call.control.slot >= len(self._branches):
            self._branches = branches_of(self._target)

    def _check_repeated(self, call: CaughtCall, state: _State, dense: torch.Tensor) -> None:
        """Raise ValueError where a call is not the one that was measured before the interrupt."""
        if _kind_of(call) != self._kinds[state]:
            raise ValueError(
                f"{call.where}: expected (tile_m, tile_n, quantization) = {self._kinds[state]}, as before the "
                f"interrupt, got {_kind_of(call)}"
            )
        got, expected = saved.sampled(dense), self._traces[state][self._calls[state] - 1]
        if got.shape != expected.shape or float((got - expected).norm()) > _SAME * float(expected.norm()):
            raise ValueError(
                f"{call.where}: expected the attention that was measured before the interrupt, got another: repeat "
                "the same generations in the same order, or begin anew without the autosave file"
            )

    def _sampling(self, call: CaughtCall) -> tuple[int, int]:
        """Return every how many-th row of tiles is measured, and every how many-th of their queries for errors."""
        rows, tile_m = call.skipped.shape[2], call.kwargs["tile_m"]
        if self.stride is not None:
            return self.stride, min(self.stride, APART)
        stride = max(1, rows * tile_m // self.queries)
        return stride, min(max(1, ceil_div(rows, stride) * tile_m * APART // self.queries), APART)

    def _choice(self, place: Place, curve: Curve) -> torch.Tensor:
        choice = self._choose(place, curve)
        # No higher than it takes: where nothing was voted out, any candidate does the same.
        return (curve.left_out >= curve.left_out.gather(0, choice.unsqueeze(0))).int().argmax(0)

    def _show(self, state: _State, step: int) -> None:
        if self._bar is not None and state == next(iter(self._calls), state):
            if step == 0 and self._bar.n:
                self._bar.reset()
            self._bar.update(step + 1 - self._bar.n)

    # ---- results ---------------------------------------------------------------------------------------------------

    def table(self) -> ThresholdTable:
        """Return the thresholds found so far, with all that is known of where they come from.

        By site, float32 (slots, steps, heads), or (1, steps, heads) if only slot 0 was in use. What was not measured
        has -inf: the last step, of which the votes take no effect, or another branch.
        """
        return ThresholdTable(
            self._thresholds(),
            tile_shapes=dict(self._tile_shapes),
            model_class=class_name(self._target),
            model=model_name(self._target),
            dtype=dtype_name(self._dtypes),
            tokens=self._tokens or None,
            num_steps=self.num_steps or 1 + max((place[2] for place in self.curves), default=0),
            branches=self._branches or None,
            metric=self.metric,
            target_error=self.bound,
            reached=dict(self.report),
            library_version=__version__,
            date=datetime.date.today().isoformat(),
        )

    def _thresholds(self) -> dict[str, torch.Tensor]:
        values = torch.tensor([-math.inf, *self.thresholds], **_CPU)
        tables: dict[str, torch.Tensor] = {}
        for site in dict.fromkeys(place[0] for place in self.curves):
            choices = {p[1:]: self._choice(p, curve) for p, curve in self.curves.items() if p[0] == site}
            slots = self._slots[site] if any(slot > 0 for slot, _ in choices) else 1
            steps = self.num_steps or 1 + max(step for _, step in choices)
            tables[site] = torch.full((slots, steps, len(next(iter(choices.values())))), -math.inf, **_CPU)
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
        content = {
            "options": self._all_options(),
            "curves": {place: tuple(curve) for place, curve in self.curves.items()},
            "measured": dict(self._measured),
            "masks": {state: words.cpu() for state, words in self._masks.items()},
            "votes": {state: votes.cpu() for state, votes in self._votes.items()},
            "slots": self._slots,
            "kinds": self._kinds,
            "traces": {state: torch.stack(outputs) for state, outputs in self._traces.items()},
        }
        saved.write(path, content)

    def _all_options(self) -> dict[str, Any]:
        if self._of is None:
            self._of = {"model": saved.fingerprint(self._target)}
        return {**self._of, **self._options, "num_steps": self.num_steps}

    def resume(self, path: str | Path) -> None:
        """Go on from what was saved: repeat the same generations from the first; what was measured costs nothing again.

        Raises:
            ValueError: generations have run already, the file is none that `save` wrote, or it was saved with another
                model or other options. While generating: they are not those that were measured.
            OSError: the file cannot be read.
        """
        if self._calls:
            raise ValueError(
                f"resume: expected a calibration that has not run yet, got one with {len(self.curves)} steps"
            )
        content = saved.read(path)
        expected, got = saved.differing(self._all_options(), content["options"])
        if expected:
            raise ValueError(f"{path}: expected a calibration with {expected}, got {got}")
        self.curves = {place: Curve(*curve) for place, curve in content["curves"].items()}
        self._measured, self._masks = Counter(content["measured"]), dict(content["masks"])
        self._votes = dict(content["votes"])
        self._slots = dict(content["slots"])
        self._kinds = dict(content["kinds"])
        self._traces = {state: list(outputs) for state, outputs in content["traces"].items()}


def _kind_of(call: CaughtCall) -> list[Any]:
    return [call.kwargs["tile_m"], call.kwargs["tile_n"], call.kwargs.get("quantization", "none")]
