"""What each way of saving attention costs in quality, on the moving shapes, whose truth is known.

    python -m benchmarks.quality --weights WEIGHTS --judge JUDGE --out DIR [--prompts 64] [--seeds 2] [--steps 20]
        [--size 32 64 64] [--methods METHOD ...] [--tables FILE ...] [--calibrate error=0.05 ...]
        [--markdown FILE] [--json FILE] [--plot FILE] [--frames FILE] [--report-only] [--tiny]

From the root of the repository. What DIR/results.jsonl holds is not computed again. Where there is no VMAF (pip install
imageio-ffmpeg), `--keep` the videos and measure it elsewhere with `--report-only`. `--tiny` is an untrained model, for
trying the script out on a CPU. Methods:

    dense                     PyTorch's attention; what all else is held against
    rendered                  no sample, but a rendered scene of the prompt: the truest there can be
    threshold:T[,STEPS]       LiteAttention, the first so many steps dense and without votes; -inf skips nothing, and
                              shows what another kernel's rounding does
    tile3d:T[,STEPS]          likewise, with the tokens in blocks of the video, see lite_attention.token_order
    int8:T[,STEPS]            likewise, with scores from INT8 queries and keys
    fp8:T[,STEPS]             likewise, with weights and values in FP8 besides
    table:NAME                LiteAttention with the thresholds of the file NAME.toml out of --tables or --calibrate
    radial[:MIN_WIDTH]        the pattern of lite_attention.masks alone, at threshold -inf
    spatial-temporal[:FRAMES[,TOKENS]]    likewise; which head is which is found on a calibration prompt
    window:FRAMES,ROWS,COLUMNS            likewise
    random:METHOD             random tiles, as many as METHOD skips of each video in each step and site; never the
                              diagonal, and once skipped always skipped
    steps:N, steps:METHOD     dense with N steps, or with so many that attention computes about as many tiles as METHOD
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import lite_attention
from benchmarks import quality_report as reporting
from benchmarks.quality_methods import (
    CALIBRATION,
    RENDERED,
    RandomSkips,
    Setup,
    SkipShares,
    check,
    pattern_of,
    sample,
    scene,
    schedule_of,
    to_bytes,
    to_floats,
)
from benchmarks.quality_metrics import Pair, fidelity
from benchmarks.quality_report import DENSE, FIDELITY, TRUTH, VOTING, Record, Results, Videos
from examples.moving_shapes.arguments import VideoSize
from examples.moving_shapes.judge import Judge, load_judge, measure, path_distance
from examples.moving_shapes.model import Config, VideoDiT, load_weights
from lite_attention import masks
from lite_attention.cli.arguments import add_device, integer, number
from lite_attention.token_order import block_of, tile3d_order

METHODS = (
    RENDERED, DENSE, *(f"threshold:{t}" for t in ("-inf", "-6", "-4", "-3", "-2", "-1", "-3,4", "-1,4")),
    "tile3d:-3", "tile3d:-1", "int8:-inf", "int8:-3", "fp8:-inf", "fp8:-3",
    "radial", "spatial-temporal:4", "window:12,16,16", "window:8,16,16", "window:4,16,16", "random:threshold:-6",
    "random:threshold:-3", "random:threshold:-1", "steps:threshold:-6", "steps:threshold:-3", "steps:threshold:-1",
)  # fmt: skip
_TWINS = ("random", "steps")


class Bench:
    """Runs methods, and adds what is measured to the results.

    Args:
        setup: what is generated.
        results: where the records go.
        videos: where the dense videos, and some others, are kept.
        computes: False = whatever is missing stays so.
    """

    def __init__(self, setup: Setup, results: Results, videos: Videos, computes: bool = True) -> None:
        self.setup, self.results, self.videos, self.computes = setup, results, videos, computes

    def resolved(self, method: str, pairs: Sequence[Pair]) -> str:
        """Return "steps:13" for "steps:threshold:-3", from the records of "threshold:-3"; other methods as they are."""
        family, _, value = method.partition(":")
        if family != "steps" or value.isdigit():
            return method
        computed = 1 - reporting.saved(self.results, value, pairs)
        return f"steps:{max(1, round(self.setup.steps * computed))}"

    def run(self, method: str, pairs: Sequence[Pair]) -> None:
        """Compute what there are no records of yet, a batch at a time; dense ones go first."""
        missing = self.results.missing(method, pairs)
        if not missing or not self.computes:
            return
        if method != DENSE:
            self.run(DENSE, pairs)
            self._restore([pair for pair in missing if not self.videos.has(DENSE, pair)])
        start = time.monotonic()
        for batch in self._batches(missing):
            videos, shares = self._videos_of(method, batch)
            records = []
            for pair, video, share in zip(batch, videos, shares, strict=True):
                if method == DENSE or pair[0] < self.setup.keep:
                    self.videos.save(method, pair, video)
                records.append(self._measured(method, pair, video, share))
            self.results.add(records)
        print(f"{method}: {len(missing)} videos in {time.monotonic() - start:.0f} s", flush=True)

    def _restore(self, pairs: Sequence[Pair]) -> None:
        """Make dense videos again whose records were brought here without them."""
        for batch in self._batches(pairs):
            for pair, video in zip(batch, self._videos_of(DENSE, batch)[0], strict=True):
                self.videos.save(DENSE, pair, video)

    def _batches(self, pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
        return [pairs[i : i + self.setup.batch] for i in range(0, len(pairs), self.setup.batch)]

    def _videos_of(self, method: str, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 videos (B, 3, F, H, W), and the share of tiles skipped, (B, sites, steps)."""
        setup, model = self.setup, self.setup.model
        family, _, value = method.partition(":")
        model.order = None
        if family == "tile3d":
            tile_m = max(tile_m for tile_m, _ in setup.tile_shapes.values())  # there is only one up to head dim 128
            model.order = tile3d_order(*setup.grid, block_of("tile3d", tile_m), setup.device)
        if family == RENDERED:
            rendered = [scene(prompt).render(setup.size) for prompt, _ in pairs]
            return to_bytes(torch.cat(rendered)).to(setup.device), torch.zeros(len(pairs), 1, 1)
        if family in (DENSE, "steps"):
            lite_attention.disable(model)
            steps = int(value) if family == "steps" else setup.steps
            return sample(setup, pairs, steps), torch.zeros(len(pairs), 1, steps)
        self._enable(method)
        shares = SkipShares(model, len(pairs), setup.steps)
        if family == "random":
            twin = self.results.of(value)
            shares = RandomSkips(model, torch.tensor([twin[pair]["shares"] for pair in pairs]), pairs)
        return sample(setup, pairs, setup.steps, shares.after_step), shares.shares

    def _enable(self, method: str) -> None:
        family, _, value = method.partition(":")
        options: dict[str, Any] = {"num_steps": self.setup.steps, "compile": False, "tile_shape": self.setup.tile}
        options |= {"use_int8": family in ("int8", "fp8"), "use_fp8": family == "fp8"}
        options["threshold"] = schedule_of(value) if family in VOTING else -math.inf
        if family in ("radial", "spatial-temporal", "window"):
            options["initial_mask"] = self._pattern(method)
        lite_attention.enable(self.setup.model, **options)
        if family == "table":
            path = self.setup.tables[value]
            lite_attention.LiteAttentionRegistry.from_model(self.setup.model, mode="load", filename=path)

    @functools.cached_property
    def _pattern(self) -> Callable[[str], masks.Pattern]:
        return functools.lru_cache(lambda method: pattern_of(self.setup, method))

    def _measured(self, method: str, pair: Pair, video: torch.Tensor, shares: torch.Tensor) -> Record:
        """Return the record of a video, from the shares (sites, steps) that it skipped."""
        record: Record = {"method": method, "prompt": pair[0], "seed": pair[1]}
        if method != RENDERED:
            record["skipped"] = float(shares.mean())
            record["attention"] = float(1 - shares.mean()) * shares.shape[1] / self.setup.steps
        if method.startswith((*VOTING, "table")):
            record["shares"] = [[round(share, 5) for share in site] for site in shares.tolist()]
        floats = to_floats(video).unsqueeze(0)
        if method not in (DENSE, RENDERED):
            dense = self.videos.load(DENSE, pair).to(video.device)
            record |= fidelity(video, dense)
            if self.setup.judge:
                record["path_to_dense"] = path_distance(self.setup.judge, floats, to_floats(dense).unsqueeze(0))
        if self.setup.judge:
            record |= measure(self.setup.judge, floats, scene(pair[0]).prompt().to(video.device))
        return record


def run_all(bench: Bench, methods: Sequence[str], pairs: Sequence[Pair]) -> tuple[list[str], list[tuple[str, str]]]:
    """Run methods, those first that others are made equal to.

    Returns:
        The methods as they ran, and (twin, method) for each that was made equal to one.
    """
    ran: list[str] = []
    twins = []
    for method in [DENSE, *sorted(methods, key=lambda name: name.startswith(_TWINS))]:
        family, _, value = method.partition(":")
        has_twin = family in _TWINS and not value.isdigit()
        if has_twin:
            bench.run(value, pairs)
        ran += [value] if has_twin else []
        name = bench.resolved(method, pairs)
        if name == f"steps:{bench.setup.steps}":
            print(f"{method}: left out, since {value} saves less than a step does", flush=True)
            continue
        bench.run(name, pairs)
        ran.append(name)
        twins += [(name, value)] if has_twin else []
    return list(dict.fromkeys(ran)), twins


# ---- calibration ---------------------------------------------------------------------------------------------------


def calibrate(setup: Setup, target: str, path: Path, prompts: int, held_out: int) -> None:
    """Write a threshold file, found on prompts that nothing else uses.

    Args:
        setup: with which the file will be used.
        target: "error=E", a bound for each head and step; "budget=E", the mean error; or "sparsity=S".
        path: of the file.
        prompts: number of those calibrated on.
        held_out: number of those that only verify.
    """
    kind, _, number = target.partition("=")
    goal: dict[str, Any] = {"target_sparsity" if kind == "sparsity" else "target_error": float(number)}
    if kind == "budget":
        goal["budget"] = True

    def generate(prompt: int) -> torch.Tensor:
        return sample(setup, [(prompt, 0)], setup.steps).float()

    lite_attention.disable(setup.model)
    numbers = range(CALIBRATION, CALIBRATION + prompts + held_out)
    options: dict[str, Any] = {"tile_shape": setup.tile} if setup.tile else {}
    found = lite_attention.calibrate(
        setup.model, generate, num_steps=setup.steps, prompts=numbers[:prompts], held_out=numbers[prompts:],
        progress=False, **goal, **options,
    )  # fmt: skip
    print(f"{path.stem}\n{found}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(found.table, resolution=setup.size).save(path)


# ---- report --------------------------------------------------------------------------------------------------------


def markdown(
    results: Results, methods: Sequence[str], twins: Sequence[tuple[str, str]], pairs: Sequence[Pair], where: str
) -> str:
    """Return the report."""
    size = "x".join(map(str, results.about["size"]))
    prompts, seeds = (len(set(numbers)) for numbers in zip(*pairs, strict=True))
    lines = [
        f"{prompts} prompts x {seeds} seeds, {size} (frames x height x width), {results.about['tokens']} tokens, "
        f"{results.about['steps']} steps, guidance {results.about['guidance']}; {where}.",
        "",
        "`skipped` is the share of tiles, the mean over blocks, which all cost the same, and over steps, the first one "
        f"included; `attention computed` is held against dense attention with {results.about['steps']} steps. In "
        "brackets: 95 % intervals, bootstrapped over prompts with all their seeds, not corrected for how many there "
        "are.",
        "",
        "## Fidelity to the dense video of the same prompt and seed",
        "",
        reporting.table(results, [m for m in methods if m not in (DENSE, RENDERED)], FIDELITY, pairs),
        "",
        "PSNR (100 = equal) and SSIM (Wang et al. 2004, luma) of pixels from 0 to 255. What `threshold:-inf` loses is "
        "another kernel's rounding: no method can be told to be better than that. "
        + reporting.vmaf_note(results, methods, pairs),
    ]  # fmt: skip
    if any(results.values(DENSE, metric.name, pairs) for metric in TRUTH):
        lines += [
            "",
            "## Truth",
            "",
            "What the judge sees: shares of videos that show what the prompt asked for, certainty, and how steady the "
            "videos are; `rendered` scenes are what there is to reach. In brackets: interval of the paired difference "
            "to dense.",
            "",
            reporting.table(results, methods, TRUTH, pairs),
        ]
    found = reporting.verdicts(results, twins, (*FIDELITY, *TRUTH), pairs)
    lines += ["", "## At equal attention", "", *(f"* {line}" for line in reporting.sentences(found))] if found else []
    return "\n".join(lines) + "\n"


def draw_frames(videos: Videos, methods: Sequence[str], pair: Pair, path: Path) -> None:
    """Draw frames of one prompt and seed, a row for each method whose video was kept."""
    from lite_attention import plot

    kept = [method for method in methods if videos.has(method, pair)]
    plot.frames({method: videos.load(method, pair).transpose(0, 1) for method in kept}, path=path)


def tiny() -> tuple[VideoDiT, Judge]:
    """Return an untrained model whose every part matters, and an untrained judge."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VideoDiT(Config(width=64, layers=2, head_dims=(16, 32), mlp_ratio=2, cross_width=32))
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        for block in model.blocks:
            block.self_attention.norm_q.data.mul_(5)  # type: ignore[union-attr, operator]
        judge = Judge()
    return model.eval().requires_grad_(False), judge.eval().requires_grad_(False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, defaults of `--tiny` included."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of the model, what train.py wrote")
    parser.add_argument("--judge", type=Path, help="what judge.py wrote; without it the truth is not judged")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, videos and tables")
    parser.add_argument("--prompts", type=integer(1), help="64; with --tiny 3")
    parser.add_argument("--seeds", type=integer(1), help="of noise, for each prompt: 2; with --tiny 1")
    parser.add_argument("--steps", type=integer(1), help="20; with --tiny 4")
    parser.add_argument("--size", action=VideoSize, help="of the videos: 32 64 64; with --tiny 6 24 24")
    parser.add_argument("--guidance", type=number(), default=3.0, help="of classifier-free guidance")
    parser.add_argument("--batch", type=integer(1), default=16, help="videos at a time")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="see above")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="threshold files, run as table:NAME")
    parser.add_argument("--calibrate", nargs="*", default=[], help="error=E, budget=E or sparsity=S: make a table, too")
    parser.add_argument("--calibration-prompts", type=integer(1), default=4, help="as many as half of them verify only")
    parser.add_argument("--random-of-tables", action="store_true", help="random skipping as much as each table, too")
    parser.add_argument(
        "--keep", type=integer(0), default=1, help="prompts of which the videos of all methods are kept"
    )
    parser.add_argument("--markdown", type=Path, help="write the report there, too")
    parser.add_argument("--json", type=Path, help="write means and intervals there")
    parser.add_argument("--plot", type=Path, help="draw quality against attention saved there")
    parser.add_argument("--frames", type=Path, help="draw frames of the first video there")
    parser.add_argument("--report-only", action="store_true", help="of what is there; only missing VMAF is measured")
    parser.add_argument("--tiny", action="store_true", help="an untrained model, for trying it out on a CPU")
    add_device(parser)
    args = parser.parse_args(arguments)
    if not args.tiny and args.weights is None:
        parser.error("--weights: expected a file, or --tiny")
    defaults = (3, 1, 4, (6, 24, 24)) if args.tiny else (64, 2, 20, (32, 64, 64))
    for name, value in zip(("prompts", "seeds", "steps", "size"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report as the command line asks."""
    args = parse(arguments)
    judge: Judge | None
    if args.tiny:
        model, judge = tiny()
    else:
        model = load_weights(args.weights).eval().requires_grad_(False)
        judge = load_judge(args.judge) if args.judge else None
    model.to(args.device)
    if args.device.startswith("cuda"):
        model.bfloat16()
    setup = Setup(
        model, judge.to(args.device) if judge else None, args.size, args.steps, args.guidance, args.batch,
        (16, 16) if args.tiny else None, args.keep,
    )  # fmt: skip
    weights = hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12] if args.weights else "untrained"
    about = {
        "weights": weights, "model": asdict(model.config), "size": args.size, "tokens": math.prod(setup.grid),
        "steps": args.steps, "guidance": args.guidance, "tiles": setup.tile_shapes,
        "dtype": str(model.to_patch.weight.dtype).removeprefix("torch."), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    results = Results(args.out / "results.jsonl", None if args.report_only else about)
    videos = Videos(args.out / "videos")

    files = list(args.tables)
    for target in args.calibrate:
        files.append(args.out / "tables" / f"{target.replace('=', '-')}.toml")
        if not files[-1].exists() and not args.report_only:
            calibrate(setup, target, files[-1], args.calibration_prompts, args.calibration_prompts // 2)
    setup.tables = {file.stem: file for file in files}
    tables = [f"table:{name}" for name in setup.tables]
    methods = [*args.methods, *tables, *(f"random:{table}" for table in tables if args.random_of_tables)]
    for method in methods:
        check(method, setup.tables)

    pairs = [(prompt, seed) for prompt in range(args.prompts) for seed in range(args.seeds)]
    ran, twins = run_all(Bench(setup, results, videos, not args.report_only), methods, pairs)
    results.fill_vmaf(videos)
    where = ", ".join(
        f"{'torch ' * (key == 'torch')}{results.about[key]}" for key in ("dtype", "device", "torch", "date")
    )
    report = markdown(results, ran, twins, pairs, where)
    report += f"\n`python -m benchmarks.quality {shlex.join(sys.argv[1:] if arguments is None else arguments)}`\n"
    print(report)
    if args.markdown:
        args.markdown.write_text(report)
    if args.json:
        content = {
            "about": about,
            "where": where,
            "methods": reporting.as_json(results, ran, (*FIDELITY, *TRUTH), pairs),
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot:
        reporting.draw(results, ran, (*FIDELITY, *TRUTH), pairs, args.plot)
    if args.frames:
        draw_frames(videos, ran, pairs[0], args.frames)


if __name__ == "__main__":
    main()
