"""LiteAttention: attention for diffusion transformers that skips the tiles which do not matter.

lite_attention.enable(pipe, threshold=-6.0)                   # a diffusers pipeline
torch.compile(model, backend=lite_attention.liteattn_backend) # any model
attn = lite_attention.LiteAttention(threshold=-6.0)           # by hand, one module per layer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite_attention import masks, schedules
from lite_attention._version import __version__
from lite_attention.api import branch, disable, enable, reset
from lite_attention.inspection import Report, SparsityLog, report
from lite_attention.module import LiteAttention
from lite_attention.ops import ResidualState, SkipState, attention, residual_attention, skip_attention, step_plan
from lite_attention.ops.lazy_names import on_first_use
from lite_attention.registry import LiteAttentionRegistry, ThresholdTable
from lite_attention.setting import set_keep, set_threshold

if TYPE_CHECKING:
    from lite_attention.calibration import Calibration, calibrate, calibrate_residual
    from lite_attention.compile import LiteAttentionBackend, liteattn_backend, make_skip_aware

__all__ = [
    "Calibration",
    "LiteAttention",
    "LiteAttentionBackend",
    "LiteAttentionRegistry",
    "Report",
    "ResidualState",
    "SkipState",
    "SparsityLog",
    "ThresholdTable",
    "__version__",
    "attention",
    "branch",
    "calibrate",
    "calibrate_residual",
    "disable",
    "enable",
    "liteattn_backend",
    "make_skip_aware",
    "masks",
    "report",
    "reset",
    "residual_attention",
    "schedules",
    "set_keep",
    "set_threshold",
    "skip_attention",
    "step_plan",
]

# torch.compile's machinery takes a second to import, and eager users never need it; few calibrate.
_LAZY = {
    "Calibration": "lite_attention.calibration",
    "LiteAttentionBackend": "lite_attention.compile",
    "calibrate": "lite_attention.calibration",
    "calibrate_residual": "lite_attention.calibration",
    "liteattn_backend": "lite_attention.compile",
    "make_skip_aware": "lite_attention.compile",
}

__getattr__, __dir__ = on_first_use(__name__, _LAZY)
