"""`calibrate`: thresholds for a model from a target, for each head and step or for the whole, and what they reach."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lite_attention.calibration.autosave import claimed, fingerprint, read
from lite_attention.calibration.bounded import Calibration
from lite_attention.calibration.error_report import Curve, ErrorReport
from lite_attention.calibration.measurement import check_target, is_number, now
from lite_attention.calibration.probe import AttentionProbe, EnableOptions, Place
from lite_attention.calibration.recorder import QUERIES, THRESHOLDS, Choose, Recorder, check_candidates
from lite_attention.calibration.verification import Verification
from lite_attention.ops.arguments import check_count
from lite_attention.ops.option_names import takes_options
from lite_attention.parallel.agreement import shard_of_all, texts_of_all, told_of_errors
from lite_attention.tables import text_table
from lite_attention.threshold_table import ThresholdTable

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CalibrationResult", "calibrate"]

_Kind = TypeVar("_Kind", bound=Recorder)

_SCOUTED = 4  # of the queries of a pass, the first one measures a so many-th

_log = logging.getLogger("lite_attention")


@dataclass
class CalibrationResult:
    """What `calibrate` found.

    result.save("thresholds.toml")      # for `enable(threshold="thresholds.toml")`, or `ThresholdTable.load`
    result.table.apply(model)
    """

    table: ThresholdTable  # by site, (slots or 1, steps, heads), log2 units
    calibration: ErrorReport  # on the dense trajectory
    verification: ErrorReport  # on the sparse trajectory, calibration prompts
    held_out: ErrorReport  # on the sparse trajectory, held-out prompts; empty without any
    sample_error: float | None  # sum|sparse - dense| / sum|dense| of what `generate` returned, the mean of the prompts
    # Wall time for a prompt, in dense generations as the calibration has them, eager, without what it measured in them.
    cost: dict[str, float] = field(default_factory=dict)
    rank: int = 0  # of this process among those that share the model

    def save(self, path: str | Path) -> None:
        """Write the thresholds, what they were found on and what they reach; of ranks the first does.

        See `ThresholdTable.save`.
        """
        if self.rank == 0:
            self.table.save(path)

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows; numbers by the thousand help nobody

    def __str__(self) -> str:
        """Return the figures of the whole."""
        reports = {"dense trajectory": self.calibration, "sparse trajectory": self.verification}
        reports |= {"held-out prompts": self.held_out} if self.held_out else {}
        rows = [[name, *report.figures()] for name, report in reports.items()]
        cost = ", ".join(f"{name} {x:.1f}" for name, x in self.cost.items())
        return f"{text_table(['', *self.calibration.header()], rows)}\ncost in eager dense generations: {cost}"


@takes_options(*EnableOptions.__annotations__)
def calibrate(
    model_or_pipe: Any,
    generate: Callable[[int], Any],
    *,
    num_steps: int,
    target_error: float | None = None,
    target_sparsity: float | None = None,
    budget: bool = False,
    metric: str = "L1",
    prompts: Iterable[int] = (0,),
    held_out: Iterable[int] = (),
    passes: int = 1,
    thresholds: Sequence[float] = THRESHOLDS,
    stride: int | None = None,
    autosave: str | Path | None = None,
    progress: bool = True,
    **settings: Unpack[EnableOptions],
) -> CalibrationResult:
    """Find thresholds for a model, and measure on the sparse trajectory what they do.

    This is for method "votes"; `calibrate_residual` finds the shares that method "residual" keeps.

    A first pass over the dense trajectory, which measures less, finds what the further ones aim at. With `target_error`
    alone it is a bound for every site, branch, step and head, see `Calibration`; further passes lower the limits of
    those heads whose error grew above it after their tiles had been voted out. With `target_sparsity`, or `budget`, the
    target is one of the whole, and is spread so that the last tile left out costs the same everywhere: the candidate of
    least loss - price * tiles left out is taken. With `budget` the loss is the error itself, with `target_sparsity` the
    square of what a head's output is off by, against the mean square of its site's heads. The price is found by
    bisection on the curves of the first pass, of thresholds that are the same at all steps. Further passes follow the
    tiles voted out from step to step, and correct what the first could not know of that.

    Args:
        model_or_pipe: as for `Calibration`.
        generate: runs one generation for the prompt of this number, and may return the final sample. Everything random
            in it must be seeded.
        num_steps: denoising steps of a generation.
        target_error: the bound, or with `budget` the mean error over sites, branches, steps and heads.
        target_sparsity: share of all tiles of a generation to be left out, 0 to 1.
        budget: spread `target_error` over the whole.
        metric: "L1", "Cossim" or "RMSE", see `Calibration`.
        prompts: numbers that `generate` is called with.
        held_out: further ones, which only verify.
        passes: at most so many after the first.
        thresholds: candidates, ascending, in log2 units.
        stride: measure only every so many rows of tiles, see `Calibration`.
        autosave: file to write after each forward and to resume from if it is there; later passes add ".1", ".2", ....
            Where it is of another calibration (another model, other prompts or options), or another process writes it,
            a file beside it is used, and a warning says so. On resuming, `generate` must do what it did before.
        progress: show a bar with the time left of each generation.
        settings: as for `enable`, of a model that is not enabled yet.

    Raises:
        TypeError: a setting that is none.
        ValueError: an argument out of range; no attention was measured; or the autosave file is none, or another
            process does the same with it, or `generate` does not repeat what was saved.
        OSError: the autosave file cannot be read or written.
        FloatingPointError: attention gives NaN or infinity; names site, slot and step.
    """
    if settings.get("method", "votes") != "votes":
        raise ValueError(f"method: expected 'votes', got {settings['method']!r}; see calibrate_residual()")
    prompts, held_out = (_listed(name, of) for name, of in (("prompts", prompts), ("held_out", held_out)))
    if not callable(generate):
        raise ValueError(f"generate: expected a function of a prompt's number, got {type(generate).__name__}")
    _check(target_error, target_sparsity, metric, num_steps, passes, prompts)
    num_steps, target_error, target_sparsity = int(num_steps), _float(target_error), _float(target_sparsity)
    common: dict[str, Any] = {"metric": metric, "num_steps": num_steps, **settings}
    runs = _Runs(generate)
    of = {
        "model": fingerprint(model_or_pipe),
        "prompts": [_plain(prompt) for prompt in prompts],
        "target_error": target_error,
        "target_sparsity": target_sparsity,
        "budget": budget,
        "metric": metric,
        "num_steps": num_steps,
        "thresholds": check_candidates(thresholds),
        "stride": stride,
        "settings": {key: _plain(value) for key, value in sorted(settings.items())},
    }
    shard = shard_of_all(model_or_pipe)
    if autosave is not None and shard.place.ranks > 1:
        of["shared"], autosave = repr(shard), f"{autosave}.rank{shard.place.rank}"
    options = {"thresholds": thresholds, "stride": stride, "progress": progress, "of": of, **common}
    found: Recorder
    with contextlib.nullcontext() if autosave is None else claimed(autosave, of) as file:
        record = _Passes(model_or_pipe, runs, prompts, file, options)
        if target_error is not None and not budget:
            found = _bounded(record, target_error, passes)
        else:
            name, target = ("error", target_error) if target_sparsity is None else ("sparsity", target_sparsity)
            found = _spread(record, name, float(target or 0), passes)
    table = found.table()
    calibrated = runs.samples["calibration"]
    reports = {"calibration": found.report}
    for kind, numbers in (("verification", prompts), ("held_out", held_out)):
        with Verification(model_or_pipe, table, bound=found.bound, **common) as verification:
            runs(verification, kind, numbers)
        reports[kind] = verification.report
    reached = {f"{kind} {name}": value for kind, report in reports.items() for name, value in report.items()}
    table = replace(table, target_error=target_error, target_sparsity=target_sparsity, reached=reached)
    dense = (runs.seconds["calibration"] - record.measuring) / runs.generations["calibration"]
    cost = {name: runs.seconds[name] / len(prompts) / dense for name in ("calibration", "verification")}
    sample_error = _sample_error(runs.samples["verification"], calibrated)
    return CalibrationResult(table, **reports, sample_error=sample_error, cost=cost, rank=shard.place.rank)


def _listed(name: str, numbers: Iterable[int]) -> list[int]:
    if not isinstance(numbers, Iterable):
        raise ValueError(f"{name}: expected the numbers of prompts, such as range(2), got {numbers!r}")
    return list(numbers)


def _float(number: float | None) -> float | None:
    return None if number is None else float(number)  # numpy's are no numbers to a file


def _plain(value: Any) -> int | float | str | None:
    """Return a value as a file holds it, the same in another process; of functions and tensors only what they are."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    return repr(value) if isinstance(value, (tuple, list)) else type(value).__name__


def _check(
    target_error: float | None,
    target_sparsity: float | None,
    metric: str,
    num_steps: int,
    passes: int,
    prompts: list[int],
) -> None:
    if (target_error is None) == (target_sparsity is None):
        raise ValueError(
            f"target_error, target_sparsity: expected one of them, got {target_error} and {target_sparsity}"
        )
    if target_sparsity is not None and not (is_number(target_sparsity) and 0 <= target_sparsity < 1):
        raise ValueError(f"target_sparsity: expected a number from 0 to below 1, got {target_sparsity!r}")
    check_target(0 if target_error is None else target_error, metric)
    check_count("num_steps", num_steps)
    check_count("passes", passes)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")


class _Runs:
    """Runs generations, and keeps what they return and the time they take."""

    def __init__(self, generate: Callable[[int], Any]) -> None:
        self.generate = generate
        self.seconds: dict[str, float] = defaultdict(float)
        self.generations: Counter[str] = Counter()
        self.samples: dict[str, list[Any]] = {}

    def __call__(self, probe: AttentionProbe, kind: str, numbers: Sequence[int]) -> None:
        """Run one generation for each number; the samples of a kind are those of its latest run."""
        self.samples[kind] = []
        for i in numbers:
            probe.start_fresh()
            start = now()
            with torch.no_grad(), told_of_errors(probe.shard):
                self.samples[kind].append(self.generate(i))
            self.seconds[kind] += now() - start
            self.generations[kind] += 1


class _Passes:
    """Runs passes over the dense trajectories of all prompts, or what is left of them after an interrupt.

    Args:
        model_or_pipe: as for `calibrate`, as is autosave.
        runs: what runs the generations.
        prompts: numbers of them.
        options: of every pass.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        runs: _Runs,
        prompts: Sequence[int],
        autosave: str | Path | None,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._runs, self._prompts = model_or_pipe, runs, prompts
        self._autosave, self._options = autosave, options
        self.measuring = 0.0  # seconds, of all passes

    def __call__(self, kind: Callable[..., _Kind], number: int, **rule: Any) -> _Kind:
        """Run the pass of a number; the first one, 0, only finds what the others aim at, and measures less."""
        file = self._autosave
        if file is not None:
            file = Path(f"{file}.{number}" if number else file)
        queries = QUERIES if number else QUERIES // _SCOUTED
        recorder = kind(self._model, autosave=file, queries=queries, **rule, **self._options)
        with recorder:
            if file is not None and _may_resume(recorder, file):
                recorder.resume(file)
            self._runs(recorder, "calibration", self._prompts)
        self.measuring += recorder.seconds
        if not recorder.curves:
            raise ValueError(
                "generate: expected calls of skip-aware attention, got none; lite_attention.report(model) tells, after "
                "enable(model, compile=False) and a call, what is left alone and why"
            )
        return recorder


def _may_resume(recorder: Recorder, file: Path) -> bool:
    """Return whether there is a file, and those of all ranks are of the same calls."""
    measured = read(file)["measured"] if file.exists() else {}
    saved = texts_of_all(recorder.shard, repr(sorted(measured.items())))
    if len(set(saved)) > 1:
        warnings.warn(f"lite_attention: autosave: {file} and those of other ranks differ: begun anew", stacklevel=6)
    return bool(measured) and len(set(saved)) == 1


def _bounded(record: _Passes, target_error: float, passes: int) -> Calibration:
    """Return the pass with the fewest misses of the bound, and of those the one that leaves out most."""
    found, tried = record(Calibration, 0, target_error=target_error), []
    for number in range(1, passes + 1):
        found = record(Calibration, number, target_error=target_error, limits=found.limits_after())
        tried.append(found)
        if not found.report["missed"]:
            break
    return min(tried, key=lambda found: (found.report["missed"], -found.report["sparsity"]))


def _spread(record: _Passes, name: str, target: float, passes: int) -> Recorder:
    """Return the pass whose "error" or "sparsity" came nearest to a target of the whole."""
    curves = record(Recorder, 0, choose=_at(0.0, name), rule=f"least loss, {name}", lasting=True).curves
    aim, tried = target, []
    for number in range(1, passes + 1):
        price = _price_for(curves, name, aim)
        rule = f"loss - {price} * tiles left out, {name}"
        recorder = record(Recorder, number, choose=_at(price, name), rule=rule)
        reached = recorder.report[name]
        _log.info("calibrate: pass %d, price %.3g a tile: %s %.4f of %.4f", number, price, name, reached, target)
        tried.append((abs(reached - target), number, recorder))
        if tried[-1][0] <= 0.01 * (target if name == "error" else 1):
            break
        # The curves of the first pass know nothing of thresholds that change from step to step.
        aim = aim * target / max(reached, 1e-12) if name == "error" else min(max(aim + target - reached, 0), 1)
    return min(tried)[2]


def _at(price: float, name: str) -> Choose:
    def choose(_: Place, curve: Curve) -> torch.Tensor:
        return (_loss(curve, name) - price * curve.left_out).argmin(0)

    return choose


def _loss(curve: Curve, name: str) -> torch.Tensor:
    """Return what is to be least at a target, [choices, heads]: the errors, where these are the target."""
    return curve.errors if name == "error" else curve.losses


def _sample_error(sparse: list[Any], dense: list[Any]) -> float | None:
    pairs = [
        (s, d) for s, d in zip(sparse, dense, strict=True) if isinstance(s, torch.Tensor) and s.is_floating_point()
    ]
    errors = [float((s.float() - d.float()).abs().sum() / d.float().abs().sum()) for s, d in pairs]
    return sum(errors) / len(errors) if errors else None


def _price_for(curves: Mapping[Place, Curve], name: str, target: float) -> float:
    """Return what a tile may cost for the choices of all curves to reach a mean "error" or a "sparsity".

    The choices at a price are corners of the lower convex hulls of loss over tiles, those where the slope passes the
    price: no others can be the least. What is out stays out: so the curves are of one threshold at all steps so far,
    and no choice is below that of the step before. Both figures grow with the price.
    """
    steps = [*_by_step(curves, name)]
    tiles = sum(curve.tiles * curve.errors.shape[1] for curve in curves.values())
    heads = sum(loss.shape[1] for loss, _ in steps)

    def reached(price: float) -> float:
        total, choice = 0.0, torch.zeros(steps[0][0].shape[1], dtype=torch.int64, device="cpu")
        for loss, left_out in steps:
            costs, lowest = loss - price * left_out, choice[: loss.shape[1]]
            costs.masked_fill_(torch.arange(len(costs), device="cpu").unsqueeze(1) < lowest, math.inf)
            choice = costs.argmin(0)
            total += float((loss if name == "error" else left_out).gather(0, choice.unsqueeze(0)).sum())
        return total / (heads if name == "error" else tiles)

    low, high = math.log(1e-20), math.log(1e6)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(math.exp(middle)) < target else (low, middle)
    return math.exp(low if name == "error" else high)


def _by_step(curves: Mapping[Place, Curve], name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield losses and tiles left out of each step, [choices, heads of all sites and slots]; those with more first."""
    states: dict[tuple[str, int], list[Curve]] = defaultdict(list)
    for site, slot, step in sorted(curves):
        states[site, slot].append(curves[site, slot, step])
    longest_first = sorted(states.values(), key=len, reverse=True)
    for of_step in zip_longest(*longest_first):
        there = [curve for curve in of_step if curve is not None]
        yield torch.cat([_loss(curve, name) for curve in there], 1), torch.cat([curve.left_out for curve in there], 1)
