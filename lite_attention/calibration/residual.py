"""`calibrate_residual`: shares to keep from a target, by what sparse steps are really off by."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lite_attention._version import __version__
from lite_attention.calibration.measurement import check_target
from lite_attention.calibration.probe import AttentionProbe, EnableOptions, Output, Place
from lite_attention.calibration.shared_calls import Sharing
from lite_attention.calibration.tile_statistics import error_of, error_parts
from lite_attention.model_sites import methods_of
from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.control import FLAG_DENSE, FLAGS, read_control
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.plan import DECIDING, SPARSE
from lite_attention.ops.residual_settings import check_keep
from lite_attention.parallel.agreement import told_of_errors
from lite_attention.threshold_table import ThresholdTable
from lite_attention.threshold_table.fit import branches_of, class_name, dtype_name, model_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["KEEPS", "ResidualCalibration", "calibrate_residual"]

KEEPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)

Errors = Mapping[Place, float]  # of the outputs of sparse steps, the mean over heads and prompts


@dataclass
class ResidualCalibration:
    """What `calibrate` found for method "residual".

    result.save("keep.toml")      # for `enable(method="residual", keep="keep.toml")`, or `ThresholdTable.load`
    result.table.apply(model)
    """

    table: ThresholdTable  # by site, (1, steps, 1): the share of tiles to keep
    errors: dict[float, Errors]  # by share, site, slot and step: what was measured
    computed: float  # share of all tiles that the steps of the table compute, the mean over sites
    rank: int = 0  # of this process among those that share the model

    def save(self, path: str | Path) -> None:
        """Write the shares and what they were found on; of ranks the first does. See `ThresholdTable.save`."""
        if self.rank == 0:
            self.table.save(path)


class _SparseErrors(AttentionProbe):
    """Measures what sparse steps are off by, while every call returns dense attention."""

    method: ClassVar[Literal["votes", "residual"]] = "residual"

    def __init__(self, model_or_pipe: Any, metric: str, num_steps: int, settings: EnableOptions) -> None:
        self._metric, self._num_steps = metric, num_steps
        self.keep = 1.0  # the share of tiles, whatever the states are told
        self._found: dict[Place, list[float]] = defaultdict(list)
        self.tile_shapes: dict[str, tuple[int, int]] = {}
        self.dtypes: set[torch.dtype] = set()
        self.tokens = 0  # queries of the longest call
        super().__init__(model_or_pipe, num_steps, **settings)

    def take(self) -> dict[Place, float]:
        """Return the errors since the last time, the mean over generations."""
        found, self._found = self._found, defaultdict(list)
        return {place: sum(errors) / len(errors) for place, errors in found.items()}

    def _caught(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        q, k, _, skip_mask, control, plan, keep, *_ = args
        does = read_control(control, skip_mask.shape[0], (q.shape[0], q.shape[1], k.shape[1]))
        if does.dense:
            return op(*args, **kwargs)  # type: ignore[no-any-return]
        site, _, sharing = self._site_of(skip_mask, q.shape[2])
        require(does.step < self._num_steps, "num_steps", "at least the steps of a generation", self._num_steps)
        self.tile_shapes[site], self.tokens = (
            (kwargs["tile_m"], kwargs["tile_n"]),
            max(self.tokens, int(sharing.shard.all_queries(q.shape[1], k.shape[1]))),
        )
        self.dtypes.add(q.dtype)
        flagged = control.clone()
        flagged[FLAGS : FLAGS + 1].bitwise_or_(FLAG_DENSE)
        dense: Output = op(*args[:4], flagged, *args[5:], **kwargs)
        out, _ = op(*args[:6], torch.full_like(keep, self.keep), *args[7:], **kwargs)
        if int(plan[min(does.step, len(plan) - 1)]) == SPARSE:
            self._found[site, does.slot, does.step].append(
                self._error(out, dense[0], sharing, f"{site}, step {does.step}")
            )
        return dense

    def _error(self, out: torch.Tensor, dense: torch.Tensor, sharing: Sharing, where: str) -> float:
        precise = torch.promote_types(out.dtype, torch.float32)
        parts = error_parts(self._metric, *(x.transpose(1, 2).to(precise) for x in (out, dense))).sum(1)
        is_off = torch.full_like(parts[:1], not bool(dense.isfinite().all()))
        if sharing.is_shared:
            parts, is_off = sharing.of_all(torch.cat([parts, is_off])).split([4, 1])
        if bool(is_off.any()):
            raise FloatingPointError(f"{where}: attention gives NaN or infinity")
        return float(error_of(self._metric, parts).mean())


@takes_options(*EnableOptions.__annotations__)
def calibrate_residual(
    model_or_pipe: Any,
    generate: Callable[[int], Any],
    *,
    num_steps: int,
    target_error: float,
    metric: str = "L1",
    prompts: Iterable[int] = (0,),
    keeps: Sequence[float] = KEEPS,
    **settings: Unpack[EnableOptions],
) -> ResidualCalibration:
    """Find how few tiles each site may keep, from one deciding step to the next.

    There is a generation for each candidate and prompt, on the dense trajectory: each call gives dense attention, and
    beside it the op runs as it would. Its sparse steps are held against the dense ones, with their real masks,
    residuals and forecasts. A site keeps the least share whose mean error over the sparse steps that go by a mask, and
    over branches and prompts, is at most the target. Where none is, it keeps all.

    Args:
        model_or_pipe: as for `calibrate`, as are the others.
        generate: runs one generation for the prompt of this number; everything random in it must be seeded.
        num_steps: denoising steps of a generation.
        target_error: the most that the output of a site may be off by in sparse steps.
        metric: "L1", "Cossim" or "RMSE".
        prompts: numbers that `generate` is called with.
        keeps: candidates, ascending, above 0 and below 1.
        settings: as for `enable`, of a model that is not enabled yet.

    Raises:
        TypeError: a setting that is none.
        ValueError: an argument out of range, a model with method "votes", or no sparse step was seen.
        FloatingPointError: attention gives NaN or infinity.
    """
    numbers = list(prompts)
    require(callable(generate), "generate", "a function of a prompt's number", type(generate).__name__)
    check_target(target_error, metric)
    num_steps = check_count("num_steps", num_steps)
    require(bool(numbers), "prompts", "at least one", "none")
    _check_candidates(keeps)
    errors: dict[float, Errors] = {}
    with _SparseErrors(model_or_pipe, metric, num_steps, settings) as probe:
        for probe.keep in keeps:
            for number in numbers:
                probe.start_fresh()
                with torch.no_grad(), told_of_errors(probe.shard):
                    generate(number)
            errors[float(probe.keep)] = probe.take()
        require(any(errors.values()), "generate", "sparse steps of skip-aware attention", "none")
        residual = next(found for found in methods_of(model_or_pipe) if found is not None)
        shares = _shares(errors, residual.plan(num_steps), float(target_error))
        table = ThresholdTable(
            {site: share.view(1, -1, 1) for site, share in shares.items()},
            tile_shapes=probe.tile_shapes,
            model_class=class_name(model_or_pipe),
            model=model_name(model_or_pipe),
            dtype=dtype_name(probe.dtypes),
            tokens=probe.tokens,
            num_steps=num_steps,
            branches=branches_of(model_or_pipe) or None,
            metric=metric,
            target_error=float(target_error),
            library_version=__version__,
            date=datetime.date.today().isoformat(),
            method="residual",
            full_every=residual.full_every,
            first_full=residual.first_full,
            decide_every=residual.decide_every,
        )
    computed = _computed(residual.plan(num_steps), shares)
    return ResidualCalibration(table, errors, computed, probe.shard.place.rank)


def _check_candidates(keeps: Sequence[float]) -> None:
    check_keep(torch.tensor([*keeps], dtype=torch.float32))
    is_rising = all(a < b for a, b in zip(keeps, [*keeps[1:], 1.0], strict=True))
    require(is_rising, "keeps", "ascending shares above 0 and below 1", list(keeps))


def _shares(errors: Mapping[float, Errors], plan: Sequence[int], target: float) -> dict[str, torch.Tensor]:
    """Return by site the least share (steps,) with which the sparse steps after each deciding one keep the target."""
    decides = _deciding_steps(plan)
    of_steps: dict[tuple[str, int], list[Place]] = defaultdict(list)  # by site and the step that decided their mask
    for place in dict.fromkeys(place for found in errors.values() for place in found):
        of_steps[place[0], decides[place[2]]].append(place)
    shares = {site: torch.ones(len(plan), dtype=torch.float32, device="cpu") for site, _ in of_steps}
    for (site, decided), places in of_steps.items():
        fits = [keep for keep, found in errors.items() if _mean([found[place] for place in places]) <= target]
        steps = [step for step, decider in enumerate(decides) if decider == decided]
        shares[site][steps] = min(fits, default=1.0)
    return shares


def _deciding_steps(plan: Sequence[int]) -> list[int]:
    """Return for each step that which decided its mask; a full step takes the one that was decided before it.

    A deciding step goes with the steps that will go by its mask.
    """
    decided, in_use, found = 0, 0, []
    for step, kind in enumerate(plan):
        if kind != SPARSE:
            in_use = decided
        if kind == DECIDING:
            decided = step
        found.append(step if kind == DECIDING else in_use)
    return found


def _computed(plan: Sequence[int], shares: Mapping[str, torch.Tensor]) -> float:
    sparse = torch.tensor([kind == SPARSE for kind in plan], device="cpu")
    return _mean([float(torch.where(sparse, share, 1.0).mean()) for share in shares.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
