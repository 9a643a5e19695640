"""Finding thresholds from what leaving tiles out really costs.

probe.py            catches the op's calls while a model runs eagerly
tile_statistics.py  one pass over a call: what every candidate threshold leaves out, and the error that it makes
error_report.py     curves of error over tiles left out, and their report
measurement.py      curves of the calls of a model
recorder.py         curves on the dense trajectory, and thresholds out of them
bounded.py          `Calibration`, whose thresholds keep under a bound
verification.py     `Verification` on the sparse one
autosave.py         the file that an interrupted calibration goes on from
passes.py           the generations of a calibration, and passes over them
targets.py          from a target to thresholds: a bound for each head, or a price for the whole
search.py           `calibrate`: all of it, and what the thresholds reach
residual.py         `calibrate_residual`: from a target to shares to keep
"""

from lite_attention.calibration.bounded import Calibration
from lite_attention.calibration.recorder import THRESHOLDS
from lite_attention.calibration.residual import ResidualCalibration, calibrate_residual
from lite_attention.calibration.search import CalibrationResult, calibrate
from lite_attention.calibration.verification import Verification

__all__ = [
    "THRESHOLDS",
    "Calibration",
    "CalibrationResult",
    "ResidualCalibration",
    "Verification",
    "calibrate",
    "calibrate_residual",
]
