"""`Calibration`: the most aggressive thresholds whose error stays under a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.calibration.error_report import Curve
from lite_attention.calibration.measurement import check_target
from lite_attention.calibration.probe import Place
from lite_attention.calibration.recorder import Recorder, RecorderOptions
from lite_attention.ops.option_names import takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HEADROOM", "Calibration"]

HEADROOM = 0.9  # of the bound: the rest is for what changes while tiles stay out


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
        TypeError: a setting that is none.
        ValueError: an argument out of range.
        FloatingPointError: while generating: attention gives NaN or infinity; names site, slot and step.
    """

    @takes_options(*RecorderOptions.__annotations__)
    def __init__(
        self,
        model_or_pipe: Any,
        *,
        target_error: float,
        limits: Mapping[tuple[str, int], torch.Tensor] | None = None,
        metric: str = "L1",
        num_steps: int | None = None,
        **options: Unpack[RecorderOptions],
    ) -> None:
        check_target(target_error, metric)
        self._limits = dict(limits or {})

        def choose(place: Place, curve: Curve) -> torch.Tensor:
            fits = curve.errors <= self._limits.get(place[:2], HEADROOM * target_error)
            highest = (fits * torch.arange(len(fits), device="cpu").unsqueeze(-1)).amax(0)
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
