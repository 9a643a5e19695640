"""`Patch`: what the node puts on a model, three wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .options import NodeOptions
from .reserve import conditionings_of, reserved
from .run import FORWARD, Run, attention_override

__all__ = ["KEY", "Patch"]

KEY = "lite_attention"  # of the wrappers


class Patch:
    """Runs a model's sampling and forwards with memories.

    The override of attention is put on in each forward. So it lies above one that a later node sets, and calls that one
    where it does not apply.

    Args:
        options: of the node.
    """

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._run: Run | None = None

    def put_on(self, model: Any) -> Any:
        """Return a clone of a `ModelPatcher` that is patched; what an earlier node of the kind put on goes."""
        from comfy.patcher_extension import WrappersMP

        clone = model.clone()
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self._sample),
            (WrappersMP.PREPARE_SAMPLING, self._prepare),
            (WrappersMP.APPLY_MODEL, self._apply_model),
        ):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def _sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrap a sampling run: it begins fresh, and nothing is kept behind it."""
        outer, self._run = self._run, Run(self._options, conditionings_of(getattr(executor, "class_obj", None)))
        try:
            result = executor(*args, **kwargs)
            self._run.finish()
            return result
        finally:
            self._run = outer

    def _prepare(self, executor: Callable[..., Any], model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap what loads the models for a sampling run."""
        if self._run is None:
            return executor(model, noise_shape, *args, **kwargs)
        with reserved(model, noise_shape, self._options, self._run.conditionings):
            return executor(model, noise_shape, *args, **kwargs)

    def _apply_model(
        self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Wrap a forward of the model."""
        told = transformer_options or {}
        run = self._run if FORWARD not in told else None
        forward = None if run is None else run.forward(told, executor.class_obj.model_sampling)
        if forward is not None:
            told = {**told, FORWARD: forward, "optimized_attention_override": _uncompiled_override()}
        return executor(x, t, c_concat, c_crossattn, control, told, **kwargs)


@functools.cache
def _uncompiled_override() -> Callable[..., Any]:
    """Return the override, one for all: a compiled model would be compiled again for another one."""
    return torch.compiler.disable(attention_override)  # type: ignore[no-any-return]
