"""What single arguments of users must be. Every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch

__all__ = [
    "check_choice",
    "check_count",
    "check_has_values",
    "check_step",
    "check_switch",
    "check_time",
    "require",
    "threshold_values",
]

_LARGEST = 2**31 - 1  # of what the device holds in 32 bits


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise a ValueError that names the argument, what was expected and what came, unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Check that an argument is one of some.

    Raises:
        ValueError: it is none of them.
    """
    choices = tuple(choices)  # what cannot be a key is none either
    require(value in choices, name, " or ".join(map(repr, choices)), repr(value))


def check_count(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Return an argument that counts something as an int; integers of numpy and torch will do.

    Raises:
        ValueError: no integer (a bool is none), below `least`, or above `most`, at most what 32 bits hold.
    """
    expected = f"at least {least}" if most is None else f"{least} to {most}"
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer, {expected}, got {value!r}")
    require(least <= count <= (_LARGEST if most is None else most), name, expected, count)
    return count


def check_step(step: object) -> int:
    """Return a denoising step as an int.

    Raises:
        ValueError: no integer from 0 to 2**31 - 1.
    """
    return check_count("step", step, least=0, most=_LARGEST)


def check_time(time: object) -> float:
    """Return a time of the flow as a float.

    Raises:
        ValueError: no finite number.
    """
    expected = "a finite number"
    try:
        value = math.nan if isinstance(time, (bool, str)) else float(time)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    require(math.isfinite(value), "time", expected, repr(time))
    return value


def check_switch(name: str, value: object) -> None:
    """Check an argument that turns something on or off.

    Raises:
        ValueError: neither True nor False.
    """
    require(isinstance(value, bool), name, "True or False", repr(value))


def check_has_values(name: str, value: object) -> None:
    """Check that an argument is a tensor with values to read.

    Raises:
        ValueError: no tensor, or one on the meta device.
    """
    expected = "a tensor with values"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    require(not value.is_meta, name, expected, "one on the meta device")


def threshold_values(name: str, threshold: float | torch.Tensor) -> torch.Tensor:
    """Return a threshold as a float32 tensor without a gradient; numbers on the CPU, a tensor where it is.

    Raises:
        ValueError: neither a number nor a tensor of numbers with values.
    """
    expected = "a number or a tensor"
    if isinstance(threshold, torch.Tensor):
        is_real = threshold.dtype != torch.bool and not threshold.is_complex()
        require(is_real, f"dtype of {name}", "a real one", threshold.dtype)
        check_has_values(name, threshold)
        return threshold.detach().to(torch.float32)
    require(not isinstance(threshold, bool), name, expected, threshold)
    try:
        # On the CPU even under torch.device("meta").
        return torch.as_tensor(threshold, dtype=torch.float32, device="cpu")
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of floats, got one beyond it") from None
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected {expected}, got {type(threshold).__name__}") from None
