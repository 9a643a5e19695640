"""Runs the methods of `benchmarks.quality`: makes their videos, and measures them against the dense ones."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lite_attention
from benchmarks.quality_methods import RENDERED, enable_options, is_reordered, residual_of, simulated, steps_of
from benchmarks.quality_metrics import Pair, fidelity
from benchmarks.quality_patterns import PATTERNS, pattern_of
from benchmarks.quality_report import DENSE, VOTING, Record, Results, Videos
from benchmarks.quality_setup import Setup, sample, scene, to_bytes, to_floats
from benchmarks.quality_shares import DenseShares, RandomSkips, ResidualShares, SkipShares
from benchmarks.quality_simulation import Simulation, StandIn
from benchmarks.quality_sol import SolAttention, sol_of
from examples.moving_shapes.judge import feature_distance, measure, path_distance
from lite_attention import masks
from lite_attention.token_order import block_of, tile3d_order


class Budget:
    """Seconds that a run may take: no batch begins that might not end in time.

    Args:
        seconds: None = no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0

    def allows(self) -> bool:
        """Return whether there is time for a batch as long as the longest so far, and a tenth more."""
        return self._end is None or time.monotonic() + 1.1 * self._longest < self._end

    @contextlib.contextmanager
    def batch(self) -> Any:
        """Take the time of what is inside."""
        start = time.monotonic()
        yield
        self._longest = max(self._longest, time.monotonic() - start)


class Bench:
    """Runs methods, and adds what is measured to the results.

    Args:
        setup: what is generated.
        results: where the records go.
        videos: where the dense videos, and some others, are kept.
        computes: False = whatever is missing stays so.
        budget: of time.
    """

    def __init__(
        self, setup: Setup, results: Results, videos: Videos, computes: bool = True, budget: Budget | None = None
    ) -> None:
        self.setup, self.results, self.videos, self.computes = setup, results, videos, computes
        self.budget = budget or Budget()
        self._prepared: str | None = None  # the method that the model is ready for

    def run(self, method: str, pairs: Sequence[Pair]) -> None:
        """Compute what there are no records of yet, a batch at a time; dense ones go first."""
        missing = self.results.missing(method, pairs)
        if not missing or not self.computes:
            return
        if method != DENSE:
            self.run(DENSE, pairs)
        start, count = time.monotonic(), 0
        for batch in self._batches(missing):
            if not self.budget.allows():
                print(f"{method}: no time for {len(missing) - count} of {len(missing)} videos", flush=True)
                break
            with self.budget.batch():
                self._run(method, batch)
            count += len(batch)
        print(f"{method}: {count} videos in {time.monotonic() - start:.0f} s", flush=True)

    def _run(self, method: str, batch: Sequence[Pair]) -> None:
        if method != DENSE:
            self._restore([pair for pair in batch if not self.videos.has(DENSE, pair)])
        videos, shares = self._videos_of(method, batch)
        records = []
        for pair, video, share in zip(batch, videos, shares, strict=True):
            if method == DENSE or pair[0] in self.setup.kept:
                self.videos.save(method, pair, video)
            records.append(self._measured(method, pair, video, share))
        self.results.add(records)

    def _restore(self, pairs: Sequence[Pair]) -> None:
        """Make dense videos whose records were brought here without them, or for which there was no time before."""
        for batch in self._batches(pairs):
            for pair, video in zip(batch, self._videos_of(DENSE, batch)[0], strict=True):
                self.videos.save(DENSE, pair, video)

    def _batches(self, pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
        return [pairs[i : i + self.setup.batch] for i in range(0, len(pairs), self.setup.batch)]

    # ---- how a method makes its videos -----------------------------------------------------------------------------

    def _videos_of(self, method: str, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 videos (B, 3, F, H, W), and the share of tiles skipped, (B, sites, steps)."""
        if method == RENDERED:
            rendered = [scene(prompt).render(self.setup.size) for prompt, _ in pairs]
            return to_bytes(torch.cat(rendered)).to(self.setup.device), torch.zeros(len(pairs), 1, 1)
        steps = steps_of(method, self.setup.steps)
        self._prepare(method, steps)
        shares = self._shares_of(method, pairs, steps)
        with shares if isinstance(shares, StandIn) else contextlib.nullcontext():
            return sample(self.setup, pairs, steps, shares.after_step), shares.shares

    def _prepare(self, method: str, steps: int) -> None:
        """Put the model into the state that a method wants, unless it is in it."""
        if method == self._prepared:
            return
        self._prepared = None  # whatever goes wrong
        setup, family = self.setup, method.partition(":")[0]
        setup.model.order = None
        if is_reordered(method):
            tile_m = max(tile_m for tile_m, _ in setup.tile_shapes.values())  # there is only one up to head dim 128
            setup.model.order = tile3d_order(*setup.grid, block_of("tile3d", tile_m), setup.device)
        lite_attention.disable(setup.model)
        if family not in (DENSE, "steps", "sol") and not simulated(method):
            options = enable_options(method, steps, setup.tables)
            if family in PATTERNS:
                options["initial_mask"] = self._pattern(method)
            lite_attention.enable(setup.model, compile=False, tile_shape=setup.tile, **options)
        self._prepared = method

    @functools.cached_property
    def _pattern(self) -> Callable[[str], masks.Pattern]:
        return functools.lru_cache(lambda method: pattern_of(self.setup, method))

    def _shares_of(self, method: str, pairs: Sequence[Pair], steps: int) -> DenseShares | StandIn:
        """Return what notes the shares of a method that is prepared, or takes the place of attention."""
        setup, (family, _, value) = self.setup, method.partition(":")
        wanted = simulated(method)
        if wanted:
            return Simulation(wanted, [setup.model], steps, setup.tile, setup.new_solver(steps).times)
        sol = sol_of(method)
        if sol:
            return SolAttention(sol, [setup.model], steps)
        if residual_of(method) or family == "preset":
            return ResidualShares(setup.model, len(pairs), steps)
        if family == "random":
            twin = self.results.of(value)
            return RandomSkips(setup.model, torch.tensor([twin[pair]["shares"] for pair in pairs]), pairs)
        if family in (DENSE, "steps"):
            return DenseShares(len(pairs), steps)
        return SkipShares(setup.model, len(pairs), steps)

    # ---- what is measured ------------------------------------------------------------------------------------------

    def _measured(self, method: str, pair: Pair, video: torch.Tensor, shares: torch.Tensor) -> Record:
        """Return the record of a video, from the shares (sites, steps) that it skipped."""
        record: Record = {"method": method, "prompt": pair[0], "seed": pair[1]}
        if method != RENDERED:
            record["skipped"] = float(shares.mean())
            record["attention"] = float(1 - shares.mean()) * shares.shape[1] / self.setup.steps
        if method.startswith((*VOTING, "table")):
            record["shares"] = [[round(share, 5) for share in site] for site in shares.tolist()]
        floats, judge = to_floats(video).unsqueeze(0), self.setup.judge
        if method not in (DENSE, RENDERED):
            dense = self.videos.load(DENSE, pair).to(video.device)
            record |= fidelity(video, dense)
            if judge:
                dense = to_floats(dense).unsqueeze(0)
                record["features"] = feature_distance(judge, floats, dense)
                record["path_to_dense"] = path_distance(judge, floats, dense)
        if judge:
            record |= measure(judge, floats, scene(pair[0]).prompt().to(video.device))
        return record


def run_all(bench: Bench, methods: Sequence[str], pairs: Sequence[Pair]) -> tuple[list[str], list[tuple[str, str]]]:
    """Run methods in their order, those that others are made equal to before these.

    Returns:
        The methods as they ran, and (twin, method) for each that was made equal to one.
    """
    ran, twins = [DENSE], []
    for method in methods:
        family, _, value = method.partition(":")
        if family == "random":
            bench.run(value, pairs)
            ran.append(value)
            twins.append((method, value))
            bench.run(method, [pair for pair in pairs if pair in bench.results.of(value)])
        else:
            bench.run(method, pairs)
        ran.append(method)
    return list(dict.fromkeys(ran)), twins
