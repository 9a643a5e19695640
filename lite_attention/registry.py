"""`LiteAttentionRegistry`: how users of the CUDA project set the thresholds of a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from lite_attention.model_sites import methods_of, set_dense, sites_of
from lite_attention.ops import DEFAULT_THRESHOLD
from lite_attention.ops.arguments import require
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.validate import check_threshold
from lite_attention.parallel.agreement import first_writes, shard_of_all, texts_of_all
from lite_attention.setting import set_threshold
from lite_attention.threshold_table.content import is_a
from lite_attention.threshold_table.fit import fitted, num_steps_of
from lite_attention.threshold_table.table import ThresholdTable

if TYPE_CHECKING:
    from lite_attention.calibration import Calibration

__all__ = ["CalibrationConfig", "LiteAttentionRegistry", "ThresholdTable"]

_MODES = ("const", "load", "calib", "disable")
_CALIB_CONFIG = {"target_error": 0.01, "metric": "L1"}
_RESIDUAL_CONFIG = {"generate", "num_steps", "target_error", "metric", "prompts"}


class CalibrationConfig(TypedDict, total=False):
    """What `calib_config` may hold; without `generate` only the target error and its metric."""

    generate: Callable[[int], Any]
    num_steps: int
    target_error: float | None
    target_sparsity: float | None
    budget: bool
    metric: str
    prompts: Iterable[int]
    held_out: Iterable[int]
    passes: int
    thresholds: Sequence[float]
    stride: int | None
    autosave: str | Path | None
    progress: bool


class LiteAttentionRegistry:
    """Sets the thresholds of all attention sites of a model; made by `from_model`.

    The names are the CUDA project's. What it does are calls of `lite_attention.set_threshold`, `calibrate` and
    `ThresholdTable.apply`.

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
        self._force = False

    @classmethod
    @takes_options()
    def from_model(
        cls,
        model: Any,
        mode: str = "const",
        threshold: float | torch.Tensor | None = None,
        filename: str | Path | None = None,
        calib_config: CalibrationConfig | None = None,
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
            mode: "const" sets one threshold for all. "load" takes them from a file. "calib" calibrates and writes
                `filename`; if the file exists and `force` is not set, it is loaded instead, so that a script calibrates
                when run first and uses the result from then on. "disable" computes everything; the other modes turn
                skipping on again.
            threshold: of mode "const": log2 units, a number or a tensor that broadcasts to (slots, steps, heads);
                None = -10. A model with method "residual" has none.
            filename: of modes "load" and "calib".
            calib_config: of mode "calib": arguments of `lite_attention.calibrate`. With "generate", which runs a
                generation, the thresholds are found, saved and in use when this returns. Without it, what runs from now
                on until `save_if_calib` is measured, and skips nothing; the config may then hold "target_error" (0.01)
                and "metric" ("L1", "Cossim" or "RMSE"). A model with method "residual" needs "generate", and its shares
                to keep are found, see `calibrate_residual`.
            disabled_steps: steps that vote nothing out (threshold -inf), as a list, or a number of them from the
                start. The first ones, and the one after them, are then dense; a later one skips what was voted out
                before it.
            force: of mode "calib": calibrate, and overwrite the file, even if it exists.
            strict: of mode "load": False takes what can be taken of a file that does not fit, and warns of what it
                overrides, see `ThresholdTable.apply`.

        Raises:
            ValueError: an argument out of range or missing; a file that is not one, or does not fit the model, with all
                that differs. Nothing is changed then.
            OSError: the file cannot be read or written.
        """
        _check_arguments(mode, threshold, filename, calib_config)
        self = cls(model, mode, filename)
        if mode == "calib" and self._file_exists() and not force:
            mode = self.mode = "load"
        self._force = force
        self._disabled_steps = _steps(disabled_steps)
        if mode == "const" and threshold is None and any(methods_of(model)):
            set_dense(model, False)
        elif mode == "const":
            value = torch.as_tensor(DEFAULT_THRESHOLD if threshold is None else threshold, dtype=torch.float32)
            value = value.reshape((1,) * (3 - value.dim()) + value.shape)
            self._apply(_with_disabled(value, self._disabled_steps, num_steps_of(model)))
        elif mode == "disable":
            set_dense(model, True)
        elif mode == "load":
            self._use(ThresholdTable.load(str(filename)), strict)
        else:
            self._calibrate({**_CALIB_CONFIG, **(calib_config or {})})
        return self

    def _calibrate(self, config: dict[str, Any]) -> None:
        """Calibrate, or begin to."""
        from lite_attention import calibration
        from lite_attention.calibration.probe import check_can_be_probed

        check_can_be_probed(self.model)
        _check_holds_steps(self.model)
        told = num_steps_of(self.model)
        if any(methods_of(self.model)):
            unknown, known = sorted(config.keys() - _RESIDUAL_CONFIG), f"the keys {sorted(_RESIDUAL_CONFIG)}"
            require(not unknown, "calib_config", f"{known} with method='residual'", unknown)
            require("generate" in config, "calib_config", "\"generate\" with method='residual'", list(config))
            self._finish(calibration.calibrate_residual(self.model, **{"num_steps": told, **config}).table)
            return
        if "generate" not in config:
            self._apply(-math.inf)
            self._calibration = calibration.Calibration(self.model, **config, num_steps=told)
            return
        if config.get("target_sparsity") is not None:
            config["target_error"] = None
        self._finish(calibration.calibrate(self.model, **{"num_steps": told, **config}).table)

    def save_if_calib(self) -> Path | None:
        """End a calibration after the generations it was to see: write its file, and use its thresholds from now on.

        Returns:
            The file's path; None if no calibration is under way, as in the other modes or when called again.

        Raises:
            ValueError: no whole generation was measured yet, or the file exists by now and `force` is not set. The
                calibration then goes on; `filename` may be changed.
            OSError: the file cannot be written; likewise.
        """
        if self._calibration is None or self.filename is None:
            return None
        table = self._calibration.table()
        if not table:
            raise ValueError("calibration: expected at least one generation before save_if_calib(), got none")
        num_steps, told = max(threshold.shape[1] for threshold in table.values()), num_steps_of(self.model)
        if told not in (None, num_steps):
            raise ValueError(f"calibration: expected a generation of {told} steps, as the model has, got {num_steps}")
        if self._file_exists() and not self._force:
            raise ValueError(f"filename: expected one that does not exist, or force=True, got {self.filename}")
        self._finish(table)
        return self.filename

    def _finish(self, table: ThresholdTable) -> None:
        """Write a calibrated table, and use it."""
        disabled = self._disabled_steps
        table = replace(table, thresholds={site: _with_disabled(t, disabled, t.shape[1]) for site, t in table.items()})
        first_writes(shard_of_all(self.model), lambda: table.save(str(self.filename)))
        if self._calibration is not None:
            self._calibration.detach()
            self._calibration = None
        self._use(table, strict=True)

    def _file_exists(self) -> bool:
        """Return whether there is a file, by what the first of the ranks that share the model sees."""
        return texts_of_all(shard_of_all(self.model), str(Path(str(self.filename)).exists()))[0] == "True"

    def check(self) -> None:
        """Hold the file against the sites that the model has shown by now.

        Raises:
            ValueError: it does not fit; lists all that differs.
        """
        if self.table is not None:
            self.table.check(self.model)

    # ---- setting thresholds ----------------------------------------------------------------------------------------

    def _use(self, table: ThresholdTable, strict: bool) -> None:
        if table.name == "keep":
            require(
                not self._disabled_steps, "disabled_steps", "none with a file of shares to keep", self._disabled_steps
            )
            table.apply(self.model, strict=strict)
            set_dense(self.model, False)
            self.table = table
            return
        threshold_of = fitted(table, self.model, strict=strict)
        disabled, num_steps = self._disabled_steps, num_steps_of(self.model)
        self._apply(lambda site: _with_disabled(threshold_of(site), disabled, num_steps))
        self.table = table

    def _apply(self, value: Any) -> None:
        set_threshold(self.model, value)
        set_dense(self.model, False)


def _with_disabled(threshold: torch.Tensor, disabled: Sequence[int], num_steps: int | None) -> torch.Tensor:
    """Return (slots, steps, heads) with -inf at the disabled steps."""
    if not disabled:
        return threshold
    slots, rows, heads = threshold.shape
    last = max(disabled)
    # Past the end of a table its last row holds, so one row more will do where the number of steps is not known.
    steps = rows if rows > 1 else num_steps or last + 2
    if last >= steps:
        raise ValueError(f"disabled_steps: expected steps below {steps}, got {last}")
    threshold = threshold.expand(slots, steps, heads).clone()
    threshold[:, list(disabled)] = -math.inf
    return threshold


# ---- arguments -----------------------------------------------------------------------------------------------------


def _check_arguments(mode: str, threshold: Any, filename: object, calib_config: Any) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {_MODES}, got {mode!r}")
    for name, value, modes in (
        ("threshold", threshold, ("const",)),
        ("filename", filename, ("load", "calib")),
        ("calib_config", calib_config, ("calib",)),
    ):
        if value is not None and mode not in modes:
            raise ValueError(f"{name}: expected None in mode {mode!r}, got {value!r}")
    if threshold is not None:
        check_threshold(threshold, allow_positive=True)  # whether it may be above 0 is the model's to say
        if torch.as_tensor(threshold).dim() > 3:
            raise ValueError(f"threshold: expected at most (slots, steps, heads), got {tuple(threshold.shape)}")
    if mode in ("load", "calib") and filename is None:
        raise ValueError(f"filename: expected a path in mode {mode!r}, got None")
    if mode == "calib":
        if not Path(str(filename)).absolute().parent.is_dir():  # told before the work, not after it
            raise ValueError(f"filename: expected a path in a folder that exists, got {filename}")
        _check_config(calib_config)


def _check_config(calib_config: Any) -> None:
    from lite_attention.calibration.measurement import check_target

    if not isinstance(calib_config, (Mapping, type(None))):
        raise ValueError(f"calib_config: expected a dict or None, got {calib_config!r}")
    config = {**_CALIB_CONFIG, **(calib_config or {})}
    known = sorted(CalibrationConfig.__optional_keys__) if "generate" in config else list(_CALIB_CONFIG)
    if not config.keys() <= set(known):
        raise ValueError(f'calib_config: expected the keys {known}, and more with "generate", got {list(config)}')
    check_target(config["target_error"], config["metric"])


def _steps(disabled_steps: Any) -> Sequence[int]:
    if disabled_steps is None:
        return ()
    try:
        steps = list(range(disabled_steps)) if is_a(disabled_steps, int) else sorted(disabled_steps)
    except TypeError:
        steps = [-1]
    if (is_a(disabled_steps, int) and disabled_steps < 0) or not all(is_a(step, int) and step >= 0 for step in steps):
        raise ValueError(f"disabled_steps: expected a number of steps or a list, none below 0, got {disabled_steps!r}")
    return steps


# ---- the model ------------------------------------------------------------------------------------------------------


def _check_holds_steps(model_or_pipe: Any) -> None:
    """Raise ValueError if a state could not hold a threshold for each step."""
    for site in sites_of(model_or_pipe):
        if site.module is not None and site.num_steps is None:
            raise ValueError(
                f"model: expected num_steps in all LiteAttention modules to calibrate, got none in {site.name}"
            )
