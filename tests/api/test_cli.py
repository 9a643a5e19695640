"""The command line: what it prints, draws and refuses."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention import LiteAttention, ThresholdTable
from lite_attention.cli import bench, check, main, timing
from lite_attention.ops.methods import METHODS
from lite_attention.ops.plan import SPARSE
from lite_attention.ops.targets import TARGETS

NEVER = -math.inf


def test_inspect_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "thresholds.toml", tmp_path / "thresholds.png"
    table = ThresholdTable(
        {"blocks.0.attn1": torch.tensor([[[-4.0, -2.0], [-3.0, -9.0]]]), "b": torch.tensor([[[NEVER]]])},
        tile_shapes={"blocks.0.attn1": (192, 80)},
        model_class="WanTransformer3DModel",
        resolution=(81, 480, 832),
        reached={"calibration": 0.0093},
    )
    table.save(file)
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "model_class: WanTransformer3DModel\n" in printed
    assert "resolution: 81, 480, 832\n" in printed
    assert "calibration: 0.0093\n" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["blocks.0.attn1", "192x80", "all", "2", "2", "-9.000", "-4.000", "-2.000"] in rows
    assert ["b", "all", "all", "all", "-inf", "-inf", "-inf"] in rows

    pytest.importorskip("matplotlib")
    assert main(["inspect", str(file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_tells_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    for content in (None, "version = 7"):
        if content:
            wrong.write_text(content)
        assert main(["inspect", str(wrong)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("lite-attention: ")
        assert str(wrong) in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lite-attention {lite_attention.__version__}\n"


def test_check_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert ["torch", torch.__version__] in [line.split() for line in printed]
    assert "head dim 128        CPU kernel (cpu), tiles 64x64" in printed
    assert printed[-1] == "works"


@pytest.mark.parametrize(
    ("built_for", "driver", "said"),
    [
        (None, "unknown", "was built without CUDA; install a build for CUDA"),
        ("13.0", "unknown", "there is no driver of NVIDIA, nvidia-smi does not run; install one"),
        ("13.0", "525.60", "though driver 525.60 is there; torch was built for 13.0, which may need a newer driver"),
    ],
)
def test_check_says_why_there_is_no_gpu(
    built_for: str | None,
    driver: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(check, "driver", lambda: driver)
    assert main(["check"]) == 1
    *_, before, last = capsys.readouterr().out.splitlines()
    assert before == "the CPU kernel works, which --device cpu asks for alone"
    assert last.startswith("no GPU: ")
    assert said in last
    assert main(["check", "--device", "cpu"]) == 0  # what was asked for is there


def wrong_by(error: float) -> Callable[..., torch.Tensor]:
    def attend(right: Callable[..., torch.Tensor], *args: Any, implementation: str | None = None) -> torch.Tensor:
        out = right(*args, implementation=implementation)
        return out if implementation == "reference" else out + error

    return attend


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (wrong_by(0.1), "is off by 0.1"),
        (wrong_by(math.nan), "is off by inf, at most 0.02 was expected"),
        (lambda *_, **__: 1 / 0, "fails: ZeroDivisionError: division by zero"),
    ],
)
def test_check_says_what_is_wrong(
    attend: Callable[..., torch.Tensor], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in METHODS:
        attends = METHODS[method]._replace(attend=functools.partial(attend, METHODS[method].attend))
        monkeypatch.setattr(check, "METHODS", METHODS | {method: attends})
        assert main(["check", "--device", "cpu"]) == 1
        printed = capsys.readouterr().out.splitlines()
        assert printed[-2].startswith(f"head dim 64, method {method!r}, {said}")
        assert "works" not in printed


def test_check_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the CuTe DSL is not installed"
    monkeypatch.setattr("lite_attention.cute_kernels.unsupported_reason", lambda *_, **of: f"{reason} {of}")
    of_votes, of_residual = (check._problem(64, method, torch.device("cuda")) for method in METHODS)
    assert of_votes == f"head dim 64, method 'votes', does not run: {reason} {{'residual': ''}}"
    assert of_residual == f"head dim 64, method 'residual', does not run: {reason} {{'residual': 'fp8'}}"


def test_compile_kernels_takes_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        "lite_attention.cute_kernels.aot.compile_library", lambda configs, out: compiled.extend(c.name for c in configs)
    )
    options = ["--out", str(tmp_path), "--head-dims", "128", "--dtypes", "bf16"]
    for arch, expected in (
        ([], {"sm90a"}),  # as there is no GPU here, or a Hopper one
        (["--arch", "sm_80", "sm_120"], {"sm80", "sm120"}),
        (["--arch", "all"], {target.symbol for target in TARGETS.values()}),
    ):
        compiled.clear()
        assert main(["compile-kernels", *options, *arch]) == 0
        assert {name.removeprefix("lite_attention_").split("_")[0] for name in compiled} == expected
    with pytest.raises(SystemExit):
        main(["compile-kernels", *options, "--arch", "sm_75"])


# ---- bench ---------------------------------------------------------------------------------------------------------


def test_bench_prints_saves_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    command = ["bench", "--device", "cpu", "--shape", "1,2,300,32", "--seconds", "0.01"]
    assert main([*command, "--json", str(saved), "--plot", str(picture)]) == 0
    found = json.loads(saved.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert [*rows] == ["PyTorch, dense", "dense", "votes", "preset balanced"]
    assert found["shape"] == [1, 2, 300, 32]
    assert all(row["ms"] > 0 for row in rows.values())
    assert (rows["PyTorch, dense"]["ratio"], rows["dense"]["computed"]) == (1, 1)
    assert 0 < rows["votes"]["computed"] < 1
    assert rows["preset balanced"]["computed"] == pytest.approx(0.58)
    assert "58%" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_goes_on_without_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel\nbelow: a trace")

    monkeypatch.setattr(bench, "_votes", refuse)
    assert main(["bench", "--device", "cpu", "--shape", "1,1,130,16", "--seconds", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "left out: votes: no such kernel\n" in printed
    assert "preset balanced" in printed


def test_bench_times_a_generation_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's call is a generation, in which the tiles are computed that the table says; then it starts anew."""
    kinds: list[int] = []

    class Recording(LiteAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            step = 0 if self.state is None else self.state.step()
            out = super().forward(*args, **kwargs)
            kinds.append(int(self.state.plan[step]))  # type: ignore[union-attr, index]
            return out

    monkeypatch.setattr(bench, "LiteAttention", Recording)
    contender = bench._preset("preset", *torch.randn(3, 1, 300, 2, 32), "none")
    contender.call()
    assert len(kinds) == contender.steps == 20
    assert sum(0.3 if kind == SPARSE else 1.0 for kind in kinds) / 20 == pytest.approx(contender.computed)
    contender.call()
    assert kinds[20:] == kinds[:20]


@pytest.mark.parametrize("command", ["bench --device cpu", "inspect none.toml"])
def test_a_picture_that_cannot_be_drawn_is_told_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--plot", str(tmp_path / "none" / "a.png")])
    assert "argument --plot: expected a file in a folder that exists, got " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import fails
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--plot", str(tmp_path / "a.png")])
    said = capsys.readouterr().err
    assert 'argument --plot: pictures need matplotlib: pip install "lite-attention[plot]", got' in said


def test_bench_refuses_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--shape", "1,2,3"])
    assert "expected four sizes B,H,S,D, got '1,2,3'" in capsys.readouterr().err


def test_a_block_is_the_median_of_its_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 9.0, 8.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(timing, "_once", lambda call: next(times))
    assert timing.block(lambda: None, 0.0, torch.device("cpu"), least=5) == 2.0
