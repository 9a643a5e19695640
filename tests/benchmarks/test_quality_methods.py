"""The methods of the quality benchmarks: do they do what they say?"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lite_attention
from benchmarks import quality, quality_methods, quality_patterns, quality_setup, quality_shares
from benchmarks.quality_setup import denoise, sample, scene
from benchmarks.quality_solvers import SOLVERS, Euler
from examples.moving_shapes.sample import generate
from lite_attention.compile import settings
from lite_attention.inspection import named_states
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.tiles import ceil_div, diagonal_tile
from tests.support.quality import SIZE, STEPS, Counting, bench_of, setup

# ---- solvers -------------------------------------------------------------------------------------------------------


def error_of(solver: str, steps: int) -> float:
    """Return how far off dx/dt = x is at time 0, from 1 at time 1."""
    solving, x = SOLVERS[solver](steps, SIZE), torch.ones(1, 3, dtype=torch.float64)
    for _ in solving.times:
        x = solving.step(x, x)
    return abs(float(x[0, 0]) - math.exp(-1))


def test_solvers_have_their_order() -> None:
    assert error_of("euler", 10) / error_of("euler", 20) == pytest.approx(2, rel=0.1)
    for solver in ("ab2", "unipc"):
        assert error_of(solver, 20) < 0.06 * error_of("euler", 20)
        assert error_of(solver, 80) < 0.03 * error_of("euler", 80)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_ask_at_falling_times_from_one_on(solver: str) -> None:
    times = SOLVERS[solver](20, SIZE).times
    assert len(times) == 20
    assert times[0] == pytest.approx(1, abs=1e-3)
    assert all(then < now for now, then in pairwise(times))
    assert times == pytest.approx(SOLVERS["euler"](20, SIZE).times, abs=2e-3)


# ---- methods -------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_example() -> None:
    of = setup()
    prompt = scene(3).prompt()
    start = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(11))
    wanted = generate(of.model, prompt, SIZE, STEPS, 3.0, seed=11)
    torch.testing.assert_close(denoise(of.model, prompt, start, Euler(STEPS, SIZE), 3.0), wanted, rtol=0, atol=0)


def test_a_video_does_not_depend_on_its_batch() -> None:
    of = setup()
    lite_attention.enable(of.model, threshold=-1.0, num_steps=STEPS, compile=False, tile_shape=(16, 16))
    pairs = [(0, 0), (0, 1), (1, 0)]
    together = sample(of, pairs, STEPS).int()
    for pair, one in zip(pairs, together, strict=True):
        assert (sample(of, [pair], STEPS)[0].int() - one).abs().max() <= 1
    assert all((together[a] != together[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"initial_mask": (2, 3, 6)}], ids=["votes", "mask"])
def test_shares_are_what_the_calls_skip(options: dict[str, Any]) -> None:
    of = setup()
    if "initial_mask" in options:
        mask = lite_attention.masks.window(*of.grid, radius=options["initial_mask"])
        options = {"initial_mask": mask, "threshold": -math.inf}
    lite_attention.enable(of.model, num_steps=STEPS, compile=False, tile_shape=(16, 16), **options)
    noted = quality_shares.SkipShares(of.model, 2, STEPS)
    with Counting(of.model, options["threshold"]) as counting:
        sample(of, [(0, 0), (1, 0)], STEPS, noted.after_step)
    sites = list(dict.fromkeys(site for site, _ in counting.found))
    for step in range(STEPS):
        for i, site in enumerate(sites):
            calls = counting.found[site, step]
            assert len(calls) == 2  # cond and uncond
            torch.testing.assert_close(noted.shares[:, i, step], torch.stack(calls).mean(0))
    assert noted.shares[:, :, -1].min() > 0.02
    assert (noted.shares[:, :, 0] > 0).all() == ("initial_mask" in options)


class CountingResidual(TorchDispatchMode):
    """Counts what the op of the residual computes in each call, by step: 1 where it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, float]] = []  # sparse?, share of the mask in use, of each call

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.lite_attention.residual_attention.default:
            mask, control, plan = args[3:6]
            words = control.tolist()
            slot = words[c.SLOT]
            step, residuals, taken = (words[c.slot_word(slot, f)] for f in (c.STEP, c.RESIDUALS, c.TAKEN))
            k_tiles = ceil_div(args[1].shape[1], kwargs["tile_n"])
            share = unpack_bits(mask[slot, taken % 2], k_tiles).float().mean()
            self.found.append((int(plan[step]) == 0 and residuals > 0, float(share)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.3},
        {"keep": 0.5, "full_every": 2, "decide_every": 1},
        {"keep": 0.3, "full_every": 4, "first_full": 1},  # the plan's second step is sparse, and becomes full
    ],
)
def test_shares_of_the_residual_are_what_its_calls_skip(options: dict[str, Any]) -> None:
    of, steps = setup(), 9
    lite_attention.enable(
        of.model, method="residual", num_steps=steps, compile=False, tile_shape=(16, 16), **options
    )  # fmt: skip
    noted = quality_shares.ResidualShares(of.model, 2, steps)
    with CountingResidual() as counting:
        sample(of, [(0, 0), (1, 0)], steps, noted.after_step)
    assert noted.shares.shape == (2, 2, steps)
    assert len(counting.found) == 2 * 2 * steps  # sites, branches
    for step in range(steps):
        calls = counting.found[4 * step : 4 * step + 4]
        sparse = [is_sparse for is_sparse, _ in calls]
        wanted = [share if is_sparse else 0 for is_sparse, share in calls]
        assert sparse == [step > 1 and step % options.get("full_every", 3) != 0] * 4
        assert noted.shares[:, :, step].mean() == pytest.approx(sum(wanted) / 4, abs=1e-6)
    assert noted.shares[:, :, 5].mean() == pytest.approx((1 - options["keep"]), abs=0.01)


def test_random_skips_are_as_many_nested_and_never_on_the_diagonal() -> None:
    of = setup()
    lite_attention.enable(of.model, threshold=-math.inf, num_steps=STEPS, compile=False, tile_shape=(16, 16))
    wanted = torch.tensor([[[0, 0.1, 0.3, 0.5], [0, 0.2, 0.2, 0.9]], [[0, 0.0, 0.4, 0.4], [0, 0.05, 0.1, 0.15]]])
    random = quality_shares.RandomSkips(of.model, wanted, [(0, 0), (1, 0)])
    kept: list[list[torch.Tensor]] = []

    def after_step(step: int) -> None:
        random.after_step(step)
        kept.append([state.kept_tiles().clone() for state in named_states(of.model).values()])

    sampled = sample(of, [(0, 0), (1, 0)], STEPS, after_step)
    torch.testing.assert_close(random.shares, wanted, rtol=0, atol=0.5 / 14**2)
    diagonal = [diagonal_tile(i, 216, 216, 16, 16) for i in range(14)]
    for site in range(2):
        for step in range(STEPS - 1):
            skipped = ~kept[step][site]  # [slots, B, heads, q_tiles, k_tiles]
            assert not skipped[..., range(14), diagonal].any()
            heads = skipped.float().mean((-1, -2))
            torch.testing.assert_close(
                heads, wanted[:, site, step + 1].view(1, 2, 1).expand_as(heads), rtol=0, atol=0.5 / 14**2
            )
            assert step == 0 or not (~kept[step - 1][site] & ~skipped).any()
        assert (kept[2][site][0, 0, 0] != kept[2][site][0, 0, 1]).any()  # each head has its own
    assert (random._ranks[0][:, :, :2] != random._ranks[1]).any()  # and so has each site
    lite_attention.disable(of.model)
    assert (sample(of, [(0, 0), (1, 0)], STEPS) != sampled).flatten(1).any(1).all()


def test_heads_are_classified_by_what_they_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    of = setup()
    seen: list[tuple[int, ...]] = []

    def classify(pattern: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(tuple(query.shape))
        return torch.arange(query.shape[2]) % 2

    monkeypatch.setattr(quality_patterns.masks, "classify_heads", classify)
    pattern = quality_patterns.pattern_of(of, "spatial-temporal:1,0")
    assert seen == [(1, 216, 4, 16), (1, 216, 2, 32)] * (2 * STEPS)  # blocks, by branch and step; no cross-attention
    plain = lite_attention.masks.spatial_temporal(*of.grid, near_frames=1, near_tokens=0).tiles(16, 16)
    assert (plain[0] != plain[1]).any()
    lite_attention.enable(of.model, threshold=-math.inf, initial_mask=pattern, compile=False, tile_shape=(16, 16))
    sample(of, [(0, 0)], 1)
    for classes, state in zip(([0, 1, 0, 1], [0, 1]), named_states(of.model).values(), strict=True):
        torch.testing.assert_close(~state.kept_tiles()[0, 0, :, :14, :14], plain[classes])


def test_each_site_has_the_tiles_of_its_head_dim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quality_setup, settings):
        monkeypatch.setattr(module, "tile_shape", lambda head_dim, *_: {16: (16, 24), 32: (16, 12)}[head_dim])
    bench, pair, path = bench_of(tmp_path, tile=None), (0, 0), tmp_path / "error.toml"
    quality.calibrate(bench.setup, "error=0.1", path, prompts=1, held_out=0)
    bench.setup.tables = {"error": path}
    bench.run("table:error", [pair])
    table = lite_attention.LiteAttentionRegistry.from_model(bench.setup.model, "load", filename=path).table
    assert table is not None
    assert list(table.tile_shapes.values()) == [(16, 24), (16, 12)]
    assert [threshold.shape[2] for threshold in table.thresholds.values()] == [4, 2]
    for method in ("random:table:error", "tile3d:-1", "radial", "spatial-temporal:1,0"):
        bench.run(method, [pair])
        states = named_states(bench.setup.model)
        assert {site: (state.tile_m, state.tile_n) for site, state in states.items()} == table.tile_shapes
        assert 0.02 < bench.results.of(method)[pair]["skipped"] < 0.9
    by_table, at_random = (bench.results.of(method)[pair] for method in ("table:error", "random:table:error"))
    assert at_random["skipped"] == pytest.approx(by_table["skipped"], abs=0.5 / (14 * 9))


@pytest.mark.parametrize(
    "method",
    [
        "thresholds:-3",
        "threshold:1",
        "threshold:-3,x",
        "table:none",
        "window:3",
        "random:window:1,1,1",
        "random:0.5",
        "steps:x",
    ],
)
def test_wrong_methods_are_told(method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method}: expected"):
        quality_methods.check(method, {})


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("residual:0.3", "share of tiles"),
        ("residual:1.5,3", "share of tiles"),
        ("residual:0.3,0", "share of tiles"),
        ("residual:0.3,3,forecast", "options out of no-forecast"),
        ("residual:0.3,3,decide", "options out of"),
        ("residual:0.3,3,fp8=2", "options out of"),
        ("cached:x", "share of tiles"),
        ("maximum:0.3,3,no-forecast", "options out of tile3d"),
        ("preset:best", "name out of"),
    ],
)
def test_wrong_residuals_are_told(method: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"method {re.escape(method)}: expected .*{wanted}"):
        quality_methods.check(method, {})


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("residual:0.3,3", {"keep": 0.3, "full_every": 3, "forecast": True, "decide_every": 2}),
        (
            "residual:0.2,5,no-forecast,bf16",
            {"keep": 0.2, "full_every": 5, "forecast": False, "residual_dtype": "bf16"},
        ),
        ("residual-fp8:0.3,3,decide=4", {"decide_every": 4, "use_int8": True, "use_fp8": True}),
        ("cached:2", {"full_every": 2, "forecast": True}),
    ],
)
def test_residuals_are_enabled_as_they_are_called(method: str, wanted: dict[str, Any]) -> None:
    quality_methods.check(method, {})
    options = quality_methods.enable_options(method, STEPS, {})
    assert wanted.items() <= options.items()
    assert options["method"] == "residual"
    assert quality_methods.steps_of(f"{method},steps=7", STEPS) == 7
    assert quality_methods.steps_of(method, STEPS) == STEPS
