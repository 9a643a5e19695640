"""`calibrate`: thresholds for a model from a target, for each head and step or for the whole, and what they reach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.calibration.autosave import claimed, fingerprint
from lite_attention.calibration.error_report import ErrorReport
from lite_attention.calibration.passes import Passes, Runs
from lite_attention.calibration.probe import EnableOptions
from lite_attention.calibration.recorder import THRESHOLDS, check_candidates
from lite_attention.calibration.targets import Target
from lite_attention.calibration.verification import Verification
from lite_attention.ops.arguments import check_count
from lite_attention.ops.option_names import takes_options
from lite_attention.parallel.agreement import shard_of_all
from lite_attention.tables import text_table
from lite_attention.threshold_table import ThresholdTable

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CalibrationResult", "calibrate"]


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
    target = Target.of(target_error, target_sparsity, budget, metric)
    num_steps, passes = check_count("num_steps", num_steps), check_count("passes", passes)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    measured: dict[str, Any] = {"metric": metric, "num_steps": num_steps}
    searched: dict[str, Any] = {"thresholds": check_candidates(thresholds), "stride": stride}
    of = {**asdict(target), **measured, **searched, **_described(model_or_pipe, prompts, settings)}
    shard, runs = shard_of_all(model_or_pipe), Runs(generate)
    if autosave is not None and shard.place.ranks > 1:
        of["shared"], autosave = repr(shard), f"{autosave}.rank{shard.place.rank}"
    options = {**measured, **settings}
    with contextlib.nullcontext() if autosave is None else claimed(autosave, of) as file:
        record = Passes(model_or_pipe, runs, prompts, file, {**searched, "progress": progress, "of": of, **options})
        found = target.search(record, passes)
    calibrated, table = runs.samples["calibration"], found.table()
    numbers = {"verification": prompts, "held_out": held_out}
    reports = {"calibration": found.report, **_verified(model_or_pipe, table, runs, numbers, found.bound, options)}
    return CalibrationResult(
        replace(table, **_said_of(target, reports)),
        **reports,
        sample_error=_sample_error(runs.samples["verification"], calibrated),
        cost=_cost(runs, record.measuring, len(prompts)),
        rank=shard.place.rank,
    )


def _described(model_or_pipe: Any, prompts: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells the autosave of a calibration from others, beside its options."""
    return {
        "model": fingerprint(model_or_pipe),
        "prompts": [_plain(prompt) for prompt in prompts],
        "settings": {key: _plain(value) for key, value in sorted(settings.items())},
    }


def _said_of(target: Target, reports: Mapping[str, ErrorReport]) -> dict[str, Any]:
    """Return what a table says of its target, and of what it reaches."""
    reached = {f"{kind} {name}": value for kind, report in reports.items() for name, value in report.items()}
    return {"target_error": target.target_error, "target_sparsity": target.target_sparsity, "reached": reached}


def _listed(name: str, numbers: Iterable[int]) -> list[int]:
    if not isinstance(numbers, Iterable):
        raise ValueError(f"{name}: expected the numbers of prompts, such as range(2), got {numbers!r}")
    return list(numbers)


def _plain(value: Any) -> int | float | str | None:
    """Return a value as a file holds it, the same in another process; of functions and tensors only what they are."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    return repr(value) if isinstance(value, (tuple, list)) else type(value).__name__


def _verified(
    model_or_pipe: Any, table: ThresholdTable, runs: Runs, prompts: Mapping[str, list[int]], bound: float | None,
    options: dict[str, Any],
) -> dict[str, ErrorReport]:  # fmt: skip
    """Return what a table reaches on the sparse trajectory, by kind of the prompts."""
    reports = {}
    for kind, numbers in prompts.items():
        with Verification(model_or_pipe, table, bound=bound, **options) as verification:
            runs(verification, kind, numbers)
        reports[kind] = verification.report
    return reports


def _cost(runs: Runs, measuring: float, prompts: int) -> dict[str, float]:
    """Return what a prompt took, in dense generations; measuring is the seconds of that in those that calibrated."""
    dense = (runs.seconds["calibration"] - measuring) / runs.generations["calibration"]
    return {name: runs.seconds[name] / prompts / dense for name in ("calibration", "verification")}


def _sample_error(sparse: list[Any], dense: list[Any]) -> float | None:
    pairs = [
        (s, d) for s, d in zip(sparse, dense, strict=True) if isinstance(s, torch.Tensor) and s.is_floating_point()
    ]
    errors = [float((s.float() - d.float()).abs().sum() / d.float().abs().sum()) for s, d in pairs]
    return sum(errors) / len(errors) if errors else None
