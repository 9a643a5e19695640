"""`Verification`: what given thresholds do on the sparse trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.calibration.error_report import Curve
from lite_attention.calibration.measurement import Measurement
from lite_attention.calibration.probe import CaughtCall, EnableOptions, Output
from lite_attention.calibration.tile_statistics import error_of, error_parts, loss_of
from lite_attention.ops.option_names import takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Verification"]


class Verification(Measurement):
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
        TypeError: a setting that is none.
        ValueError: while generating: a site is not in the table.
        FloatingPointError: likewise: attention gives NaN or infinity.
    """

    @takes_options(*EnableOptions.__annotations__)
    def __init__(
        self,
        model_or_pipe: Any,
        table: Mapping[str, torch.Tensor],
        *,
        metric: str = "L1",
        bound: float | None = None,
        num_steps: int | None = None,
        **settings: Unpack[EnableOptions],
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
        out, lse = call.run(call.sharing.own_heads(threshold).contiguous())
        precise = torch.promote_types(out.dtype, torch.float32)
        parts = error_parts(self.metric, *(x.transpose(1, 2).to(precise) for x in (out, dense))).sum(1)
        left_out = call.skipped.sum((0, 2, 3), dtype=torch.float64)
        counts = torch.full_like(left_out, call.skipped[:, 0].numel())
        sums = torch.cat([parts, left_out.unsqueeze(0), counts.unsqueeze(0)]).cpu()
        parts, left_out, counts = self._of_all(call, dense, *sums.split([4, 1, 1]))
        tiles = float(counts[0, 0])
        curve = Curve(error_of(self.metric, parts).unsqueeze(0), loss_of(parts).unsqueeze(0), left_out, tiles)
        self.curves[call.place] = self._merged(call, curve)
        return out, lse
