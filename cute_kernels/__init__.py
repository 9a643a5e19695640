"""The Hopper kernels, in the CuTe Python DSL: the CUDA side of `lite_attention::skip_attention`.

Everything above this folder reaches it through two names: `unsupported_reason`, which the compile pass asks before it
swaps a site, and `skip_attention_forward`, which the op calls. Both are imported on first use.
"""

from __future__ import annotations

from typing import Any, NoReturn

if __name__ == "cute_kernels":
    raise ImportError("import lite_attention.cute_kernels, not cute_kernels: it must exist once")

__all__ = ["skip_attention_forward", "unsupported_reason"]

_NO_KERNEL = "the Hopper kernel is not built yet: CUDA tensors run only with implementation='reference'"


def unsupported_reason(head_dim: int, value_dim: int, dtype: object) -> str | None:
    """Return why no kernel runs this call on CUDA, or None if one does."""
    return _NO_KERNEL


def skip_attention_forward(*args: Any, **kwargs: Any) -> NoReturn:
    """Run the kernel for `lite_attention::skip_attention` on CUDA tensors.

    Raises:
        NotImplementedError: always, until there is a kernel.
    """
    raise NotImplementedError(_NO_KERNEL)
