"""The command `bench`: the table of the README, measured here."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lite_attention import LiteAttention
from lite_attention._version import __version__
from lite_attention.cli.arguments import add_device, new_file, number, picture, shape
from lite_attention.cli.planted import planted, skipping
from lite_attention.cli.timing import block
from lite_attention.ops import attention, step_plan
from lite_attention.presets import PRESETS, computed_share
from lite_attention.tables import text_table

__all__ = ["add_parser", "draw", "main"]

_SHAPES = {"cuda": (1, 40, 32760, 128), "cpu": (1, 2, 2048, 64)}  # the first: Wan 14B, 81 frames of 480 x 832
_FORMATS = {"": "none", ", INT8": "int8", ", INT8 and FP8": "int8_fp8"}
_PLANTED = 0.42  # share of tiles that votes skip: about what the preset does
_PRESET, _STEPS = "balanced", 20
_PYTORCH = "PyTorch, dense"
_FA3 = "FlashAttention-3, dense"  # where it is installed


class Contender(NamedTuple):
    """What is timed: its name, a call, how many steps of attention that is, and the share of tiles it computes."""

    name: str
    call: Callable[[], Any]
    steps: int
    computed: float


class Row(NamedTuple):
    """A line of the table: ms of one attention call, and over PyTorch's before and after it."""

    name: str
    computed: float
    ms: float
    ratio: float


def add_parser(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "bench",
        help="time attention here, skipping and dense, against PyTorch's",
        description="Times one attention call, bf16, against PyTorch's scaled_dot_product_attention, which runs before "
        "and after each. Inputs are random; the tiles that votes skip are planted. The preset's time is the mean of a "
        f"step of {_STEPS}, full steps included. Kernels are compiled outside of the times.",
    )
    add_device(parser)
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="B,H,S,D",
        help="batch, heads, tokens and head dim; those of a layer of Wan 14B at 480p unless given",
    )
    parser.add_argument(
        "--seconds", type=number(above=0), default=0.7, help="length of a block of calls; 0.7 unless given"
    )
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help='picture to write; needs the extra "plot"')
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there, too")
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    """Measure, print, draw and save what the command line asks for, and return the exit status."""
    device = torch.device(args.device)
    sizes = args.shape or _SHAPES[device.type]
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "shape": list(sizes),
        "lite-attention": __version__, "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows, left_out = measure(sizes, device, args.seconds)
    print(_table(rows))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": [row._asdict() for row in rows]}, indent=1))
    if args.plot is not None:
        draw(rows, f"{about['device']}, {sizes[2]:,} tokens, {about['date']}", args.plot)
        print(f"picture: {args.plot}")
    return 0 if len(rows) > 1 else 1


def measure(sizes: tuple[int, ...], device: torch.device, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """Return the rows, PyTorch's first, and why some are missing."""
    batch, heads, seq, dim = sizes
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(batch, seq, heads, dim, device=device, dtype=dtype) for _ in range(3))
    peer = _pytorch(q, k, v)
    rows, left_out, of_peer = [], {}, []
    with torch.no_grad():
        for name, make in _contenders(q, k, v):
            try:
                contender = make()
                contender.call()  # compiles outside of the blocks, and fails before PyTorch is timed for it
                before = block(peer, seconds, device)
                ms = block(contender.call, seconds, device) / contender.steps
                after = block(peer, seconds, device)
            except Exception as error:  # whatever the compiler or the driver has to say
                left_out[name] = next(iter(str(error).strip().splitlines()), type(error).__name__)
                continue
            of_peer += [before, after]
            rows.append(Row(name, contender.computed, ms, ms / ((before + after) / 2)))
    mean = sum(of_peer) / len(of_peer) if of_peer else block(peer, seconds, device)
    return [Row(_PYTORCH, 1.0, mean, 1.0), *rows], left_out


def _contenders(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Contender]]]:  # fmt: skip
    """Yield names, and what makes each ready."""
    if q.is_cuda and find_spec("fa3_fwd_interface"):
        yield _FA3, lambda: Contender(_FA3, _flash_attention_3(q, k, v), 1, 1.0)
    yield "dense", lambda: Contender("dense", lambda: attention(q, k, v), 1, 1.0)
    formats = _FORMATS if q.is_cuda else {"": "none"}  # the CPU only emulates the others
    for suffix, quantization in formats.items():
        votes, preset = f"votes{suffix}", f"preset {_PRESET}{suffix}"
        yield votes, lambda name=votes, of=quantization: _votes(name, q, k, v, of)  # type: ignore[misc]
        yield preset, lambda name=preset, of=quantization: _preset(name, q, k, v, of)  # type: ignore[misc]


def _pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: F.scaled_dot_product_attention(qh, kh, vh)


def _flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from fa3_fwd_interface import flash_attn_func

    return lambda: flash_attn_func(q, k, v)


def _votes(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, quantization: str) -> Contender:
    heads = q.shape[2]
    state = planted(q, k, v, lambda *tiles: torch.rand(heads, *tiles) < _PLANTED, quantization=quantization)
    call, skipped = skipping(q, k, v, state, quantization=quantization)
    return Contender(name, call, 1, 1 - skipped)


def _preset(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, quantization: str) -> Contender:
    keep, full_every = PRESETS[_PRESET]
    module = LiteAttention(
        method="residual", keep=keep, full_every=full_every, num_steps=_STEPS, slots=1,
        quantization=quantization,  # type: ignore[arg-type]
    )  # fmt: skip

    def generation() -> None:
        for _ in range(_STEPS):
            module(q, k, v)

    return Contender(name, generation, _STEPS, computed_share(step_plan(_STEPS, full_every=full_every), keep))


def _table(rows: list[Row]) -> str:
    header = ["", "tiles computed", "ms", "time / PyTorch"]
    return text_table(header, ([r.name, f"{r.computed:.0%}", f"{r.ms:.2f}", f"{r.ratio:.2f}"] for r in rows))


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the time of each row over PyTorch's, as bars."""
    from lite_attention.plot import new_figure

    figure = new_figure(7.0, 0.8 + 0.4 * len(rows), title)
    axes = figure.subplots()
    bars = axes.barh([r.name for r in rows], [r.ratio for r in rows], color=["0.6", *["tab:orange"] * (len(rows) - 1)])
    axes.bar_label(bars, [f"{r.ratio:.2f}" for r in rows], padding=3)
    axes.set(xlabel="time of attention / PyTorch's", xlim=(0, 1.15 * max(r.ratio for r in rows)))
    axes.invert_yaxis()
    figure.savefig(path)
