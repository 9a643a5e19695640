"""`calibrate`: thresholds for a model from a target, for each head and step or for the whole, and what they reach."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lite_attention.calibration.error_report import Curve, ErrorReport
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, Output, Place
from lite_attention.calibration.recorder import (
    THRESHOLDS,
    Calibration,
    Recorder,
    Verification,
)
from lite_attention.inspection import text_table

__all__ = ["CalibrationResult", "calibrate"]

_Kind = TypeVar("_Kind", bound=Recorder)

_log = logging.getLogger("lite_attention")


@dataclass
class CalibrationResult:
    """What `calibrate` found."""

    table: dict[str, torch.Tensor]  # by site, (slots or 1, steps, heads), log2 units
    calibration: ErrorReport  # on the dense trajectory
    verification: ErrorReport  # on the sparse trajectory, calibration prompts
    held_out: ErrorReport  # on the sparse trajectory, held-out prompts; empty without any
    sample_error: float | None  # sum|sparse - dense| / sum|dense| of what `generate` returned, the mean of the prompts
    cost: dict[str, float] = field(default_factory=dict)  # wall time for a prompt, in dense generations

    def __str__(self) -> str:
        """Return the figures of the whole."""
        reports = {"dense trajectory": self.calibration, "sparse trajectory": self.verification}
        reports |= {"held-out prompts": self.held_out} if self.held_out else {}
        rows = [[name, *report.figures()] for name, report in reports.items()]
        cost = ", ".join(f"{name} {x:.1f}" for name, x in self.cost.items())
        return f"{text_table(['', *self.calibration.header()], rows)}\ncost in dense generations: {cost}"


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
    **settings: Any,
) -> CalibrationResult:
    """Find thresholds for a model, and measure on the sparse trajectory what they do.

    With `target_error` alone it is a bound for every site, branch, step and head, see `Calibration`; a second pass
    lowers the limits of those heads whose error grew above it after their tiles had been voted out. With
    `target_sparsity`, or `budget`, the target is one of the whole, and is spread so that the last tile left out costs
    the same error everywhere: the candidate of least error - price * tiles left out is taken. The price is found by
    bisection on the curves of a first pass. Further passes follow the tiles voted out from step to step, and correct
    what the first could not know of that.

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
        progress: show a bar with the time left of each generation.
        settings: as for `enable`, of a model that is not enabled yet.

    Raises:
        ValueError: an argument out of range; or no attention was measured.
        FloatingPointError: attention gives NaN or infinity; names site, slot and step.
    """
    prompts, held_out = list(prompts), list(held_out)
    _check(target_error, target_sparsity, passes, prompts)
    common = {"metric": metric, "num_steps": num_steps, **settings}
    runs = _Runs(generate)

    def record(kind: Callable[..., _Kind], number: int = 0, **rule: Any) -> _Kind:
        """Run one pass, or what is left of it after an interrupt."""
        file = None if autosave is None else Path(f"{autosave}.{number}" if number else autosave)
        options = {"thresholds": thresholds, "stride": stride, "autosave": file, "progress": progress, **common}
        recorder = kind(model_or_pipe, **rule, **options)
        with recorder:
            if file is not None and file.exists():
                recorder.resume(file)
            runs(recorder, "calibration", prompts)
        if not recorder.curves:
            raise ValueError(
                "generate: expected calls of skip-aware attention, got none; lite_attention.report(model) tells, after "
                "enable(model, compile=False) and a call, what is left alone and why"
            )
        return recorder

    def record_at(price: float, number: int) -> Recorder:
        def choose(_: Place, curve: Curve) -> torch.Tensor:
            return (curve.errors - price * curve.left_out).argmin(0)

        return record(Recorder, number, choose=choose, rule=f"error - {price} * tiles left out")

    found: Recorder
    if target_error is not None and not budget:
        found = _bounded(
            lambda limits, number: record(Calibration, number, target_error=target_error, limits=limits), passes
        )
    else:
        name, target = ("error", target_error) if target_sparsity is None else ("sparsity", target_sparsity)
        found = _spread(record_at, name, float(target or 0), passes)
    table = found.table()
    calibrated = runs.samples["calibration"]
    with _Dense(model_or_pipe, num_steps, **settings) as dense:
        runs(dense, "dense", prompts[:1])
    reports = {}
    for kind, numbers in (("verification", prompts), ("held out", held_out)):
        with Verification(model_or_pipe, table, bound=found.bound, **common) as verification:
            runs(verification, kind, numbers)
        reports[kind] = verification.report
    cost = {name: runs.seconds[name] / len(prompts) / runs.seconds["dense"] for name in ("calibration", "verification")}
    sample_error = _sample_error(runs.samples["verification"], calibrated)
    return CalibrationResult(table, found.report, reports["verification"], reports["held out"], sample_error, cost)


def _check(target_error: float | None, target_sparsity: float | None, passes: int, prompts: list[int]) -> None:
    if (target_error is None) == (target_sparsity is None):
        raise ValueError(
            f"target_error, target_sparsity: expected one of them, got {target_error} and {target_sparsity}"
        )
    if target_sparsity is not None and not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity: expected a number from 0 to below 1, got {target_sparsity}")
    if target_error is not None and not target_error >= 0:
        raise ValueError(f"target_error: expected a number of at least 0, got {target_error}")
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")


class _Runs:
    """Runs generations, and keeps what they return and the time they take."""

    def __init__(self, generate: Callable[[int], Any]) -> None:
        self.generate = generate
        self.seconds: dict[str, float] = defaultdict(float)
        self.samples: dict[str, list[Any]] = {}

    def __call__(self, probe: AttentionProbe, kind: str, numbers: Sequence[int]) -> None:
        """Run one generation for each number; the samples of a kind are those of its latest run."""
        self.samples[kind] = []
        for i in numbers:
            probe.start_fresh()
            start = _now()
            with torch.no_grad():
                self.samples[kind].append(self.generate(i))
            self.seconds[kind] += _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _bounded(
    record_with: Callable[[dict[tuple[str, int], torch.Tensor] | None, int], Calibration], passes: int
) -> Calibration:
    """Return the pass with the fewest misses of the bound, and of those the one that leaves out most."""
    tried = [record_with(None, 0)]
    for number in range(1, passes + 1):
        if not tried[-1].report["missed"]:
            break
        tried.append(record_with(tried[-1].limits_after(), number))
    return min(tried, key=lambda found: (found.report["missed"], -found.report["sparsity"]))


def _spread(record_at: Callable[[float, int], Recorder], name: str, target: float, passes: int) -> Recorder:
    """Return the pass whose "error" or "sparsity" came nearest to a target of the whole."""
    curves = [*record_at(0.0, 0).curves.values()]
    aim, tried = target, []
    for number in range(1, passes + 1):
        price = _price_for(curves, name, aim)
        recorder = record_at(price, number)
        reached = recorder.report[name]
        _log.info("calibrate: pass %d, price %.3g a tile: %s %.4f of %.4f", number, price, name, reached, target)
        tried.append((abs(reached - target), number, recorder))
        if tried[-1][0] <= 0.01 * (target if name == "error" else 1):
            break
        # The curves of the first pass know nothing of what accumulates.
        aim = aim * target / max(reached, 1e-12) if name == "error" else min(max(aim + target - reached, 0), 1)
    return min(tried)[2]


class _Dense(AttentionProbe):
    """Runs a model densely, as fast as we can."""

    def attend(self, call: CaughtCall) -> Output:
        dense = call.run_stateless()
        call.finish(call.skipped)
        return dense


def _sample_error(sparse: list[Any], dense: list[Any]) -> float | None:
    pairs = [
        (s, d) for s, d in zip(sparse, dense, strict=True) if isinstance(s, torch.Tensor) and s.is_floating_point()
    ]
    errors = [float((s.float() - d.float()).abs().sum() / d.float().abs().sum()) for s, d in pairs]
    return sum(errors) / len(errors) if errors else None


def _price_for(curves: Sequence[Curve], name: str, target: float) -> float:
    """Return the error that a tile may cost for the choices of all curves to reach a mean "error" or a "sparsity".

    The choices at a price are corners of the lower convex hulls of error over tiles, those where the slope passes the
    price: no others can be the least. Both figures grow with the price.
    """
    errors = torch.cat([curve.errors for curve in curves], 1)
    left_out = torch.cat([curve.left_out for curve in curves], 1)
    tiles = sum(curve.tiles * curve.errors.shape[1] for curve in curves)
    low, high = math.log(1e-12), math.log(1e6)
    for _ in range(60):
        middle = (low + high) / 2
        choice = (errors - math.exp(middle) * left_out).argmin(0, keepdim=True)
        reached = errors.gather(0, choice).mean() if name == "error" else left_out.gather(0, choice).sum() / tiles
        low, high = (middle, high) if reached < target else (low, middle)
    return math.exp(low if name == "error" else high)
