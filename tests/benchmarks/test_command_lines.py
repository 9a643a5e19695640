"""The commands of benchmarks and examples: each has a help, refuses numbers out of range, and says what it lacks."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import diffusers_configs

CHECKOUT = Path(__file__).parents[2]
COMMANDS = [
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
    for folder in ("benchmarks", "examples/moving_shapes")
    for path in sorted((CHECKOUT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]
GPU = ["attention", "ceilings", "host", "model", "portable", "residual_steps", "runner"]
WRONG = """
benchmarks.accuracy --tokens 0
benchmarks.attention --seconds 0
benchmarks.attention --shapes 1,2,3
benchmarks.attention --shapes 1,0,128,64
benchmarks.calibration --steps 0
benchmarks.calibration --error 0
benchmarks.calibration --error nan
benchmarks.calibration --untrained 64 0 16
benchmarks.calibration --size 2 30 32
benchmarks.ceilings --seconds -1
benchmarks.compile_time --head-dims 80
benchmarks.cpu --repeats 0
benchmarks.diffusers_configs --only NoTransformer
benchmarks.cpu --threads 0
benchmarks.cpu --shape 1,8,64
benchmarks.cpu --shape 1,8,many,64
benchmarks.host --sites 0
benchmarks.import_time --processes 0
benchmarks.model --layers 0
benchmarks.model --sparsities 0.4 1.2
benchmarks.model --residual 0.2,3 1.2,3
benchmarks.model --residual 0.3
benchmarks.model --steps 0
benchmarks.parallel --tokens 10
benchmarks.parallel --budget 0
benchmarks.parallel --only everything
benchmarks.portable --shapes 1,2,3
benchmarks.portable --seconds 0
benchmarks.portable --quantizations int4
benchmarks.quality --steps 0
benchmarks.quality --prompts 0
benchmarks.quality --seeds -1
benchmarks.quality --batch 0
benchmarks.quality --keep -1
benchmarks.quality --size 0 24 24
benchmarks.quality --guidance inf
benchmarks.quality --device tpu
benchmarks.quality --solver heun
benchmarks.quality --budget 0
benchmarks.quality --first-prompt -1
benchmarks.quality_pretrained --steps 0
benchmarks.quality_pretrained --frames 1.5
benchmarks.quality_pretrained --dtype int8
benchmarks.quality_pretrained --budget 0
benchmarks.residual_steps --shapes 1,2,3
benchmarks.residual_steps --quantizations int4
benchmarks.runner --layers 0
benchmarks.runner --tokens 8
examples.moving_shapes.demo --steps 0
examples.moving_shapes.demo --threshold 1
examples.moving_shapes.demo --threshold nan
examples.moving_shapes.demo --tile 0
examples.moving_shapes.demo --keep 0
examples.moving_shapes.demo --full-every 0
examples.moving_shapes.demo --seed -1
examples.moving_shapes.demo --size 6 32 33
examples.moving_shapes.demo --prompt shape=star size=big
examples.moving_shapes.judge --minutes 0
examples.moving_shapes.sample --steps 0
examples.moving_shapes.sample --count 0
examples.moving_shapes.sample --guidance nan
examples.moving_shapes.sample --threshold 0.5
examples.moving_shapes.sample --prompt shape=heart
examples.moving_shapes.train --minutes -1
examples.moving_shapes.train --out OUT --minutes 1 --decay-minutes 2
""".strip().splitlines()


def _run(command: str) -> int | str | None:
    """Run a command of ours in this process, and return what it left with."""
    module, *arguments = command.split()
    with pytest.raises(SystemExit) as left:
        importlib.import_module(module).main(arguments)
    return left.value.code


@pytest.mark.parametrize("module", COMMANDS)
def test_help(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(f"{module} --help") == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("command", WRONG)
def test_numbers_out_of_range_are_refused_by_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = re.findall(r"--[\w-]+", command)[-1]
    assert _run(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: argument {option}: .*(expected|invalid choice)", message), message


@pytest.mark.parametrize("name", GPU)
def test_without_a_gpu_a_line_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _run(f"benchmarks.{name}") == "this benchmark measures a GPU, and PyTorch finds no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_the_line_is_all_that_the_process_prints() -> None:
    command = [sys.executable, "-m", "benchmarks.host"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "this benchmark measures a GPU, and PyTorch finds no CUDA device\n"


@pytest.mark.slow
def test_a_class_of_diffusers_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--only", "FluxTransformer2DModel"]
    assert diffusers_configs.main(command) == 0
    assert ["FluxTransformer2DModel", "3 of 3"] in [
        line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()
    ]
    monkeypatch.setattr(diffusers_configs, "MOST_OFF", 0.0)
    assert diffusers_configs.main(command) == 1
