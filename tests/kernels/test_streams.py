"""Calls with one state from several streams come one after the other; with streams that only note what is asked."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

from lite_attention.cute_kernels import streams
from lite_attention.cute_kernels.streams import turn_of


class Streams:
    """In place of `streams.Cuda`: streams are names, each thread has a current one."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.own.current = "main"
        self.capturing: set[str] = set()
        self.waits: list[tuple[str, str]] = []
        self.asked = 0

    def current_id(self, device: torch.device) -> int:
        return hash(self.own.current)

    def current(self, device: torch.device) -> str:
        self.asked += 1
        current: str = self.own.current
        return current

    def is_capturing(self, stream: str) -> bool:
        return stream in self.capturing

    def wait(self, stream: str, other: str) -> None:
        self.waits.append((stream, other))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Streams:
    fake = Streams()
    monkeypatch.setattr(streams, "cuda", fake)
    monkeypatch.setattr(streams, "_turns", {})
    return fake


def call(cuda: Streams, control: torch.Tensor, *names: str) -> list[tuple[str, str]]:
    """Launch on each of the streams; return the waits."""
    cuda.waits = []
    for name in names:
        cuda.own.current = name
        with turn_of(control):
            pass
    return cuda.waits


@pytest.mark.parametrize(
    ("names", "waits"),
    [
        ("a", []),
        ("aaaa", []),
        ("ab", [("b", "a")]),
        ("aabb", [("b", "a")]),
        ("aba", [("b", "a"), ("a", "b")]),
        ("abc", [("b", "a"), ("c", "b")]),
    ],
)
def test_a_stream_waits_for_the_last_one(names: str, waits: list[tuple[str, str]], cuda: Streams) -> None:
    assert call(cuda, torch.zeros(24), *names) == waits


def test_states_do_not_wait_for_each_other(cuda: Streams) -> None:
    one, other = torch.zeros(24), torch.zeros(24)
    assert call(cuda, one, "a") == call(cuda, other, "b") == call(cuda, one, "a") == call(cuda, other, "b") == []


def test_another_view_of_a_control_tensor_is_the_same_state(cuda: Streams) -> None:
    control = torch.zeros(24)
    assert call(cuda, control, "a") == []
    assert call(cuda, control.view(24), "b") == [("b", "a")]


def test_on_one_stream_nothing_is_asked_but_which(cuda: Streams) -> None:
    control = torch.zeros(24)
    call(cuda, control, "a")
    asked = cuda.asked
    call(cuda, control, *"aaaaaa")
    assert cuda.asked == asked


def test_while_a_graph_is_captured_nothing_waits(cuda: Streams) -> None:
    """Nothing runs then, and an event from outside would break the capture."""
    control = torch.zeros(24)
    call(cuda, control, "a")
    cuda.capturing = {"b"}
    assert call(cuda, control, "b", "b") == []
    cuda.capturing = set()
    assert call(cuda, control, "a") == []  # what was captured has not run
    assert call(cuda, control, "b") == [("b", "a")]


def test_a_call_beside_a_capture_is_refused(cuda: Streams) -> None:
    """To wait for a stream that is being captured from would join the capture."""
    control = torch.zeros(24)
    call(cuda, control, "a")
    cuda.capturing = {"a"}
    with pytest.raises(RuntimeError, match="state: expected calls of one stream while a graph is captured from it"):
        call(cuda, control, "b")
    cuda.capturing = set()
    assert call(cuda, control, "b") == [("b", "a")]  # the lock is free, and the last stream known


def test_threads_take_turns(cuda: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch waits for has been launched: nobody comes between the look at the last stream and the launch."""
    control, inside, most = torch.zeros(24), 0, 0

    def launch() -> None:
        nonlocal inside, most
        cuda.own.current = threading.current_thread().name
        for _ in range(50):
            with turn_of(control):
                inside += 1
                most = max(most, inside)
                threading.Event().wait(1e-4)
                inside -= 1

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    for (waiting, _), (_, last) in zip(cuda.waits, cuda.waits[1:], strict=False):
        assert last == waiting


def test_states_that_are_gone_are_forgotten(cuda: Streams) -> None:
    kept: list[Any] = [torch.zeros(24) for _ in range(100)]
    for control in kept:
        call(cuda, control, "a")
    assert len(streams._turns) == 100
    del kept[:90], control
    gc.collect()
    call(cuda, torch.zeros(24), "b")
    assert len(streams._turns) == 11


def test_a_state_where_another_was_is_another(cuda: Streams) -> None:
    memory = bytearray(96)
    control = torch.frombuffer(memory, dtype=torch.int32)
    call(cuda, control, "a")
    del control
    control = torch.frombuffer(memory, dtype=torch.int32)
    assert call(cuda, control, "b") == []
    call(cuda, torch.zeros(24), "a")
    assert call(cuda, control, "c") == [("c", "b")]


def test_an_error_in_a_launch_frees_the_turn(cuda: Streams) -> None:
    control = torch.zeros(24)
    with pytest.raises(ValueError, match="bad"), turn_of(control):
        raise ValueError("bad")
    assert call(cuda, control, "main") == []
