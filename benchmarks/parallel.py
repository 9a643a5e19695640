"""Attention of one layer on several GPUs of a host against one: exchange, efficiency, balance, overlap, masks.

    torchrun --nproc-per-node 2 -m benchmarks.parallel [--tokens 32760 75600] [--only exchange attention ...]
                                                       [--seconds 0.4] [--budget 200] [--json FILE]

A figure is ms a call, calls back to back, of the slowest rank; efficiency is T1 / (ranks * TP), where T1 is one GPU
with the same mask and all heads. Inputs are normal numbers, bf16, with planted masks; what is compared bit for bit is
clustered and votes. It ends by itself: what the budget, in seconds, has no room for is left out, and said; whatever
hangs is ended with it. The file is written anew with each figure. A rank that fails alone ends the run.
`--device cpu` is a dry run with gloo, which shows only that everything runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import one_line, where
from benchmarks.parallel_layer import Layer
from lite_attention.cli.arguments import add_device, integer, number
from lite_attention.cli.timing import Call
from lite_attention.ops.torch_internals import default_store
from lite_attention.parallel import leave_processors
from lite_attention.parallel.balance import deal

SHARES = (0.0, 0.5, 0.77)
PARTS = (1, 2, 4, 5)
LEFT_FREE = (0, 8, 16)
LAST_START = 0.9  # of the budget: no block of calls begins after it
TOGETHER = datetime.timedelta(seconds=20)  # within which all ranks fail, if it is the same on all


class Spent(Exception):
    """The budget has no room for more."""


class Bench:
    """Figures of all ranks, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.seconds, self.budget, self.json = args.seconds, args.budget, args.json
        self.device = torch.device(args.device if args.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
        self.start = time.perf_counter()
        self.failures = 0
        self.rows: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}

    def say(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    def slowest(self, value: float) -> float:
        most = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _check_time(self) -> None:
        if self.slowest(time.perf_counter() - self.start) > LAST_START * self.budget:
            raise Spent(f"{self.budget:g} s are spent")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, call: Call) -> float:
        """Return ms a call, of the slowest rank.

        Raises:
            Spent: the time is up, on all ranks.
        """
        self._check_time()

        def run(count: int) -> float:
            self._synchronize()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            self._synchronize()
            return self.slowest((time.perf_counter() - begin) / count * 1e3)

        call()
        return run(min(500, max(3, math.ceil(self.seconds * 1e3 / run(2)))))

    def note(self, tokens: int, name: str, **figures: Any) -> None:
        self.rows.append({"tokens": tokens, "name": name, **figures})
        self.say(f"  {name:62}" + "".join(f"  {key} {value:8.3f}" for key, value in figures.items()))
        if self.json and dist.get_rank() == 0:
            whole = self.json.with_name(f"{self.json.name}.new")  # so that there is always a whole one
            whole.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1))
            whole.replace(self.json)

    def attempt(self, what: str, function: Callable[..., None], *arguments: Any) -> None:
        """Run a part as far as the budget goes. After a failure of all ranks the next part goes on.

        Raises:
            RuntimeError: this rank failed alone, so the others are in the middle of the part.
        """
        try:
            self._check_time()
            function(self, *arguments)
        except Spent as error:
            self.say(f"  ({what}: left out, {error})")
        except Exception as error:
            told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
            if not self._all_failed():
                raise RuntimeError(f"rank {dist.get_rank()} alone, {what}: {told}") from error
            self.say(f"  ({what}: left out, {told})")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _all_failed(self) -> bool:
        """Return whether all ranks fail now, which they say by the store: collectives of another are under way."""
        self.failures += 1
        rank, ranks = dist.get_rank(), dist.get_world_size()
        keys = [f"failed/{self.failures}/{each}" for each in range(ranks)]
        store = default_store()
        store.set(keys[rank], "")
        try:
            store.wait(keys, TOGETHER)
        except RuntimeError:
            store.delete_key(keys[rank])  # what another says later is of something else
            return False
        return True


def measure_exchange(bench: Bench, layer: Layer) -> None:
    """What is sent, and what is copied around it; GB/s is what each rank sends of one tensor."""
    for name, call, tensors in layer.exchanges():
        ms = bench.timed(call)
        speed = {} if tensors == 0 else {"GB/s": tensors * layer.sent_of_a_tensor / ms / 1e6}
        bench.note(layer.tokens, name, ms=ms, **speed)


def measure_attention(bench: Bench, layer: Layer, share: float, quantization: str) -> None:
    """One GPU, the heads of a rank alone, and all of Ulysses; one GPU once more, since clocks move."""
    mask = layer.mask(torch.full((layer.heads, 1), share), quantization)
    how = "bf16" if quantization == "none" else quantization
    name = f"{how}, {share:.0%} skipped"
    single = layer.on_one(mask, quantization)
    before = bench.timed(single)
    alone = bench.timed(layer.alone(mask, quantization))
    spread = bench.timed(layer.on_all(mask, quantization))
    one = (before + bench.timed(single)) / 2
    ranks = dist.get_world_size()
    bench.note(
        layer.tokens, name, one=one, alone=alone, all=spread, efficiency=one / ranks / spread,
        efficiency_alone=one / ranks / alone,
    )  # fmt: skip


def measure_balance(bench: Bench, layer: Layer) -> None:
    """Heads from 20 to 80 % skipped, as they come and dealt, beside heads that are all alike."""
    ranks = dist.get_world_size()
    share = torch.linspace(0.2, 0.8, layer.heads).view(-1, 1)
    for name, shares, order in (
        ("all heads 50% skipped", torch.full_like(share, 0.5), None),
        ("heads 20% to 80% skipped, as they come", share, None),
        ("heads 20% to 80% skipped, dealt", share, deal(1 - share.view(-1), ranks)),
    ):
        mask = layer.mask(shares)
        one, spread = bench.timed(layer.on_one(mask)), bench.timed(layer.on_all(mask, order=order))
        bench.note(layer.tokens, name, one=one, all=spread, efficiency=one / ranks / spread)


def measure_overlap(bench: Bench, layer: Layer, share: float) -> None:
    """Heads of a rank in parts, so that exchanges run beside attention, with multiprocessors left to them."""
    mask, ranks = layer.mask(torch.full((layer.heads, 1), share)), dist.get_world_size()
    one = bench.timed(layer.on_one(mask))
    for parts in PARTS:
        for left in LEFT_FREE if layer.heads % (ranks * parts) == 0 else ():
            leave_processors(left)
            try:
                spread = bench.timed(layer.on_all(mask, parts=parts))
            finally:
                leave_processors(0)
            name = f"{share:.0%} skipped, {parts} parts, {left} multiprocessors left free"
            bench.note(layer.tokens, name, one=one, all=spread, efficiency=one / ranks / spread)


def measure_captured(bench: Bench, layer: Layer) -> None:
    """Compiled whole, and as a CUDA graph: the same outputs, and what a call takes."""
    for name, run in layer.captured():
        if run is not None:
            differ, call = run()
            bench.note(layer.tokens, name, ms=bench.timed(call), differ=bench.slowest(differ))


def compare_masks(bench: Bench, layer: Layer) -> None:
    """Three generations of four clustered steps, heads dealt between them: masks and outputs against one GPU's."""
    found = layer.compared()
    bench.note(layer.tokens, "against one GPU", **{name: bench.slowest(value) for name, value in found.items()})


def measure(bench: Bench, tokens: int, args: argparse.Namespace) -> None:
    layer = Layer(tokens, args.heads, args.head_dim, bench.device)
    bench.say(
        f"\n(1, {args.heads}, {tokens}, {args.head_dim}), {layer.dtype}, {time.perf_counter() - bench.start:.0f} s"
    )
    only = args.only
    if "masks" in only and tokens == min(args.tokens):
        bench.attempt("masks", compare_masks, layer)
    if "exchange" in only:
        bench.attempt("exchange", measure_exchange, layer)
    for quantization in ("none", "int8_fp8") if "attention" in only else ():
        for share in SHARES:
            bench.attempt(f"{quantization}, {share}", measure_attention, layer, share, quantization)
    if "balance" in only:
        bench.attempt("balance", measure_balance, layer)
    for share in (0.0, 0.5) if "overlap" in only else ():
        bench.attempt("overlap", measure_overlap, layer, share)
    if "captured" in only and tokens == min(args.tokens):
        bench.attempt("captured", measure_captured, layer)


PARTS_OF_IT = ["masks", "exchange", "attention", "balance", "overlap", "captured"]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=integer(least=64), nargs="+", default=[32760, 75600])
    parser.add_argument("--heads", type=integer(least=1), default=40)
    parser.add_argument("--head-dim", type=integer(least=8), default=128)
    parser.add_argument("--only", nargs="+", choices=PARTS_OF_IT, default=PARTS_OF_IT)
    parser.add_argument("--seconds", type=number(above=0), default=0.4, help="length of a block of calls")
    parser.add_argument("--budget", type=number(above=0), default=200, help="seconds after which it has ended")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    add_device(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    if "RANK" not in os.environ:
        raise SystemExit("this benchmark runs on several ranks: torchrun --nproc-per-node 2 -m benchmarks.parallel")
    signal.setitimer(signal.ITIMER_REAL, args.budget)  # ends this process wherever it is
    bench = Bench(args)
    timeout = datetime.timedelta(seconds=60)
    if args.device == "cuda":
        torch.cuda.set_device(bench.device)
        dist.init_process_group("nccl", timeout=timeout, device_id=bench.device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        run(bench, args)
    finally:
        dist.destroy_process_group()


def run(bench: Bench, args: argparse.Namespace) -> None:
    """Measure all on the ranks of the default group."""
    bench.about = {"ranks": dist.get_world_size(), "torch": torch.__version__}
    if args.device == "cuda":
        bench.about |= where() | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    bench.say(one_line(bench.about))
    with torch.no_grad():
        for tokens in args.tokens:
            measure(bench, tokens, args)
    bench.say(f"\n{time.perf_counter() - bench.start:.0f} s in all")


if __name__ == "__main__":
    main()
