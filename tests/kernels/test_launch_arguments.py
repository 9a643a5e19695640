"""What the launcher hands to kernels is what they are compiled for; seen with the kernels themselves left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from cutlass import Numeric

from lite_attention.cute_kernels import build, launch, launcher, quantize_launcher
from lite_attention.cute_kernels.config import Config, KernelConfig
from lite_attention.ops import SkipState
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import SM90A, SM120, Target

DTYPES = {
    "BFloat16": torch.bfloat16, "Float16": torch.float16, "Float32": torch.float32, "Int32": torch.int32,
    "Int8": torch.int8, "Uint8": torch.uint8,
}  # fmt: skip


def flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Arguments without their groups."""
    for x in arguments:
        yield from flat(x) if isinstance(x, tuple) else (x,)


def check_arguments(config: Config, *arguments: Any) -> None:
    """What TVM-FFI checks before a launch."""
    is_attention = isinstance(config, KernelConfig)
    expected = build._attention_arguments(config) if is_attention else build._quantize_arguments(config)
    sizes: dict[int, int] = {}  # of symbols
    assert [type(x) for x in arguments if isinstance(x, tuple)] == [type(x) for x in expected if isinstance(x, tuple)]
    for want, got in zip(flat(expected), flat(arguments), strict=True):
        if want is None or isinstance(want, Numeric):
            assert (got is None) == (want is None)
            continue
        assert got.dtype == DTYPES[want.element_type.__name__]
        assert got.data_ptr() % want._assumed_align == 0
        assert got.dim() == len(want.shape)
        for size, symbol in zip(got.shape, want.shape, strict=True):
            assert size == (symbol if isinstance(symbol, int) else sizes.setdefault(id(symbol), size))
        for size, stride, symbol in zip(got.shape, got.stride(), want.stride, strict=True):
            fits = stride == symbol if isinstance(symbol, int) else stride % symbol.divisibility == 0
            assert fits or size == 1


@pytest.fixture(params=[SM90A, SM120], ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    """One with each kernel."""
    assert isinstance(request.param, Target)
    return request.param


@pytest.fixture
def launches(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Config, tuple[Any, ...]]]]:
    """Kernels and what they were given, which is checked, of calls with tensors on the CPU."""
    ran: list[tuple[Config, tuple[Any, ...]]] = []

    def run(config: Config, device: torch.device, *arguments: Any) -> None:
        check_arguments(config, *arguments)
        ran.append((config, arguments))

    for module in (launcher, quantize_launcher):
        monkeypatch.setattr(module, "get_kernel", lambda config: config)
        monkeypatch.setattr(module, "check_supported", lambda *_: None)
        monkeypatch.setattr(module, "target_of", lambda *_: target)
    for module in (launcher, launch):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(launcher, "processors", lambda _: 132)
    monkeypatch.setattr(launcher, "turn_of", lambda control: contextlib.nullcontext())
    launcher._skip_plan.cache_clear()
    yield ran
    launcher._skip_plan.cache_clear()


@pytest.mark.parametrize("unaligned", [False, True])
@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_arguments_fit(quantization: str, key_mask: bool, unaligned: bool, target: Target, launches: list[Any]) -> None:
    q, k, v = (torch.randn(2, seq, heads, 129, dtype=torch.bfloat16) for seq, heads in ((70, 6), (333, 3), (333, 3)))
    q, k, v = (x[..., 1:] if unaligned else x[..., 1:].contiguous() for x in (q, k, v))
    tile_m, tile_n = target.tile_shape(128, quantization)
    state = SkipState.for_inputs(q, k, tile_m=tile_m, tile_n=tile_n)
    mask = torch.ones(1, 333, dtype=torch.bool) if key_mask else None
    out, lse = launcher.skip_attention_forward(
        q, k, v, state.skip_mask, state.control, state.threshold, None, None, mask, scale=None, tile_m=tile_m,
        tile_n=tile_n, quantization=quantization,
    )  # fmt: skip
    assert out.shape == q.shape
    assert lse.shape == (2, 6, 70)
    assert len(launches) == {"none": 1, "int8": 4, "int8_fp8": 6}[quantization]
    if quantization == "int8_fp8":
        values, scales = quantize_launcher.quantize_value(v, mask)
        assert values.dtype == torch.float8_e4m3fn
        assert values.shape == (2, 3, 128, 352)
        assert scales.shape == (2, 3, 128)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_int8_gets_values_without_those_of_excluded_keys(
    quantization: str, target: Target, launches: list[Any]
) -> None:
    """Weights made from bits may be a little more than 0 there, and what is masked out may be large."""
    q = torch.randn(2, 100, 2, 128, dtype=torch.bfloat16)
    mask = torch.arange(100).expand(2, -1) % 3 > 0
    v = torch.where(mask[..., None, None], 1.0, 3e38).expand_as(q).to(q.dtype)
    tile_m, tile_n = target.tile_shape(128, quantization)
    state = SkipState.for_inputs(q, q, tile_m=tile_m, tile_n=tile_n)
    launcher.skip_attention_forward(
        q, q, v.contiguous(), state.skip_mask, state.control, state.threshold, None, None, mask, scale=None,
        tile_m=tile_m, tile_n=tile_n, quantization=quantization,
    )  # fmt: skip
    config, (_, _, values, *_) = launches[-1]
    assert isinstance(config, KernelConfig)
    assert torch.equal(values, mask[..., None, None].expand_as(q).to(q.dtype) if quantization == "int8" else v)


def test_one_launch_has_as_many_batch_elements_as_a_grid_can(launches: list[Any]) -> None:
    """65,535 thread blocks in y."""
    assert launch.parts(1) == [slice(0, 1)]
    assert launch.parts(65535) == [slice(0, 65535)]
    assert launch.parts(65536) == [slice(0, 65535), slice(65535, 65536)]
    assert launch.parts(200_000)[-1] == slice(196605, 200_000)


@pytest.mark.parametrize("mask_rows", [None, 1, 70_000])
def test_more_batch_elements_than_one_launch_has(mask_rows: int | None, target: Target, launches: list[Any]) -> None:
    batch, tile_n = 70_000, target.tile_shape(64, "int8")[1]
    x = torch.zeros(batch, 1, 1, 64, dtype=torch.bfloat16)
    mask = None if mask_rows is None else torch.ones(mask_rows, 1, dtype=torch.bool)
    mean = quantize_launcher.key_mean(x, mask)
    results = [mean, *quantize_launcher.quantize_query(x, mean, scale=None)]
    results += quantize_launcher.quantize_key(x, mean, mask, tile_n=tile_n)
    results += quantize_launcher.quantize_value(x, mask)
    assert all(len(result) == batch for result in results)
    ops = ["key_sums", "quantize_query", "quantize_key", "value_max", "quantize_value"]
    assert [config.op for config, _ in launches] == [op for op in ops for _ in range(2)]
    for first, second in zip(launches[::2], launches[1::2], strict=True):
        for a, b in zip(first[1], second[1], strict=True):
            if isinstance(a, torch.Tensor) and not len(a) == len(b) == 1:  # one row of a mask is for all
                assert (len(a), len(b)) == (65535, 4465)
                assert b.data_ptr() == a.data_ptr() + 65535 * a.stride(0) * a.element_size()
