"""Processes of one gloo group on this machine, kept for all tests of a module: importing torch takes seconds."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing as mp
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from lite_attention.ops import default_session

__all__ = ["Ranks", "ranks_of"]

mp.set_forkserver_preload(["torch", "tests.support.context_parallel_cases"])  # once for all processes


class Ranks:
    """So many processes, each a rank of the default group."""

    def __init__(self, count: int, timeout: float, start_method: str) -> None:
        self._count, self._timeout, self._context = count, timeout, mp.get_context(start_method)
        self._start()

    def _start(self) -> None:
        context: Any = self._context
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{self._folder.name}/store"
        pipes = [context.Pipe() for _ in range(self._count)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs, rank, self._count, store, self._timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module on all ranks; return what each returned, or the exception that it raised.

        An exception in all of them is raised here. Where a signal ends a process, it is said, and all begin anew, once:
        gloo's threads have ended one by "free(): invalid pointer" and by a fault in malloc, on a machine that was busy.
        """
        results = self._run(function, args)
        signals = [process.exitcode for process in self.processes if (process.exitcode or 0) < 0]
        if signals:
            warnings.warn(f"a rank of {function.__name__} was ended by signal {-signals[0]}; run again", stacklevel=2)
            self.close()
            self._start()
            results = self._run(function, args)
        if all(isinstance(result, BaseException) for result in results):
            raise results[0]
        return results

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        return [_received(*of_rank) for of_rank in zip(self._pipes, self.processes, strict=True)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _received(pipe: Any, process: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join(5)
        return EOFError(f"the process is dead, exit code {process.exitcode}")


def _serve(pipe: Any, rank: int, count: int, store: str, timeout: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=count, timeout=datetime.timedelta(seconds=timeout)
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args = pipe.recv()
            pipe.send(_result_of(function, args))


def _result_of(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    default_session.clear()
    try:
        return function(*args)
    except Exception as error:
        error.__notes__ = [traceback.format_exc()]  # what add_note does, from Python 3.11 on
        return error


@contextlib.contextmanager
def ranks_of(count: int, timeout: float = 60, start_method: str = "forkserver") -> Iterator[Ranks]:
    """Have so many processes; a collective in which one is missing fails after `timeout` seconds.

    Those that use a GPU are to be spawned: what a server imports for all may have asked the driver for devices.
    """
    ranks = Ranks(count, timeout, start_method)
    try:
        yield ranks
    finally:
        ranks.close()
