"""`Runs` and `Passes`: the generations of a calibration, and what is measured in each pass over them."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lite_attention.calibration.autosave import read
from lite_attention.calibration.measurement import now
from lite_attention.calibration.probe import AttentionProbe
from lite_attention.calibration.recorder import QUERIES, Recorder
from lite_attention.parallel.agreement import texts_of_all, told_of_errors

__all__ = ["Passes", "Runs"]

_Kind = TypeVar("_Kind", bound=Recorder)

_SCOUTED = 4  # of the queries of a pass, the first one measures a so many-th


class Runs:
    """Runs generations, and keeps what they return and the time they take."""

    def __init__(self, generate: Callable[[int], Any]) -> None:
        self.generate = generate
        self.seconds: dict[str, float] = defaultdict(float)
        self.generations: Counter[str] = Counter()
        self.samples: dict[str, list[Any]] = {}

    def __call__(self, probe: AttentionProbe, kind: str, numbers: Sequence[int]) -> None:
        """Run one generation for each number; the samples of a kind are those of its latest run."""
        self.samples[kind] = []
        for i in numbers:
            probe.start_fresh()
            start = now()
            with torch.no_grad(), told_of_errors(probe.shard):
                self.samples[kind].append(self.generate(i))
            self.seconds[kind] += now() - start
            self.generations[kind] += 1


class Passes:
    """Runs passes over the dense trajectories of all prompts, or what is left of them after an interrupt.

    Args:
        model_or_pipe: as for `calibrate`, as is autosave.
        runs: what runs the generations.
        prompts: numbers of them.
        options: of every pass.
    """

    def __init__(
        self,
        model_or_pipe: Any,
        runs: Runs,
        prompts: Sequence[int],
        autosave: str | Path | None,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._runs, self._prompts = model_or_pipe, runs, prompts
        self._autosave, self._options = autosave, options
        self.measuring = 0.0  # seconds, of all passes

    def __call__(self, kind: Callable[..., _Kind], number: int, **rule: Any) -> _Kind:
        """Run the pass of a number; the first one, 0, only finds what the others aim at, and measures less."""
        file = self._autosave
        if file is not None:
            file = Path(f"{file}.{number}" if number else file)
        queries = QUERIES if number else QUERIES // _SCOUTED
        recorder = kind(self._model, autosave=file, queries=queries, **rule, **self._options)
        with recorder:
            if file is not None and _may_resume(recorder, file):
                recorder.resume(file)
            self._runs(recorder, "calibration", self._prompts)
        self.measuring += recorder.seconds
        if not recorder.curves:
            raise ValueError(
                "generate: expected calls of skip-aware attention, got none; lite_attention.report(model) tells, after "
                "enable(model, compile=False) and a call, what is left alone and why"
            )
        return recorder


def _may_resume(recorder: Recorder, file: Path) -> bool:
    """Return whether there is a file, and those of all ranks are of the same calls."""
    measured = read(file)["measured"] if file.exists() else {}
    saved = texts_of_all(recorder.shard, repr(sorted(measured.items())))
    if len(set(saved)) > 1:
        warnings.warn(f"lite_attention: autosave: {file} and those of other ranks differ: begun anew", stacklevel=7)
    return bool(measured) and len(set(saved)) == 1
