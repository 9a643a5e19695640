"""What all launches share: whether there is a kernel, layouts that it reads, and the device that it runs on."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from lite_attention.cute_kernels.cache import Kernel, has_compiler, library
from lite_attention.cute_kernels.config import RESIDUAL_DTYPES, KernelConfig
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.targets import DTYPE_NAMES, TARGETS, Target, target_of

__all__ = [
    "check_supported",
    "parts",
    "processors",
    "readable",
    "reads",
    "run",
    "run_in_parts",
    "say_once",
    "unsupported_reason",
]

_log = logging.getLogger("lite_attention")

_MOST_ROW_STRIDE = 2**30  # of [B, S, ...], 2 bytes each: the portable kernel counts bytes in 32 bits
_MOST_BLOCKS = 65535  # that CUDA launches in y, where some kernels have their batch elements


@functools.cache
def unsupported_reason(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str | None = None,
    *,
    quantization: str = "none",
    residual: str = "",
    **variant: bool,
) -> str | None:
    """Return why no kernel runs such a call, or None if one does.

    Args:
        head_dim: of queries and keys.
        value_dim: of values.
        dtype: of all three.
        device: a CUDA device; its capability is read.
        implementation: None = the device's own, "portable" = the portable one.
        quantization: as for the op.
        residual: what residuals are stored in; "" = the method has none.
        variant: the other fields of `KernelConfig` that are on.
    """
    if torch.version.hip is not None:  # which calls its devices cuda, and has capabilities of its own
        return f"there are kernels for GPUs of NVIDIA, got ROCm {torch.version.hip}"
    target = target_of(device, implementation)
    capability = torch.cuda.get_device_capability(device)
    if capability not in target.capabilities:
        served = ", ".join(sorted({f"{x[0]}.{x[1]}" for t in TARGETS.values() for x in t.capabilities}, key=float))
        return f"there are kernels for compute capability {served}, got {capability[0]}.{capability[1]}"
    reason = target.unsupported_reason(head_dim, value_dim, dtype)
    if reason is not None:
        return reason
    if residual and residual not in RESIDUAL_DTYPES:
        return f"the {target.title} kernel stores residuals in {' or '.join(RESIDUAL_DTYPES)}, got {residual}"
    try:
        tiles = target.tile_shape(head_dim, quantization)
        options: dict[str, Any] = {"quantization": check_quantization(quantization), "residual": residual, **variant}
        config = KernelConfig(DTYPE_NAMES[dtype], head_dim, *tiles, target=target, **options)
    except ValueError as error:  # no such head dim for the quantization, or a variant that does not fit the GPU
        return str(error)
    return _not_to_be_had(config)


def _not_to_be_had(config: KernelConfig) -> str | None:
    """Return why a kernel can neither be found nor compiled, or None if it can."""
    ahead = library()
    if has_compiler() or (ahead is not None and ahead.implements_function(config.name)):
        return None
    driver = "cu13" if (torch.version.cuda or "13").startswith("13") else "cu12"
    besides = "" if ahead is None else f", and the library of kernels has no {config.name}"
    return f"the CuTe DSL is not installed{besides}: pip install 'lite-attention[{driver}]'"


def check_supported(
    op: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    implementation: str | None = None,
    **variant: Any,
) -> None:
    """Check that a kernel runs such a call of an op; arguments are those of `unsupported_reason`.

    Raises:
        RuntimeError: none does, with what was found and what is needed.
    """
    reason = unsupported_reason(head_dim, value_dim, dtype, device, implementation, **variant)
    if reason is not None:
        raise RuntimeError(f"lite_attention::{op}: {reason}")


def reads(strides: tuple[int, ...]) -> bool:
    """Return whether kernels can read a tensor as it lies, 16 bytes at a time, if its address is one of 16 bytes."""
    *outer, inner = strides
    if inner != 1 or not all(stride > 0 and stride % 8 == 0 for stride in outer):  # 8 elements of 2 bytes
        return False
    return outer[1] < _MOST_ROW_STRIDE


def readable(x: torch.Tensor, as_it_lies: bool) -> torch.Tensor:
    """Return a tensor, or a copy that kernels can read."""
    return x if as_it_lies and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def run(kernel: Kernel, device: torch.device, *arguments: object) -> None:
    """Launch a kernel on torch's current stream of a device."""
    if device.index == torch.cuda.current_device():
        kernel(*arguments)
    else:
        with torch.cuda.device(device):
            kernel(*arguments)


def run_in_parts(kernel: Kernel, x: torch.Tensor, *others: object) -> None:
    """Launch a kernel that quantizes, for as many batch elements at a time as one launch can have.

    Args:
        kernel: what to launch.
        x: its first argument.
        others: of these, tensors of as many batch elements are cut as x is; all else is given to each launch.
    """
    for part in parts(len(x)):
        run(kernel, x.device, *(_cut(argument, len(x), part) for argument in (x, *others)))


def parts(batch: int) -> list[slice]:
    """Return the batch elements of each launch."""
    return [slice(start, min(start + _MOST_BLOCKS, batch)) for start in range(0, batch, _MOST_BLOCKS)]


def _cut(argument: object, batch: int, part: slice) -> object:
    whole = not isinstance(argument, torch.Tensor) or len(argument) != batch or part == slice(0, batch)
    return argument if whole else argument[part]  # type: ignore[index]


@functools.cache
def say_once(target: Target) -> None:
    """Log what users of a target should know."""
    if target.notice:
        _log.warning("%s (%s): %s", target.title, target.name, target.notice)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: as many CTAs run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count
