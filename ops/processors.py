"""How many multiprocessors our kernels leave to others, such as an exchange between GPUs that runs beside them."""

from __future__ import annotations

from lite_attention.ops.arguments import check_count

__all__ = ["leave_processors", "left_processors"]

_left = 0


def leave_processors(count: int) -> None:
    """Leave so many multiprocessors of each GPU free from now on, in this process.

    The Hopper kernel starts as many thread blocks as there are others. It is read at each launch: nothing is compiled
    anew, and a CUDA graph keeps what held when it was captured. The portable kernel takes all.

    Raises:
        ValueError: no integer of at least 0.
    """
    global _left
    _left = check_count("count", count, least=0)


def left_processors() -> int:
    """Return what is left free."""
    return _left
