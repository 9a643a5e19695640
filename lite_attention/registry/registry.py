"""Thresholds of a whole model: one for all, from a file, or from a calibration that writes one."""

from __future__ import annotations

import datetime
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lite_attention._version import __version__
from lite_attention.module import LiteAttention
from lite_attention.ops import DEFAULT_THRESHOLD
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.registry.threshold_file import ThresholdTable
from lite_attention.registry.threshold_fit import (
    at_steps,
    branches_of,
    class_name,
    differences_of,
    mapped,
    models_of,
    num_steps_of,
    sites_of,
)
from lite_attention.wiring import set_threshold

if TYPE_CHECKING:
    from lite_attention.calibration import Calibration

__all__ = ["LiteAttentionRegistry"]

_MODES = ("const", "load", "calib", "disable")
_CALIB_CONFIG = {"target_error": 0.01, "metric": "L1"}


class LiteAttentionRegistry:
    """Sets the thresholds of all attention sites of a model; made by `from_model`.

    Attributes:
        model: the model or pipeline.
        mode: what it does: "const", "load", "calib" or "disable".
        filename: of the threshold file; may be changed before `save_if_calib`.
        table: what was loaded or calibrated; None in other modes, and before the calibration is done.
    """

    def __init__(self, model: Any, mode: str, filename: str | Path | None) -> None:
        self.model, self.mode = model, mode
        self.filename = None if filename is None else Path(filename)
        self.table: ThresholdTable | None = None
        self._calibration: Calibration | None = None
        self._disabled_steps: Sequence[int] = ()
        self._config: Mapping[str, Any] = _CALIB_CONFIG
        self._force = False

    @classmethod
    def from_model(
        cls,
        model: Any,
        mode: str = "const",
        threshold: float | torch.Tensor | None = None,
        filename: str | Path | None = None,
        calib_config: Mapping[str, Any] | None = None,
        disabled_steps: int | Sequence[int] | None = None,
        force: bool = False,
        *,
        strict: bool = True,
    ) -> LiteAttentionRegistry:
        """Set the thresholds of a model that holds `LiteAttention` modules or whose attention was swapped.

        A swapped model shows its sites with its first call. If there was none yet, a file's sites are looked up as
        they turn up; call `check()` after the first step to see whether the rest fits too.

        Args:
            model: as for `report`: a model or pipeline.
            mode: "const" sets one threshold for all. "load" takes them from a file. "calib" begins a calibration, which
                `save_if_calib` ends and writes to `filename`, and until then skips nothing; if the file exists and
                `force` is not set, it is loaded instead, so that a script calibrates when run first and uses the result
                from then on. "disable" computes everything; the other modes turn skipping on again.
            threshold: of mode "const": log2 units, a number or a tensor that broadcasts to (slots, steps, heads);
                None = -10.
            filename: of modes "load" and "calib".
            calib_config: of mode "calib": "target_error" (0.01) and "metric" ("L1", "Cossim" or "RMSE").
            disabled_steps: steps that vote nothing out (threshold -inf), as a list, or a number of them from the
                start. The first ones, and the one after them, are then dense; a later one skips what was voted out
                before it.
            force: of mode "calib": calibrate, and overwrite the file, even if it exists.
            strict: of mode "load": False takes what can be taken of a file that does not fit, and warns: sites by name,
                steps by their relative position (the lowest of all for a state without steps), heads if their
                thresholds are equal. Other sites skip nothing.

        Raises:
            ValueError: an argument out of range or missing; a file that is not one, or does not fit the model, with all
                that differs. Nothing is changed then.
            OSError: the file cannot be read.
        """
        _check_arguments(mode, threshold, filename, calib_config)
        if mode == "calib" and Path(str(filename)).exists() and not force:
            mode = "load"
        self = cls(model, mode, filename)
        self._force = force
        self._disabled_steps = _steps(disabled_steps)
        if mode == "const":
            value = torch.as_tensor(DEFAULT_THRESHOLD if threshold is None else threshold, dtype=torch.float32)
            value = value.reshape((1,) * (3 - value.dim()) + value.shape)
            self._apply(self._with_disabled_steps(value, num_steps_of(model)))
        elif mode == "disable":
            self._apply(-math.inf, dense=True)  # -inf for states that are born later
        elif mode == "load":
            self._load(Path(str(filename)), strict)
        else:
            from lite_attention.calibration import Calibration

            _check_holds_steps(model)
            self._apply(-math.inf)
            config = {**_CALIB_CONFIG, **(calib_config or {})}
            self._calibration = Calibration(model, **config, num_steps=num_steps_of(model))
            self._config = config
        return self

    def save_if_calib(self) -> Path | None:
        """End a calibration after the generations it was to see: write its file, and use its thresholds from now on.

        Returns:
            The file's path; None if no calibration is under way, as in the other modes or when called again.

        Raises:
            ValueError: no whole generation was measured yet, or the file exists by now and `force` is not set. The
                calibration then goes on; `filename` may be changed.
        """
        if self._calibration is None or self.filename is None:
            return None
        thresholds = self._calibration.table()
        if not thresholds:
            raise ValueError("calibration: expected at least one generation before save_if_calib(), got none")
        num_steps, told = max(threshold.shape[1] for threshold in thresholds.values()), num_steps_of(self.model)
        if told not in (None, num_steps):
            raise ValueError(f"calibration: expected a generation of {told} steps, as the model has, got {num_steps}")
        thresholds = {name: self._with_disabled_steps(value, num_steps) for name, value in thresholds.items()}
        if self.filename.exists() and not self._force:
            raise ValueError(f"filename: expected one that does not exist, or force=True, got {self.filename}")
        table = _describe(self.model, thresholds, num_steps, self._config, self._calibration.report)
        table.save(self.filename)
        self._calibration.detach()
        self._calibration, self.table = None, table
        self._apply_table(thresholds, strict=True)
        return self.filename

    def check(self) -> None:
        """Hold the file against the sites that the model has shown by now.

        Raises:
            ValueError: it does not fit; lists all that differs.
        """
        differences = [] if self.table is None else differences_of(self.table, self.model, sites_of(self.model))
        if differences:
            raise ValueError(_does_not_fit(self.filename, differences))

    # ---- setting thresholds ----------------------------------------------------------------------------------------

    def _load(self, filename: Path, strict: bool) -> None:
        table, sites = ThresholdTable.load(filename), sites_of(self.model)
        differences = differences_of(table, self.model, sites)
        if differences and strict:
            raise ValueError(_does_not_fit(filename, differences))
        thresholds = dict(table.thresholds)
        if differences:
            warnings.warn(f"lite_attention: {_does_not_fit(filename, differences)}", stacklevel=3)
            thresholds |= {s.name: mapped(thresholds[s.name], s) for s in sites if s.name in thresholds}
        self._apply_table(thresholds, strict)
        self.table = table

    def _apply_table(self, thresholds: Mapping[str, torch.Tensor], strict: bool) -> None:
        def threshold_of(site: str) -> float | torch.Tensor:
            threshold = thresholds.get(site)
            if threshold is None:
                if strict:
                    raise ValueError(f"{self.filename}: expected thresholds for {site}, a site of the model, got none")
                return -math.inf
            num_steps, steps = num_steps_of(self.model), threshold.shape[1]
            if num_steps is not None and steps not in (1, num_steps):  # of a site that had not been called yet
                if strict:
                    raise ValueError(f"{self.filename}: expected {num_steps} steps, as the model has, got {steps}")
                threshold = at_steps(threshold, num_steps)
            return self._with_disabled_steps(threshold, num_steps)

        self._apply(threshold_of)

    def _apply(self, value: Any, dense: bool = False) -> None:
        set_threshold(self.model, value)
        _set_dense(self.model, dense)

    def _with_disabled_steps(self, threshold: torch.Tensor, num_steps: int | None) -> torch.Tensor:
        """Return (slots, steps, heads) with -inf at the disabled steps."""
        if not self._disabled_steps:
            return threshold
        slots, rows, heads = threshold.shape
        last = max(self._disabled_steps)
        # Past the end of a table its last row holds, so one row more will do where the number of steps is not known.
        steps = rows if rows > 1 else num_steps or last + 2
        if last >= steps:
            raise ValueError(f"disabled_steps: expected steps below {steps}, got {last}")
        threshold = threshold.expand(slots, steps, heads).clone()
        threshold[:, list(self._disabled_steps)] = -math.inf
        return threshold


def _does_not_fit(filename: Path | None, differences: list[str]) -> str:
    return "\n  ".join([f"{filename} does not fit the model:", *differences])


# ---- arguments -----------------------------------------------------------------------------------------------------


def _check_arguments(mode: str, threshold: object, filename: object, calib_config: Mapping[str, Any] | None) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {_MODES}, got {mode!r}")
    for name, value, modes in (
        ("threshold", threshold, ("const",)),
        ("filename", filename, ("load", "calib")),
        ("calib_config", calib_config, ("calib",)),
    ):
        if value is not None and mode not in modes:
            raise ValueError(f"{name}: expected None in mode {mode!r}, got {value!r}")
    if mode in ("load", "calib") and filename is None:
        raise ValueError(f"filename: expected a path in mode {mode!r}, got None")
    if mode == "calib" and not Path(str(filename)).absolute().parent.is_dir():  # told before the work, not after it
        raise ValueError(f"filename: expected a path in a folder that exists, got {filename}")
    config = {**_CALIB_CONFIG, **(calib_config or {})}
    if config.keys() != _CALIB_CONFIG.keys():
        raise ValueError(f"calib_config: expected the keys {list(_CALIB_CONFIG)}, got {list(config)}")
    if not isinstance(config["target_error"], (int, float)) or not config["target_error"] >= 0:
        raise ValueError(f"target_error: expected a number of at least 0, got {config['target_error']!r}")
    from lite_attention.calibration.tile_statistics import METRICS

    if config["metric"] not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {config['metric']!r}")


def _steps(disabled_steps: int | Sequence[int] | None) -> Sequence[int]:
    if disabled_steps is None:
        return ()
    steps = range(disabled_steps) if isinstance(disabled_steps, int) else sorted(disabled_steps)
    if (isinstance(disabled_steps, int) and disabled_steps < 0) or any(step < 0 for step in steps):
        raise ValueError(f"disabled_steps: expected a number of steps or a list, none below 0, got {disabled_steps}")
    return steps


# ---- the model ------------------------------------------------------------------------------------------------------


def _check_holds_steps(model_or_pipe: Any) -> None:
    """Raise ValueError if a state could not hold a threshold for each step."""
    for model in models_of(model_or_pipe).values():
        for name, module in model.named_modules():
            if isinstance(module, LiteAttention) and module.num_steps is None:
                raise ValueError(
                    f"model: expected num_steps in all LiteAttention modules to calibrate, got none in {name}"
                )


def _set_dense(model_or_pipe: Any, dense: bool) -> None:
    """Turn skipping off or on, in all states there are and in all `LiteAttention` modules for good."""
    from lite_attention.compile.store import records_of

    for model in models_of(model_or_pipe).values():
        for _, record in records_of(model):
            for state in record.states.values():
                state.set_flag(FLAG_DENSE, dense)
        for module in model.modules():
            if isinstance(module, LiteAttention):
                module.enable_skip_optimization(not dense)


def _model_name(model_or_pipe: Any) -> str:
    """Return the name that a model was loaded by, or a hash of its parameters' names and shapes."""
    names = []
    for model in models_of(model_or_pipe).values():
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
        names.append(getattr(getattr(model, "config", None), "_name_or_path", None) or f"parameters {digest}")
    return ", ".join(names)


def _describe(
    model: Any,
    thresholds: dict[str, torch.Tensor],
    num_steps: int,
    config: Mapping[str, Any],
    reached: Mapping[str, Any],
) -> ThresholdTable:
    """Return calibrated thresholds with all that is known of the model and the calibration."""
    sites = [site for site in sites_of(model) if site.name in thresholds]
    return ThresholdTable(
        thresholds,
        tile_shapes={site.name: site.tile_shape for site in sites if site.tile_shape},
        model_class=class_name(model),
        model=_model_name(model),
        dtype=", ".join(sorted({site.dtype for site in sites if site.dtype})) or None,
        tokens=max((state.capacity[2] for site in sites for state in site.states), default=None),
        num_steps=num_steps,
        branches=branches_of(model) or None,
        metric=config["metric"],
        target_error=config["target_error"],
        reached=dict(reached),
        library_version=__version__,
        date=datetime.date.today().isoformat(),
    )
