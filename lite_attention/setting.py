"""`set_threshold` and `set_keep`: what sites skip by, changed at any time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lite_attention.model_sites import set_values
from lite_attention.threshold_table import ThresholdTable, loaded

if TYPE_CHECKING:
    from lite_attention.ops.site import SiteKeep, SiteThreshold

__all__ = ["set_keep", "set_threshold"]


def set_threshold(model_or_pipe: Any, threshold: SiteThreshold | ThresholdTable | str | Path) -> None:
    """Set the thresholds of all attention sites, in place on the device: neither a recompile nor a new CUDA graph.

    States that are yet to come, such as those of another video length, begin with it too, until `enable` is called
    again. Where any of it does not fit, nothing is changed.

    Args:
        model_or_pipe: a model or pipeline given to `enable`, one compiled with our backend that has run once, or one
            that holds `LiteAttention`.
        threshold: log2 units, at most 0: a number, a tensor that broadcasts to (slots, steps, heads), see
            `lite_attention.schedules`, a callable that returns one of these for a `Site`, whose name is that which
            `report` prints, or a `ThresholdTable` or the path of its file, see `ThresholdTable.apply`.

    Raises:
        ValueError: no attention of ours in it; or a threshold above 0, NaN, or of a shape that does not fit a state: a
            schedule may be as long as `num_steps`, or, where that is unknown, `max_steps`. A table that does not fit.
        OSError: the file of a table cannot be read.
    """
    _set(model_or_pipe, "threshold", threshold)


def set_keep(model_or_pipe: Any, keep: SiteKeep | ThresholdTable | str | Path) -> None:
    """Set the share of tiles that sparse steps compute, as `set_threshold` does thresholds; for method "residual".

    Args:
        model_or_pipe: as for `set_threshold`.
        keep: above 0 and at most 1: a number, a tensor (steps,), past whose end the last holds, a callable that returns
            one of these for a `Site`, or a `ThresholdTable` of shares, or the path of its file.

    Raises:
        ValueError: no attention of ours in it, or some with method "votes"; a value that does not fit.
        OSError: the file of a table cannot be read.
    """
    _set(model_or_pipe, "keep", keep)


def _set(model_or_pipe: Any, name: Literal["threshold", "keep"], value: Any) -> None:
    value = loaded(name, value)
    if isinstance(value, ThresholdTable):
        value.apply(model_or_pipe)
    else:
        set_values(model_or_pipe, name, value)
