"""Calls with one state from several streams come one after the other.

A kernel counts jobs and tickets in the control tensor, so two at a time would leave tiles uncomputed. While calls stay
on one stream, this costs a look-up. What a captured graph does when it is replayed is not seen here: replays are in
order with what is on their stream, and it is the caller's part to order them with other streams.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lite_attention.ops.torch_internals import raw_stream

__all__ = ["turn_of"]


class Cuda:
    """What is asked of streams."""

    def current_id(self, device: torch.device) -> int:
        """Return what tells the current stream of a device from others, without an object for it."""
        return raw_stream(device)

    def current(self, device: torch.device) -> Any:
        """Return the current stream of a device."""
        return torch.cuda.current_stream(device)

    def is_capturing(self, stream: Any) -> bool:
        """Return whether a graph is being captured from a stream."""
        with torch.cuda.stream(stream):
            return torch.cuda.is_current_stream_capturing()

    def wait(self, stream: Any, other: Any) -> None:
        """Let a stream go on when another is through with what it has been given."""
        event = torch.cuda.Event()
        event.record(other)
        stream.wait_event(event)


cuda = Cuda()


class Turn:
    """The calls of one state: a lock, held while one is launched, and the stream of the last."""

    def __init__(self, control: torch.Tensor) -> None:
        self.device = control.device
        self.memory = StorageWeakRef(control.untyped_storage())
        self.lock = threading.Lock()
        self.stream: Any = None
        self.stream_id: int | None = None

    def __enter__(self) -> None:
        self.lock.acquire()
        try:
            if cuda.current_id(self.device) != self.stream_id:
                self._change_stream()
        except BaseException:
            self.lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def _change_stream(self) -> None:
        stream = cuda.current(self.device)
        if cuda.is_capturing(stream):
            return  # nothing runs yet
        if self.stream is not None:
            if cuda.is_capturing(self.stream):
                raise RuntimeError(
                    "state: expected calls of one stream while a graph is captured from it, got one from another"
                )
            cuda.wait(stream, self.stream)
        self.stream, self.stream_id = stream, cuda.current_id(self.device)


_turns: dict[int, Turn] = {}  # by the address of the control tensor
_lock = threading.Lock()


def turn_of(control: torch.Tensor) -> Turn:
    """Return what to hold while a kernel is launched with a control tensor."""
    turn = _turns.get(control.data_ptr())
    return _new_turn(control) if turn is None or turn.memory.expired() else turn


def _new_turn(control: torch.Tensor) -> Turn:
    with _lock:
        for address in [address for address, turn in _turns.items() if turn.memory.expired()]:
            del _turns[address]
        return _turns.setdefault(control.data_ptr(), Turn(control))
