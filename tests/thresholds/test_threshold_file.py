"""Threshold files: what is written is read again, a person can read it, and what is no such file is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention import ThresholdTable

NEVER = -math.inf

ABOUT: dict[str, Any] = {
    "model_class": "WanTransformer3DModel",
    "model": 'Wan-AI/Wan2.1 "1.3B" \\ é\x7f\n',
    "dtype": "bfloat16",
    "tokens": 32760,
    "resolution": (81, 480, 832),
    "num_steps": 3,
    "branches": ("cond", "uncond"),
    "metric": "L1",
    "target_error": 0.01,
    "reached": {"calibration": 0.0093, "held out": {"fox": 0.011, "sea": 1e-07}, "seeds": [0, 1], "ok": True},
    "library_version": "0.1.0",
    "date": "2026-11-22",
}


def _table(threshold: Any, **about: Any) -> ThresholdTable:
    return ThresholdTable({"blocks.0.attn1": torch.as_tensor(threshold, dtype=torch.float32)}, **about)


def _again(table: ThresholdTable, tmp_path: Path) -> ThresholdTable:
    table.save(tmp_path / "thresholds.toml")
    return ThresholdTable.load(tmp_path / "thresholds.toml")


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    thresholds = {
        "blocks.0.attn1": -8 * torch.rand(2, 3, 4, generator=generator),
        'odd "name"\\ é': -8 * torch.rand(1, 3, 4, generator=generator),
        "": torch.tensor([[[NEVER, -1.0]], [[-2.0, NEVER]]]),
    }
    table = ThresholdTable(thresholds, tile_shapes={"blocks.0.attn1": (192, 80)}, **ABOUT)
    loaded = _again(table, tmp_path)
    assert {name: getattr(loaded, name) for name in ABOUT} == ABOUT
    assert loaded.tile_shapes == table.tile_shapes
    assert list(loaded.thresholds) == list(thresholds)
    for site, threshold in thresholds.items():
        torch.testing.assert_close(loaded.thresholds[site], threshold, rtol=0, atol=5.1e-4)
    assert _again(loaded, tmp_path).to_toml() == loaded.to_toml()


@pytest.mark.parametrize(
    ("threshold", "shape", "written"),
    [
        (torch.full((2, 50, 40), -6.0), (1, 1, 1), "threshold = -6.0\n"),
        (torch.full((1, 50, 40), NEVER), (1, 1, 1), "threshold = -inf\n"),
        (torch.full((1, 1, 1), -0.0001), (1, 1, 1), "threshold = 0.0\n"),
        (
            torch.tensor([[[NEVER], [-6.1234567]]]).expand(2, 2, 4),
            (1, 2, 1),
            "threshold = [\n    -inf,\n    -6.123,\n]\n",
        ),
        (torch.tensor([[[-1.0, -2.5]]]).expand(1, 7, 2), (1, 1, 2), "threshold = [\n    [-1.0, -2.5],\n]\n"),
        (
            torch.tensor([[[-1.0, -1.0], [-2.0, -3.0]]]),
            (1, 2, 2),
            "threshold = [\n    -1.0,\n    [-2.0, -3.0],\n]\n",
        ),
        (
            torch.tensor([[[-1.0], [-1.0]], [[-2.0], [-3.0]]]),
            (2, 2, 1),
            "threshold_of_slot_0 = -1.0\nthreshold_of_slot_1 = [\n    -2.0,\n    -3.0,\n]\n",
        ),
    ],
)
def test_what_is_the_same_for_all_is_written_once(
    threshold: torch.Tensor, shape: tuple[int, ...], written: str, tmp_path: Path
) -> None:
    table = _table(threshold)
    assert table.to_toml().endswith(f'\n[sites."blocks.0.attn1"]\n{written}')
    loaded = _again(table, tmp_path).thresholds["blocks.0.attn1"]
    assert tuple(loaded.shape) == shape
    torch.testing.assert_close(loaded.expand_as(threshold), threshold, rtol=0, atol=5.1e-4)


def test_reads_well() -> None:
    table = ThresholdTable(
        {"blocks.0.attn1": torch.tensor([[[-6.04999, NEVER], [-5.0, -5.0]]])},
        tile_shapes={"blocks.0.attn1": (192, 80)},
        num_steps=2,
        branches=("cond", "uncond"),
        reached={"error": 0.038635779048525595, "held out": {"a fox": 0.05}},
    )
    assert (
        table.to_toml().partition("\n")[2]
        == """version = 1

[about]
num_steps = 2
branches = ["cond", "uncond"]

[about.reached]
error = 0.0386358
"held out" = { "a fox" = 0.05 }

[sites."blocks.0.attn1"]
tile_shape = [192, 80]
threshold = [
    [-6.05, -inf],
    -5.0,
]
"""
    )


def test_file_of_the_cuda_project(tmp_path: Path) -> None:
    path = tmp_path / "theirs.toml"
    path.write_text(
        """
[["blocks.0.attn1"]]
_type = "LiteAttentionRunConfig"
threshold = -7.5

[["blocks.1.attn1"]]
_type = "LiteAttentionDisabledConfig"

[["blocks.1.attn1"]]
_type = "LiteAttentionRunConfig"
threshold = -3
"""
    )
    table = ThresholdTable.load(path)
    assert torch.equal(table.thresholds["blocks.0.attn1"], torch.tensor([[[-7.5]]]))
    assert torch.equal(table.thresholds["blocks.1.attn1"], torch.tensor([[[NEVER], [-3.0]]]))
    assert table.model_class is table.num_steps is None
    path.write_text('[["a"]]\n_type = "LiteAttentionCalibConfig"\ntarget_error = 0.01\n')
    with pytest.raises(ValueError, match=r"theirs.toml: a: expected .*RunConfig with a threshold, got .*CalibConfig"):
        ThresholdTable.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not toml", "expected a TOML file, got one that is not: "),
        (b"\xff\xfe", "expected a TOML file, got one that is not: "),
        (b"", "version: expected a number, at most 1, got None"),
        (b"[tool.ruff]\nline-length = 3", "version: expected a number"),
        (b"version = true\nsites = {a = {threshold = -1}}", "version: expected a number, at most 1, got True"),
        (b"version = 0\nsites = {a = {threshold = -1}}", "version: expected a number, at most 1, got 0"),
        (b"a = " + b"[" * 5000, "expected a TOML file, got one that is not: "),
        (b"version = 2\nnews = 3", "version: expected at most 1, got 2: written by a newer lite_attention"),
        (b"version = 1", "sites: expected a table for each site, got None"),
        (b"version = 1\nsites = {a = 3}", "sites: expected a table for each site"),
        (b"version = 1\nabout = 3\nsites = {a = {threshold = -1}}", "about: expected a table, got 3"),
        (b"version = 1\nabout = {reached = 1}\nsites = {a = {threshold = -1}}", "reached: expected a dict, got 1"),
        (b"version = 1\nabout = {color = 'red'}\nsites = {a = {threshold = -1}}", "got color"),
        (b"version = 1\nabout = {num_steps = '50'}\nsites = {a = {threshold = -1}}", "num_steps: expected int or None"),
        (b"version = 1\nabout = {branches = 'a'}\nsites = {a = {threshold = -1}}", "branches: expected a tuple of str"),
        (b"version = 1\nsites = {a = {}}", "a: expected threshold, or threshold_of_slot_0"),
        (b"version = 1\nsites = {a = {treshold = -1}}", "a: expected threshold, .* got treshold"),
        (b"version = 1\nsites = {a = {threshold = []}}", "threshold of a: expected a number, or a row for each step"),
        (b"version = 1\nsites = {a = {threshold = [[]]}}", "threshold of a: expected some numbers or one in row 0"),
        (b"version = 1\nsites = {a = {threshold = 'low'}}", "threshold of a: expected 1 numbers or one in row 0"),
        (b"version = 1\nsites = {a = {threshold = true}}", r"got \[True\]"),
        (
            b"version = 1\nsites = {a = {threshold = [-1, [-1, -2], [-1, -2, -3]]}}",
            "expected 3 numbers or one in row 1",
        ),
        (b"version = 1\nsites = {a = {threshold = -1" + b"0" * 400 + b"}}", "threshold of a: .* a float can hold"),
        (b"version = 1\nsites = {a = {threshold = [[-1, -1" + b"0" * 400 + b"]]}}", "threshold of a: .* a float can"),
        (b'[["a"]]\n_type = "LiteAttentionRunConfig"\nthreshold = -1' + b"0" * 400, "a: .* a float can hold"),
        (b"version = 1\nsites = {a = {threshold = nan}}", "threshold: expected numbers, got NaN"),
        (
            b"version = 1\nsites = {a = {threshold = -1, tile_shape = 64}}",
            r"tile_shape of a: expected \[tile_m, tile_n",
        ),
        (b"version = 1\nsites = {a = {threshold = -1, tile_shape = [64, 0]}}", r"tile_shape of a: expected \[tile_m"),
        (
            b"version = 1\nsites.a = {threshold_of_slot_0 = [-1, -2], threshold_of_slot_1 = [-1, -2, -3]}",
            "a: expected all slots with the same number of steps",
        ),
    ],
)
def test_refuses_what_is_no_threshold_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"wrong\.toml: .*{message}"):
        ThresholdTable.load(path)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_bytes(b"\xef\xbb\xbf" + _table([[[-3.0]]]).to_toml().encode())
    assert float(ThresholdTable.load(path)["blocks.0.attn1"]) == -3


def test_is_a_mapping_of_thresholds_by_site() -> None:
    table = ThresholdTable({"a": torch.full((1, 1, 1), -3.0), "b": torch.full((1, 1, 1), -4.0)})
    assert [*table] == ["a", "b"]
    assert {site: float(threshold) for site, threshold in table.items()} == {"a": -3, "b": -4}


def test_a_file_of_0_1(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    path.write_text(
        "# LiteAttention thresholds, log2 units: a row for each step, in it a number for each head; one stands for all."
        """
version = 1

[about]
model_class = "WanTransformer3DModel"
model = "/models/wan/transformer"
dtype = "bfloat16"
tokens = 32760
resolution = [81, 480, 832]
num_steps = 2
branches = ["cond", "uncond"]
metric = "L1"
target_error = 0.05
library_version = "0.1.0"
date = "2026-11-22"

[about.reached]
error = 0.0386358

[sites."blocks.0.attn1"]
tile_shape = [192, 80]
threshold = [
    [-6.05, -inf],
    -5.0,
]
"""
    )
    table = ThresholdTable.load(path)
    assert table["blocks.0.attn1"].tolist() == [[[pytest.approx(-6.05), NEVER], [-5.0, -5.0]]]
    assert (table.model_class, table.tokens, table.path) == ("WanTransformer3DModel", 32760, path)
    assert table.to_toml() == path.read_text()


def test_refuses_tables_that_no_file_could_hold() -> None:
    for thresholds in (None, [-1.0], "a.toml"):
        with pytest.raises(ValueError, match="thresholds: expected a dict, got"):
            ThresholdTable(thresholds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"thresholds of a: expected \(slots or 1, .*, got -3"):
        ThresholdTable({"a": -3.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"thresholds of blocks.0.attn1: expected \(slots or 1, .*, got \(2, 3\)"):
        _table(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"tokens: expected int or None, got 1\.5"):
        _table([[[-1.0]]], tokens=1.5)
    with pytest.raises(ValueError, match="expected strings, numbers, lists and dicts of them, got NoneType"):
        _table([[[-1.0]]], reached={"error": None}).to_toml()
