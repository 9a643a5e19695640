"""What LiteAttention costs in quality, and saves in time, with real weights: Wan 2.1, LTX-Video and their like.

    python -m benchmarks.quality_pretrained --pipeline PATH --out DIR [--prompts FILE] [--seeds 1] [--steps 50]
        [--height 480] [--width 832] [--frames 81] [--guidance 5] [--methods METHOD ...] [--tables FILE ...]
        [--compile blocks] [--budget SECONDS] [--markdown FILE] [--json FILE] [--plot FILE]

From the root of the repository. PATH is a folder in diffusers' format; nothing is downloaded. Every method is compared
with the dense video of the same prompt and seed. What DIR/results.jsonl holds is not computed again. Methods run in the
order in which they are named, and mean what they do in `benchmarks.quality`:

    dense, steps:N                                                   PyTorch's attention
    residual:KEEP,EVERY[,OPTION...], residual-int8:..., residual-fp8:..., cached:EVERY[,OPTION...], preset:NAME
    threshold:T[,STEPS], tile3d:T[,STEPS], int8:T[,STEPS], fp8:T[,STEPS]
    table:NAME                                                       the file NAME.toml out of --tables
    mean-keys:KEEP,EVERY[,OPTION...], maximum:KEEP,EVERY[,OPTION...] simulated in PyTorch, which takes hours
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lite_attention
from benchmarks import quality_report as reporting
from benchmarks.quality_bench import Budget
from benchmarks.quality_equal_cost import comparisons
from benchmarks.quality_methods import check, enable_options, is_reordered, residual_of, simulated, steps_of
from benchmarks.quality_metrics import Pair, fidelity
from benchmarks.quality_plot import draw
from benchmarks.quality_report import DENSE, FIDELITY, RESIDUAL, SIMULATED, VOTING, Metric, Record, Results, Videos
from benchmarks.quality_shares import DenseShares, ResidualShares, SkipShares
from benchmarks.quality_simulation import Simulation
from lite_attention.cli.arguments import add_device, integer, number
from lite_attention.model_sites import parts_of

PROMPTS = (
    "A red fox walks through fresh snow in a forest, morning light, slow tracking shot",
    "Waves break on black rocks at sunset, spray in the wind, aerial view",
    "A chef slices vegetables on a wooden board in a bright kitchen, close-up of the hands",
    "A tram drives through a rainy city street at night, neon lights reflected on the asphalt",
)
METHODS = (
    "steps:25", "residual:0.3,3", "residual:0.2,3", "steps:30", "threshold:-3", "residual:0.2,5", "threshold:-6",
    "cached:3", "steps:20", "steps:35", "residual:0.3,3,no-forecast", "residual:0.3,3,tile3d", "residual-int8:0.3,3",
    "threshold:-10", "threshold:-inf",
)  # fmt: skip
METRICS = (*(metric for metric in FIDELITY if metric.name in ("psnr", "ssim", "vmaf")),
           Metric("seconds", "time of a video (s)", 1, -1))  # fmt: skip
_FAMILIES = (DENSE, "steps", *RESIDUAL, "preset", *VOTING, "table", *SIMULATED)
_WARM_UP = 2  # steps


def load(path: Path, dtype: str, device: str) -> Any:
    """Return the pipeline of a folder, on a device."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class Pretrained:
    """Runs methods of one pipeline, and adds what is measured to the results.

    Args:
        pipe: not given to `enable`.
        prompts: texts.
        call: arguments of the pipeline that all videos share: num_inference_steps, height, ...
        results: where the records go.
        videos: where all videos are kept.
        tables: threshold files by name.
        budget: of time.
        settings: of `lite_attention.enable`.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        call: dict[str, Any],
        results: Results,
        videos: Videos,
        tables: dict[str, Path],
        budget: Budget,
        **settings: Any,
    ) -> None:
        self.pipe, self.prompts, self.call, self.settings = pipe, prompts, call, settings
        self.results, self.videos, self.tables, self.budget = results, videos, tables, budget

    def run(self, method: str, pairs: Sequence[Pair]) -> None:
        """Compute what there are no records of yet; the dense videos must be there. A short generation goes first."""
        missing = [
            pair for pair in self.results.missing(method, pairs) if method == DENSE or self.videos.has(DENSE, pair)
        ]
        if not missing or not self.budget.allows():
            return
        self._prepare(method)
        self._generate(missing[0], num_inference_steps=_WARM_UP)
        for pair in missing:
            if self.budget.allows():
                with self.budget.batch():
                    self._run(method, pair)

    def _run(self, method: str, pair: Pair) -> None:
        steps = steps_of(method, self.call["num_inference_steps"])
        shares = self._shares_of(method, steps)

        def on_step_end(pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
            shares.after_step(step)
            return callback_kwargs

        start = _now()
        with shares if isinstance(shares, Simulation) else contextlib.nullcontext():
            video = self._generate(pair, num_inference_steps=steps, callback_on_step_end=on_step_end)
        record: Record = {"method": method, "prompt": pair[0], "seed": pair[1], "seconds": _now() - start}
        record["skipped"] = float(shares.shares.mean())
        record["attention"] = (1 - record["skipped"]) * steps / self.call["num_inference_steps"]
        if method != DENSE:
            record |= fidelity(video, self.videos.load(DENSE, pair))
        self.videos.save(method, pair, video)
        self.results.add([record])
        print(f"{method}, prompt {pair[0]}, seed {pair[1]}: {record['seconds']:.1f} s", flush=True)

    def _prepare(self, method: str) -> None:
        lite_attention.disable(self.pipe)
        if method.partition(":")[0] in (DENSE, "steps", *SIMULATED):
            return
        options = enable_options(method, steps_of(method, self.call["num_inference_steps"]), self.tables)
        order: dict[str, Any] = {"token_order": "tile3d"} if is_reordered(method) else {}
        lite_attention.enable(self.pipe, **options, **order, **self.settings)

    def _shares_of(self, method: str, steps: int) -> DenseShares | Simulation:
        """Return what notes the shares of a method that is prepared, or simulates it."""
        wanted, family = simulated(method), method.partition(":")[0]
        if wanted:
            return Simulation(wanted, parts_of(self.pipe).values(), steps)
        if residual_of(method) or family == "preset":
            return ResidualShares(self.pipe, 1, steps)
        return DenseShares(1, steps) if family in (DENSE, "steps") else SkipShares(self.pipe, 1, steps)

    def _generate(self, pair: Pair, **more: Any) -> torch.Tensor:
        """Return a video, uint8 (3, F, H, W), on the CPU."""
        prompt, seed = pair
        generator = torch.Generator().manual_seed(seed)
        arguments = {**self.call, **more, "prompt": self.prompts[prompt], "generator": generator, "output_type": "pt"}
        with torch.no_grad():
            video: torch.Tensor = self.pipe(**arguments).frames[0]  # (F, 3, H, W), 0 to 1
        return (video.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).transpose(0, 1).contiguous()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def markdown(results: Results, methods: Sequence[str], pairs: Sequence[Pair], where: str) -> str:
    """Return the report."""
    call = ", ".join(f"{name} {value}" for name, value in results.about["call"].items())
    prompts, seeds = (len(set(numbers)) for numbers in zip(*pairs, strict=True))
    return "\n".join(
        [
            f"{results.about['pipeline']}, {prompts} prompts x {seeds} seeds, {call}; {where}.",
            "",
            "PSNR and SSIM (Wang et al. 2004, luma) to the dense video of the same prompt and seed, of pixels from 0 "
            "to 255. In brackets: 95 % intervals, bootstrapped over prompts with all their seeds. `skipped` is the "
            "mean over steps and skip-aware sites, the first step included; `attention computed`, the cost, is held "
            "against all steps dense; the time is that of a whole call of the pipeline.",
            "",
            reporting.table(results, methods, METRICS, pairs),
            "",
            reporting.vmaf_note(results, methods, pairs),
            *comparisons(results, methods, pairs),
            "",
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of a diffusers pipeline with its weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and videos")
    parser.add_argument("--prompts", type=Path, help="text file, one a line; four are built in")
    parser.add_argument("--seeds", type=integer(1), default=1, help="of noise, for each prompt")
    parser.add_argument("--steps", type=integer(1), default=50, help="denoising steps")
    parser.add_argument("--height", type=integer(1), default=480, help="pixels")
    parser.add_argument("--width", type=integer(1), default=832, help="pixels")
    parser.add_argument("--frames", type=integer(1), default=81, help="of a video")
    parser.add_argument("--guidance", type=number(), default=5.0, help="of classifier-free guidance")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="see above; dense goes first anyway")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="threshold files, run as table:NAME")
    parser.add_argument("--compile", choices=("no", "blocks", "model"), default="no", help="dense and skip-aware alike")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights"
    )
    parser.add_argument("--budget", type=number(above=0), help="seconds, after which no more videos are begun")
    parser.add_argument("--markdown", type=Path, help="write the report there, too")
    parser.add_argument("--json", type=Path, help="write means and intervals there")
    parser.add_argument("--plot", type=Path, help="draw quality over attention computed there")
    add_device(parser)
    args = parser.parse_args(arguments)
    budget = Budget(args.budget)

    prompts = PROMPTS
    if args.prompts:
        prompts = tuple(line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip())
    call = {
        "num_inference_steps": args.steps, "height": args.height, "width": args.width, "num_frames": args.frames,
        "guidance_scale": args.guidance,
    }  # fmt: skip
    pipe = load(args.pipeline, args.dtype, args.device)
    about = {
        "pipeline": f"{type(pipe).__name__} {args.pipeline.resolve().name}", "call": call, "prompts": prompts,
        "dtype": args.dtype, "device": args.device, "compile": args.compile,
    }  # fmt: skip
    results, videos = Results(args.out / "results.jsonl", about), Videos(args.out / "videos")
    for part in parts_of(pipe).values():
        # `enable` puts its own in the place of what is compiled here, and `disable` gives it back.
        if args.compile == "blocks":
            part.compile_repeated_blocks()  # type: ignore[operator]
        elif args.compile == "model":
            part.compile()
    compile = {"no": False, "blocks": "blocks", "model": True}[args.compile]
    tables = {file.stem: file for file in args.tables}
    methods = list(dict.fromkeys([DENSE, *args.methods, *(f"table:{name}" for name in tables)]))
    for method in methods:
        check(method, tables, _FAMILIES)
        if method.partition(":")[0] in SIMULATED and (is_reordered(method) or args.compile != "no"):
            parser.error(f"--methods: {method} is simulated, which needs --compile no, and goes without tile3d")
    pairs = [(prompt, seed) for seed in range(args.seeds) for prompt in range(len(prompts))]
    bench = Pretrained(pipe, prompts, call, results, videos, tables, budget, compile=compile)
    for method in methods:
        bench.run(method, pairs)
    results.fill_vmaf(videos)

    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    where = f"{args.dtype}, {device}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    report = markdown(results, methods, pairs, where)
    report += (
        f"\n`python -m benchmarks.quality_pretrained {shlex.join(sys.argv[1:] if arguments is None else arguments)}`\n"
    )
    print(report)
    if args.markdown:
        args.markdown.write_text(report)
    if args.json:
        content = {"about": about, "where": where, "methods": reporting.as_json(results, methods, METRICS, pairs)}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    if args.plot:
        draw(results, methods, METRICS, pairs, args.plot)


if __name__ == "__main__":
    main()
