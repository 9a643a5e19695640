"""Targets: which one a device is for, and what it says of itself."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator

import pytest
import torch

from lite_attention.ops import targets
from lite_attention.ops.quantization import QUANTIZATIONS, QuantizationName
from lite_attention.ops.targets import CPU, SM90A, TARGETS, Target, target_of
from lite_attention.ops.tiles import tile_shape

SM120 = Target(
    "sm_120", "Blackwell", tiles={"none": {64: (128, 64), 32: (128, 64)}}, dtypes=(torch.float16,),
    capabilities=((12, 0), (12, 1)),
)  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Capabilities of the GPUs here, of which the last one is current; a second target."""
    here = [(9, 0), (12, 1), (8, 0), (12, 0)]
    monkeypatch.setitem(targets.TARGETS, SM120.name, SM120)
    cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(here), current_device=lambda: len(here) - 1,
        get_device_capability=torch.compiler.disable(lambda index: here[index]),  # dynamo does not trace C++ either
    )  # fmt: skip
    monkeypatch.setattr(targets, "cuda", cuda)
    targets._capability_of.cache_clear()
    yield here
    targets._capability_of.cache_clear()


@pytest.mark.parametrize(
    ("device", "target"),
    [
        ("cpu", CPU), ("meta", CPU), ("mps", CPU), ("cuda:0", SM90A), ("cuda:1", SM120), ("cuda:3", SM120),
        ("cuda", SM120),  # the current one
        ("cuda:2", SM90A),  # which no kernel runs on
        ("cuda:4", SM90A),  # which is not here
    ],
)  # fmt: skip
def test_target_of(device: str, target: Target, gpus: list[tuple[int, int]]) -> None:
    assert target_of(device) is target_of(torch.device(device)) is target
    assert tile_shape(64, None, device) == target.tile_shape(64)


def test_without_a_gpu_it_is_the_first_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "cuda", types.SimpleNamespace(is_available=lambda: False))
    assert target_of("cuda") is target_of("cuda:7") is SM90A is next(iter(TARGETS.values()))


def test_compiled_code_takes_the_target_for_a_constant(gpus: list[tuple[int, int]]) -> None:
    def shapes(x: torch.Tensor) -> torch.Tensor:
        for device in ("cuda:0", "cuda:1", "cpu"):
            for head_dim in (64, 128):
                tile_m, tile_n = tile_shape(head_dim, x.dtype, torch.device(device))
                x = 1000 * x + tile_m + tile_n
        quantizes = target_of(torch.device("cuda:0")).quantizes(96, "int8")
        return x + 0.5 if quantizes else x

    x = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(torch.compile(shapes, fullgraph=True, backend="eager")(x), shapes(x))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "reason"),
    [
        (64, 64, torch.float16, None),
        (64, 64, torch.bfloat16, "the Blackwell kernel computes in float16, got torch.bfloat16"),
        (128, 128, torch.float16, "the Blackwell kernel has head dims (64, 32), values alike, got 128 and 128"),
        (64, 32, torch.float16, "the Blackwell kernel has head dims (64, 32), values alike, got 64 and 32"),
    ],
)
def test_unsupported_reason(head_dim: int, value_dim: int, dtype: torch.dtype, reason: str | None) -> None:
    assert SM120.unsupported_reason(head_dim, value_dim, dtype) == reason


def test_a_quantization_that_a_target_lacks() -> None:
    with pytest.raises(ValueError, match="quantization: expected head dims none for 'int8', got 64"):
        SM120.tile_shape(64, "int8")
    assert not SM120.quantizes(64, "int8")
    assert SM120.quantizes(17, "none")  # what runs then, `unsupported_reason` says
    assert CPU.quantizes(17, "int8")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_tables_are_of_whole_products(target: Target, quantization: str) -> None:
    for head_dim in target.head_dims(quantization):
        _, tile_n = target.tile_shape(head_dim, quantization)
        assert tile_n % QUANTIZATIONS[quantization].key_multiple == 0
        assert head_dim in target.head_dims()


def test_editors_know_all_quantizations() -> None:
    assert typing.get_args(QuantizationName) == tuple(QUANTIZATIONS)


def test_records_are_values() -> None:
    assert hash(dataclasses.replace(SM90A)) == hash(SM90A)
    assert dataclasses.replace(SM90A) == SM90A
    assert repr(SM90A) == "<target sm_90a>"
    assert SM90A.symbol == "sm90a"
    assert [repr(q) for q in QUANTIZATIONS.values()] == [f"<quantization {name}>" for name in QUANTIZATIONS]
