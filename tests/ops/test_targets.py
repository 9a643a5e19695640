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
from lite_attention.ops.targets import CPU, SM80, SM89, SM90, SM90A, TARGETS, Target, target_of
from lite_attention.ops.tiles import tile_shape

OTHER = Target(
    "sm_150", "Other", tiles={"none": {64: (128, 64), 32: (128, 64)}}, dtypes=(torch.float16,),
    capabilities=((15, 0), (15, 1)),
)  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Capabilities of the GPUs here, of which the last one is current; a target more."""
    here = [(9, 0), (15, 1), (7, 5), (8, 9), (15, 0)]
    monkeypatch.setitem(targets.TARGETS, OTHER.name, OTHER)
    cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(here), current_device=lambda: len(here) - 1,
        get_device_capability=torch.compiler.disable(lambda index: here[index]),  # dynamo does not trace C++ either
    )  # fmt: skip
    monkeypatch.setattr(targets, "cuda", cuda)
    targets._capability_of.cache_clear()
    yield here
    targets._capability_of.cache_clear()


@pytest.mark.parametrize(
    ("device", "target", "portable"),
    [
        ("cpu", CPU, CPU), ("meta", CPU, CPU), ("mps", CPU, CPU), ("cuda:0", SM90A, SM90), ("cuda:1", OTHER, SM90),
        ("cuda:3", SM89, SM89), ("cuda:4", OTHER, SM90),
        ("cuda", OTHER, SM90),  # the current one
        ("cuda:2", SM90A, SM90),  # which no kernel runs on
        ("cuda:5", SM90A, SM90),  # which is not here
    ],
)  # fmt: skip
def test_target_of(device: str, target: Target, portable: Target, gpus: list[tuple[int, int]]) -> None:
    for implementation, expected in ((None, target), ("reference", target), ("portable", portable)):
        assert target_of(device, implementation) is target_of(torch.device(device), implementation) is expected
        assert tile_shape(64, None, device, "none", implementation) == expected.tile_shape(64)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_87"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_110"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_the_gpus_that_there_are_kernels_for(
    capability: tuple[int, int], name: str, gpus: list[tuple[int, int]]
) -> None:
    gpus[0] = capability
    target, portable = target_of("cuda:0"), target_of("cuda:0", "portable")
    assert target.name == name
    assert portable.portable
    assert capability in portable.capabilities
    major, minor = divmod(int(portable.name.removeprefix("sm_")), 10)
    assert major == capability[0]  # machine code runs on no other major number
    assert minor <= capability[1]
    assert bool(target.notice) == (capability[0] in (10, 11))
    # States of all GPUs with one kernel have one shape, but for the smallest heads.
    assert {d: t for d, t in portable.tiles["none"].items() if d > 64} == {
        d: t for d, t in SM80.tiles["none"].items() if d > 64
    }
    assert portable.tiles["int8"] == SM80.tiles["int8"]


def test_without_a_gpu_it_is_the_first_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "cuda", types.SimpleNamespace(is_available=lambda: False))
    assert target_of("cuda") is target_of("cuda:7") is SM90A is next(iter(TARGETS.values()))
    assert target_of("cuda", "portable") is SM90


def test_compiled_code_takes_the_target_for_a_constant(gpus: list[tuple[int, int]]) -> None:
    def shapes(x: torch.Tensor) -> torch.Tensor:
        for device in ("cuda:0", "cuda:1", "cpu"):
            for head_dim in (64, 128):
                for implementation in (None, "portable"):
                    tile_m, tile_n = tile_shape(head_dim, x.dtype, torch.device(device), "none", implementation)
                    x = 5 * x + tile_m + tile_n
        quantizes = target_of(torch.device("cuda:0")).quantizes(96, "int8")
        return x + 0.5 if quantizes else x

    x = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(torch.compile(shapes, fullgraph=True, backend="eager")(x), shapes(x))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "reason"),
    [
        (64, 64, torch.float16, None),
        (64, 64, torch.bfloat16, "the Other kernel computes in float16, got torch.bfloat16"),
        (128, 128, torch.float16, "the Other kernel has head dims (64, 32), values alike, got 128 and 128"),
        (64, 32, torch.float16, "the Other kernel has head dims (64, 32), values alike, got 64 and 32"),
    ],
)
def test_unsupported_reason(head_dim: int, value_dim: int, dtype: torch.dtype, reason: str | None) -> None:
    assert OTHER.unsupported_reason(head_dim, value_dim, dtype) == reason


def test_a_quantization_that_a_target_lacks() -> None:
    with pytest.raises(ValueError, match="quantization: expected head dims none for 'int8', got 64"):
        OTHER.tile_shape(64, "int8")
    assert not OTHER.quantizes(64, "int8")
    assert OTHER.quantizes(17, "none")  # what runs then, `unsupported_reason` says
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
