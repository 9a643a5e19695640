"""What LiteAttention costs in quality, and saves in time, with real weights: Wan 2.1, LTX-Video and their like.

    python -m benchmarks.quality_pretrained --pipeline PATH --out DIR [--prompts FILE] [--seeds 1] [--steps 50]
        [--height 480] [--width 832] [--frames 81] [--guidance 5] [--methods METHOD ...] [--tables FILE ...]
        [--compile blocks] [--markdown FILE] [--json FILE] [--plot FILE]

From the root of the repository. PATH is a folder in diffusers' format; nothing is downloaded. Every method is compared
with the dense video of the same prompt and seed. What DIR/results.jsonl holds is not computed again. Methods:

    dense          PyTorch's attention
    threshold:T    LiteAttention; -inf skips nothing, and shows what another kernel's rounding does
    table:NAME     LiteAttention with the thresholds of the file NAME.toml out of --tables
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lite_attention
from benchmarks import quality_report as reporting
from benchmarks.quality_metrics import Pair, fidelity
from benchmarks.quality_report import DENSE, FIDELITY, Metric, Record, Results, Videos
from lite_attention.cli.arguments import add_device, integer, number
from lite_attention.model_sites import parts_of

PROMPTS = (
    "A red fox walks through fresh snow in a forest, morning light, slow tracking shot",
    "Waves break on black rocks at sunset, spray in the wind, aerial view",
    "A chef slices vegetables on a wooden board in a bright kitchen, close-up of the hands",
    "A tram drives through a rainy city street at night, neon lights reflected on the asphalt",
)
METHODS = tuple(f"threshold:{threshold}" for threshold in ("-inf", "-10", "-6", "-4", "-3"))
METRICS = (*FIDELITY[:3], Metric("seconds", "time of a video (s)", 1, -1))
_WARM_UP = 2  # steps


def check(method: str, tables: dict[str, Path]) -> None:
    """Check the name of a method.

    Raises:
        ValueError: there is no such method.
    """
    family, _, value = method.partition(":")
    known = {DENSE: method == DENSE, "table": value in tables, "threshold": family == "threshold" and float(value) <= 0}
    if not known.get(family, False):
        names = ", ".join(["dense", "threshold:T", *(f"table:{name}" for name in tables)])
        raise ValueError(f"method {method}: expected one of {names}, T at most 0")


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
        **settings: Any,
    ) -> None:
        self.pipe, self.prompts, self.call, self.settings = pipe, prompts, call, settings
        self.results, self.videos, self.tables = results, videos, tables

    def run(self, method: str, pairs: Sequence[Pair]) -> None:
        """Compute what there are no records of yet; the dense videos must be there. A short generation goes first."""
        missing = self.results.missing(method, pairs)
        if not missing:
            return
        lite_attention.disable(self.pipe)
        if method != DENSE:
            self._enable(method)
        self._generate(missing[0], num_inference_steps=_WARM_UP)
        for pair in missing:
            log = None if method == DENSE else lite_attention.SparsityLog(self.pipe)
            start = _now()
            video = self._generate(pair, **({} if log is None else {"callback_on_step_end": log.on_step_end}))
            seconds = _now() - start
            record: Record = {"method": method, "prompt": pair[0], "seed": pair[1], "seconds": seconds}
            # A step skips what the log says after the one before.
            steps, shares = self.call["num_inference_steps"], None if log is None else log.table().mean(0)
            record["skipped"] = 0.0 if shares is None else float(shares[:-1].sum()) / steps
            record["attention"] = 1 - record["skipped"]
            if method != DENSE:
                record |= fidelity(video, self.videos.load(DENSE, pair))
            self.videos.save(method, pair, video)
            self.results.add([record])
            print(f"{method}, prompt {pair[0]}, seed {pair[1]}: {seconds:.1f} s", flush=True)

    def _enable(self, method: str) -> None:
        family, _, value = method.partition(":")
        threshold = float(value) if family == "threshold" else -math.inf
        steps = self.call["num_inference_steps"]
        lite_attention.enable(self.pipe, threshold=threshold, num_steps=steps, **self.settings)
        if family == "table":
            lite_attention.LiteAttentionRegistry.from_model(self.pipe, mode="load", filename=self.tables[value])

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
            "mean over steps and skip-aware sites, the first step included; the time is that of a whole call of the "
            "pipeline.",
            "",
            reporting.table(results, methods, METRICS, pairs),
            "",
            reporting.vmaf_note(results, methods, pairs),
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
    parser.add_argument("--methods", nargs="+", default=METHODS, help="such as threshold:-6; dense goes first anyway")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="threshold files, run as table:NAME")
    parser.add_argument("--compile", choices=("no", "blocks", "model"), default="no", help="dense and skip-aware alike")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights"
    )
    parser.add_argument("--markdown", type=Path, help="write the report there, too")
    parser.add_argument("--json", type=Path, help="write means and intervals there")
    parser.add_argument("--plot", type=Path, help="draw quality against attention saved there")
    add_device(parser)
    args = parser.parse_args(arguments)

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
        check(method, tables)
    pairs = [(prompt, seed) for prompt in range(len(prompts)) for seed in range(args.seeds)]
    bench = Pretrained(pipe, prompts, call, results, videos, tables, compile=compile)
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
        reporting.draw(results, methods, METRICS, pairs, args.plot)


if __name__ == "__main__":
    main()
