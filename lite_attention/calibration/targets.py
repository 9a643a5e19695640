"""`Target`: what thresholds aim at, and the passes that get there: by a bound for each head, or by one price."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from lite_attention.calibration.bounded import Calibration
from lite_attention.calibration.error_report import Curve
from lite_attention.calibration.measurement import check_target, is_number
from lite_attention.calibration.passes import Passes
from lite_attention.calibration.probe import Place
from lite_attention.calibration.recorder import Choose, Recorder

__all__ = ["Target", "price_for"]

_log = logging.getLogger("lite_attention")


@dataclass(frozen=True)
class Target:
    """An error that is a bound for each head, or with `budget` the mean of the whole; or a sparsity of the whole."""

    target_error: float | None
    target_sparsity: float | None
    budget: bool

    @classmethod
    def of(cls, error: Any, sparsity: Any, budget: bool, metric: str) -> Target:
        """Return one as a user gives it.

        Raises:
            ValueError: both or neither, or a number out of range.
        """
        if (error is None) == (sparsity is None):
            raise ValueError(f"target_error, target_sparsity: expected one of them, got {error} and {sparsity}")
        if sparsity is not None and not (is_number(sparsity) and 0 <= sparsity < 1):
            raise ValueError(f"target_sparsity: expected a number from 0 to below 1, got {sparsity!r}")
        check_target(0 if error is None else error, metric)
        return cls(_float(error), _float(sparsity), budget)

    def search(self, record: Passes, passes: int) -> Recorder:
        """Return the best of at most so many passes after the first."""
        if self.target_sparsity is not None:
            return _spread(record, "sparsity", self.target_sparsity, passes)
        assert self.target_error is not None
        if self.budget:
            return _spread(record, "error", self.target_error, passes)
        return _bounded(record, self.target_error, passes)


def _float(number: Any) -> float | None:
    return None if number is None else float(number)  # numpy's are no numbers to a file


def _bounded(record: Passes, target_error: float, passes: int) -> Calibration:
    """Return the pass with the fewest misses of the bound, and of those the one that leaves out most."""
    found, tried = record(Calibration, 0, target_error=target_error), []
    for number in range(1, passes + 1):
        found = record(Calibration, number, target_error=target_error, limits=found.limits_after())
        tried.append(found)
        if not found.report["missed"]:
            break
    return min(tried, key=lambda found: (found.report["missed"], -found.report["sparsity"]))


def _spread(record: Passes, name: str, target: float, passes: int) -> Recorder:
    """Return the pass whose "error" or "sparsity" came nearest to a target of the whole."""
    curves = record(Recorder, 0, choose=_at(0.0, name), rule=f"least loss, {name}", lasting=True).curves
    aim, tried = target, []
    for number in range(1, passes + 1):
        price = price_for(curves, name, aim)
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


def price_for(curves: Mapping[Place, Curve], name: str, target: float) -> float:
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
