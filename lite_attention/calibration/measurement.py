"""What is measured of the calls of a model: curves by site, branch and step, and their report."""

from __future__ import annotations

import math
import time
from numbers import Real
from typing import Any

import torch

from lite_attention.calibration.error_report import Curve, ErrorReport, ErrorRow
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, EnableOptions, Place
from lite_attention.calibration.tile_statistics import METRICS

__all__ = ["Measurement", "check_target", "is_number", "now"]


def is_number(value: Any) -> bool:
    """Return whether a value is a real number, one of numpy's too; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_target(target_error: Any, metric: Any) -> None:
    """Raise ValueError where an error is not a number of at least 0, or the metric is none of METRICS."""
    if not is_number(target_error) or not target_error >= 0:
        raise ValueError(f"target_error: expected a number of at least 0, got {target_error!r}")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")


def now() -> float:
    """Return the time in seconds, when the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Measurement(AttentionProbe):
    """Curves of the calls of a model, and their report."""

    def __init__(
        self, model_or_pipe: Any, metric: str, bound: float | None, num_steps: int | None, settings: EnableOptions
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
        self.metric, self.bound = metric, None if bound is None else float(bound)
        self.num_steps = None if num_steps is None else int(num_steps)
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

    def _of_all(self, call: CaughtCall, dense: torch.Tensor, *sums: torch.Tensor) -> list[torch.Tensor]:
        """Return sums [n, heads here], float64, as all ranks have them together; of heads alone here, as they are.

        Raises:
            FloatingPointError: a dense output [B, Sq, Hq, Dv] is not finite, on any rank.
        """
        if not call.sharing.is_shared:
            self._check_finite(call, dense)
            return [*sums]
        is_off = ~dense.isfinite().all(-1).all(1).all(0, keepdim=True)
        parts = torch.cat([*(of_heads.to(dense.device) for of_heads in sums), is_off])
        of_all: list[torch.Tensor]
        *of_all, is_off = call.sharing.of_all(parts).cpu().split([*map(len, sums), 1])
        if bool(is_off.any()):
            heads = is_off[0].nonzero().flatten().tolist()
            raise FloatingPointError(f"{call.where}: attention gives NaN or infinity, where heads {heads} are")
        return of_all

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
        return torch.zeros(curve.errors.shape[1], dtype=torch.int64, device="cpu")
