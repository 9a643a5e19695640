"""What surrounds a call: derivatives, and `torch.vmap` over a state, are refused by name; autocast stays outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from lite_attention.ops.torch_internals import below_autograd, excluding_key, in_forward_mode, op_name

__all__ = ["refuse_vmap", "without_autocast", "without_derivatives"]


def without_derivatives(op: Any, inputs: tuple[str, ...]) -> Callable[..., Any]:
    """Return the Autograd kernel of an op whose first arguments, `inputs`, must not ask for a derivative."""
    name, count, either = op_name(op), len(inputs), " or ".join(inputs)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in args[:count]):
            raise RuntimeError(
                f"{name} has no backward, and {either} requires a gradient: "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        if in_forward_mode() and any(forward_ad.unpack_dual(x).tangent is not None for x in args[:count]):
            raise RuntimeError(
                f"{name} has no forward-mode derivative, and {either} has a tangent: "
                "torch.func.jvp, jacfwd and the like cannot go through it"
            )
        with below_autograd():
            return op(*args, **kwargs)

    return kernel


def refuse_vmap(op: Any) -> Callable[..., Any]:
    """Return the vmap kernel of an op with a state."""
    name = op_name(op)

    def kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot run under torch.vmap: calls that share a state come one after the other; "
            "make the mapped dimension part of the batch, or use lite_attention.attention, which has no state"
        )

    return kernel


def without_autocast(op: Any, key: str) -> Callable[..., Any]:
    """Return the kernel of an autocast key: the op computes in the dtype that it is given, as outside.

    Otherwise the matmuls of the CPU kernels would be cast, the accumulation too.
    """
    excluded = excluding_key(key)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with excluded():
            return op(*args, **kwargs)

    return kernel
