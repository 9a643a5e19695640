"""What each way of saving attention costs in quality, on the moving shapes, whose truth is known.

    python -m benchmarks.quality --weights WEIGHTS --judge JUDGE --out DIR [--prompts 64] [--seeds 2] [--steps 20]
        [--solver euler] [--size 32 64 64] [--methods METHOD ...] [--tables FILE ...] [--calibrate error=0.05 ...]
        [--budget SECONDS] [--markdown FILE] [--json FILE] [--plot FILE] [--cost-plot FILE] [--frames FILE]
        [--report-only] [--tiny]

From the root of the repository. What DIR/results.jsonl holds is not computed again, so a run that `--budget` stopped
goes on where it was; methods run in the order in which they are named. Where there is no VMAF (pip install
imageio-ffmpeg), `--keep` the videos and measure it elsewhere with `--report-only`. `--tiny` is an untrained model, for
trying the script out on a CPU. Methods:

    dense                     PyTorch's attention; what all else is held against
    steps:N                   dense with N steps
    residual:KEEP,EVERY[,OPTION...]
                              LiteAttention by the residual: sparse steps compute the share KEEP of the tiles, and every
                              so many steps is full. Options: no-forecast; decide=N, every so many full steps decides
                              what is kept (2); bf16, fp8, fp32, storage of the residual; tile3d, tokens in blocks of
                              the video; steps=N
    residual-int8:...         likewise, with scores from INT8 queries and keys
    residual-fp8:...          likewise, with weights and values in FP8 besides
    cached:EVERY[,OPTION...]  likewise, keeping but the diagonal: attention's whole output is cached, and forecast
    preset:NAME               LiteAttention by a preset
    threshold:T[,STEPS]       LiteAttention by votes, the first so many steps dense and without votes; -inf skips
                              nothing, and shows what another kernel's rounding does
    tile3d:T[,STEPS]          likewise, with the tokens in blocks of the video, see lite_attention.token_order
    int8:T[,STEPS]            likewise, with scores from INT8 queries and keys
    fp8:T[,STEPS]             likewise, with weights and values in FP8 besides
    table:NAME                votes with the thresholds of the file NAME.toml out of --tables or --calibrate
    mean-keys:KEEP,EVERY[,OPTION...]
                              simulated in PyTorch: masks and steps of the residual, but mean keys and values of skipped
                              tiles stand in for them. Options: parts=N of a tile that have means; decide, tile3d, steps
    maximum:KEEP,EVERY[,OPTION...]
                              simulated in PyTorch: the residual, but tiles are chosen by their largest score
    sol:TAU[,STEPS][,no-tail] Sol-Attn of comfy-kitchen (INT8 scores), the first so many steps dense
    radial[:MIN_WIDTH]        the pattern of lite_attention.masks alone, at threshold -inf
    spatial-temporal[:FRAMES[,TOKENS]]    likewise; which head is which is found on a calibration prompt
    window:FRAMES,ROWS,COLUMNS            likewise
    random:METHOD             random tiles, as many as METHOD, which votes, skips of each video in each step and site;
                              never the diagonal, and once skipped always skipped
    rendered                  no sample, but a rendered scene of the prompt: the truest there can be

Prompts from 1000 on are reported: those below were looked at while methods were made. Tables are calibrated on those
from 1000000 on, and presets chosen on those from 2000000 on (`--first-prompt`).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import lite_attention
from benchmarks import quality_report as reporting
from benchmarks.quality_bench import Bench, Budget, run_all
from benchmarks.quality_equal_cost import base_of, comparisons
from benchmarks.quality_methods import RENDERED, check
from benchmarks.quality_metrics import Pair
from benchmarks.quality_plot import draw
from benchmarks.quality_report import DENSE, FIDELITY, TRUTH, Results, Videos
from benchmarks.quality_setup import CALIBRATION, REPORTED, Setup, sample
from benchmarks.quality_solvers import SOLVERS
from examples.moving_shapes.arguments import VideoSize
from examples.moving_shapes.judge import Judge, load_judge
from examples.moving_shapes.model import Config, VideoDiT, load_weights
from lite_attention.cli.arguments import add_device, integer, number

METHODS = (  # what says most comes first
    "steps:10", "residual:0.3,3", "residual:0.2,3", "steps:12", "threshold:-1", "steps:14", "steps:8", "threshold:-2",
    "residual:0.5,3", "residual:0.3,2", "residual:0.1,3", "cached:3", "cached:2", "residual:0.2,5", "threshold:-3",
    "threshold:-0.5", "threshold:0", "residual:0.3,3,no-forecast", "residual:0.3,3,tile3d", "residual-int8:0.3,3",
    "residual-fp8:0.3,3", "residual:0.3,3,bf16", "residual:0.3,3,decide=1", "residual:0.3,3,decide=4",
    "residual:0.2,2,steps=14", "maximum:0.3,3", "mean-keys:0.3,3", "mean-keys:0.3,3,parts=4", "steps:17",
    "threshold:-4", "threshold:-6", "threshold:-inf", "threshold:-3,4", "threshold:-1,4", "tile3d:-3", "tile3d:-1",
    "int8:-inf", "int8:-3", "fp8:-inf", "fp8:-3", "random:threshold:-6", "random:threshold:-3", "random:threshold:-1",
    "radial", "spatial-temporal:4", "window:12,16,16", "window:8,16,16", "window:4,16,16", RENDERED,
)  # fmt: skip


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
        f"{results.about['steps']} steps by {results.about['solver']}, guidance {results.about['guidance']}; {where}.",
        "",
        "`skipped` is the share of tiles, the mean over blocks, which all cost the same, and over steps, the first one "
        f"included; `attention computed`, the cost, is held against dense attention with {results.about['steps']} "
        "steps. In brackets: 95 % intervals, bootstrapped over prompts with all their seeds, not corrected for how "
        "many there are.",
        "",
        "## Fidelity to the dense video of the same prompt and seed",
        "",
        reporting.table(results, [m for m in methods if m not in (DENSE, RENDERED)], FIDELITY, pairs),
        "",
        "PSNR (100 = equal) and SSIM (Wang et al. 2004, luma) of pixels from 0 to 255; the feature distance is that of "
        "LPIPS (Zhang et al. 2018) in the judge's layers, without learned weights. What `threshold:-inf` loses is "
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
    lines += comparisons(results, methods, pairs)
    found = reporting.verdicts(results, twins, (*FIDELITY, *TRUTH), pairs)
    lines += ["", "## Random skipping", "", *(f"* {line}" for line in reporting.sentences(found))] if found else []
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
    parser.add_argument("--first-prompt", type=integer(0), default=REPORTED, help="number of the first of them")
    parser.add_argument("--seeds", type=integer(1), help="of noise, for each prompt: 2; with --tiny 1")
    parser.add_argument("--steps", type=integer(1), help="20; with --tiny 4")
    parser.add_argument("--solver", choices=SOLVERS, default="euler", help="of the flow, for all methods")
    parser.add_argument("--size", action=VideoSize, help="of the videos: 32 64 64; with --tiny 6 24 24")
    parser.add_argument("--guidance", type=number(), default=3.0, help="of classifier-free guidance")
    parser.add_argument("--batch", type=integer(1), default=32, help="videos at a time")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="see above")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="threshold files, run as table:NAME")
    parser.add_argument("--calibrate", nargs="*", default=[], help="error=E, budget=E or sparsity=S: make a table, too")
    parser.add_argument("--calibration-prompts", type=integer(1), default=4, help="as many as half of them verify only")
    parser.add_argument("--random-of-tables", action="store_true", help="random skipping as much as each table, too")
    parser.add_argument(
        "--keep", type=integer(0), default=1, help="prompts of which the videos of all methods are kept"
    )
    parser.add_argument("--budget", type=number(above=0), help="seconds, after which no more videos are begun")
    parser.add_argument("--markdown", type=Path, help="write the report there, too")
    parser.add_argument("--json", type=Path, help="write means and intervals there")
    parser.add_argument("--plot", type=Path, help="draw all metrics over attention computed there")
    parser.add_argument("--cost-plot", type=Path, help="draw PSNR alone there")
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
    budget = Budget(args.budget)
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
        model, judge.to(args.device) if judge else None, args.size, args.steps, args.solver, args.guidance, args.batch,
        (16, 16) if args.tiny else None, range(args.first_prompt, args.first_prompt + args.keep),
    )  # fmt: skip
    weights = hashlib.sha256(args.weights.read_bytes()).hexdigest()[:12] if args.weights else "untrained"
    about = {
        "weights": weights, "model": asdict(model.config), "size": args.size, "tokens": math.prod(setup.grid),
        "steps": args.steps, "solver": args.solver, "guidance": args.guidance, "tiles": setup.tile_shapes,
        "dtype": str(model.to_patch.weight.dtype).removeprefix("torch."), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    results = Results(args.out / "results.jsonl", None if args.report_only else about)
    videos = Videos(args.out / "videos")

    made = {target.replace("=", "-"): target for target in args.calibrate}
    setup.tables = {file.stem: file for file in args.tables}
    setup.tables |= {name: args.out / "tables" / f"{name}.toml" for name in made}
    ready = [name for name, file in setup.tables.items() if file.exists()]
    for method in args.methods:
        check(method, ready)

    prompts = range(args.first_prompt, args.first_prompt + args.prompts)
    pairs = [(prompt, seed) for seed in range(args.seeds) for prompt in prompts]
    bench = Bench(setup, results, videos, not args.report_only, budget)
    ran, twins = run_all(bench, args.methods, pairs)
    # Tables come last: calibrating takes minutes.
    for name in [name for name in made if name not in ready]:
        if bench.computes and budget.allows():
            calibrate(setup, made[name], setup.tables[name], args.calibration_prompts, args.calibration_prompts // 2)
    tables = [f"table:{name}" for name, file in setup.tables.items() if file.exists() or not bench.computes]
    more = run_all(bench, [*tables, *(f"random:{table}" for table in tables if args.random_of_tables)], pairs)
    ran, twins = list(dict.fromkeys([*ran, *more[0]])), [*twins, *more[1]]
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
        draw(results, ran, (*FIDELITY, *TRUTH), pairs, args.plot)
    if args.cost_plot:
        draw(results, [m for m in ran if base_of(m, ran) is None], FIDELITY[:1], pairs, args.cost_plot)
    if args.frames:
        draw_frames(videos, ran, pairs[0], args.frames)


if __name__ == "__main__":
    main()
