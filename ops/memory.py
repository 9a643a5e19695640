"""`Memory`: a module whose buffers the ops write in place, and what moving and copying them means."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lite_attention.ops.torch_internals import FakeTensor, FakeTensorMode

__all__ = ["Memory"]


class Memory(nn.Module):
    """Buffers that are written in place, all on one device.

    Moves change neither dtypes nor layouts, which are part of a contract. A copy, shallow or deep, has buffers of its
    own: two sites that write into one memory would lose what they learn. None of the buffers is ever an inference
    tensor, which could not be written outside of inference mode.
    """

    def device_after(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.device | None:
        """Return where a function of `nn.Module._apply` moves to; None = off the meta device, which has no data."""
        here = self._device
        try:
            device = fn(torch.empty(0, device=here)).device
        except NotImplementedError:
            device = None
        return None if here.type == "meta" and device != here else device

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Memory:
        """Move to the device that `fn` moves to.

        Raises:
            RuntimeError: off the meta device, which holds no data.
        """
        device = self.device_after(fn)
        if device is None:
            raise RuntimeError(
                f"{type(self).__name__}: expected data to move, but it is on the meta device, which holds none: make a "
                "new one"
            )
        self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            for name, buffer in self.named_buffers(recurse=False):
                self._buffers[name] = self._placed(name, buffer.clone() if buffer.is_inference() else buffer, device)

    def _placed(self, _: str, buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return what a buffer of this name is on a device."""
        return buffer.to(device)

    @property
    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def __copy__(self) -> Memory:
        """Return what `copy.deepcopy` does."""
        return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was copied or pickled, also in inference mode."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._move(self._device)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            f"{type(self).__name__}: nn.DataParallel makes replicas anew for each call, so what they learn is lost: "
            "run one process for each GPU"
        )

    def is_usable_with(self, tensor: torch.Tensor) -> bool:
        """Whether a call may bring this tensor: it is on the same device, and both are real or of one fake mode."""
        own = next(iter(self._buffers.values()))  # `buffers()` takes 5 us
        assert own is not None
        mode, its_mode = _fake_mode(own), _fake_mode(tensor)
        same = mode is its_mode or (mode is None and its_mode is not None and its_mode.allow_non_fake_inputs)
        return same and own.device == tensor.device


def _fake_mode(tensor: torch.Tensor) -> FakeTensorMode | None:
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None
