"""The file that a calibration goes on from after an interrupt: what it is of, and one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lite_attention.files import write_whole
from lite_attention.model_sites import parts_of

__all__ = ["claimed", "differing", "fingerprint", "read", "sampled", "write"]

_PARTS = ("options", "curves", "measured", "masks", "votes", "slots", "kinds", "traces")


def sampled(tensor: torch.Tensor, most: int = 3) -> torch.Tensor:
    """Return some values of a tensor, evenly spread: float32 on the CPU, at most so many of each dimension."""
    some = tensor.detach()[tuple(slice(None, None, -(-size // most) or 1) for size in tensor.shape)]
    return some.float().cpu().flatten()


def fingerprint(model_or_pipe: Any) -> str:
    """Return a hash of the parameters: names, shapes, dtypes, and some of the values where they are in memory."""
    digest = hashlib.sha256()
    for part, model in parts_of(model_or_pipe).items():
        for name, parameter in model.named_parameters():
            digest.update(repr((part, name, tuple(parameter.shape), parameter.dtype)).encode())
            # Offloaded ones are on the meta device, and those of quantization libraries may know no slices.
            with contextlib.suppress(RuntimeError, TypeError):
                digest.update(sampled(parameter).numpy().tobytes())
    return digest.hexdigest()[:16]


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a file that replaces one that is there when it is complete."""
    write_whole(path, lambda file: torch.save(dict(content), file))


def read(path: str | Path) -> dict[str, Any]:
    """Return what `write` wrote.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # the readers of archives and pickles have one for each way to be wrong
        raise ValueError(f"{path}: expected the autosave of a calibration, got a file that is none: {error}") from error
    missing = [part for part in _PARTS if part not in content] if isinstance(content, dict) else list(_PARTS)
    if missing:
        raise ValueError(f"{path}: expected the autosave of a calibration, got a file without {', '.join(missing)}")
    return content


def differing(expected: Mapping[str, Any], got: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return in what two calibrations differ: options as expected, and as they are."""
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    return {name: expected.get(name) for name in names}, {name: got.get(name) for name in names}


def _only(options: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return those options of a saved calibration that another one has too."""
    saved = read(path)["options"]
    return {name: saved.get(name) for name in options}


@contextlib.contextmanager
def claimed(path: str | Path, options: Mapping[str, Any]) -> Iterator[Path]:
    """Give the file that a calibration goes on from and writes, which no other process takes meanwhile.

    That is the one named, or, where this is another calibration's, one beside it, named by the options too. So neither
    is taken for the other's, and nothing is lost.

    Args:
        path: as the user gave it.
        options: of the calibration.

    Raises:
        ValueError: there is no such folder, the file is no autosave, or another process runs the same calibration.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"autosave: expected a path in a folder that exists, got {path}")
    named = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]
    for file in (path, path.with_name(f"{path.stem}-{named}{path.suffix}")):
        lock = FileLock(f"{file}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            why = "is written by another process"
            continue
        try:
            expected, got = differing(options, _only(options, file)) if file.exists() else ({}, {})
            if not expected:
                if file != path:
                    warnings.warn(f"lite_attention: autosave: {path} {why}; this one goes to {file}", stacklevel=5)
                yield file
                return
            why = f"is of another calibration, with {got} in place of {expected}"
        finally:
            lock.release()
    raise ValueError(f"autosave: expected a file that no other process writes, got {path}, which {why}")
