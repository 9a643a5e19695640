"""What the launcher hands to kernels is what they are compiled for; seen with the kernels themselves left out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from cutlass import Numeric

from lite_attention.cute_kernels import build, launch, launcher, quantize_launcher
from lite_attention.cute_kernels.config import ChoiceConfig, Config, KernelConfig, Residual
from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops.processors import leave_processors
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
    expected: list[Any]
    if isinstance(config, KernelConfig):
        expected = build._attention_arguments(config)
    elif isinstance(config, ChoiceConfig):
        expected = build._choice_arguments(config)
    else:
        expected = build._quantize_arguments(config)
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
        monkeypatch.setattr(module, "check_supported", lambda *_, **__: None)
        monkeypatch.setattr(module, "target_of", lambda *_: target)
    for module in (launcher, launch):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(launcher, "processors", lambda _: 132)
    monkeypatch.setattr(launcher, "turn_of", lambda control: contextlib.nullcontext())
    for plan in (launcher._skip_plan, launcher._residual_plan):
        plan.cache_clear()
    yield ran
    for plan in (launcher._skip_plan, launcher._residual_plan):
        plan.cache_clear()


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


def test_processors_that_are_left_free_are_counted_at_each_launch(target: Target, launches: list[Any]) -> None:
    q = torch.randn(1, 200, 2, 128, dtype=torch.bfloat16)
    tile_m, tile_n = target.tile_shape(128)
    state = SkipState.for_inputs(q, q, tile_m=tile_m, tile_n=tile_n)
    for left in (0, 8, 500, 0):
        leave_processors(left)
        launcher.skip_attention_forward(
            q, q, q, state.skip_mask, state.control, state.threshold, None, None, None, scale=None, tile_m=tile_m,
            tile_n=tile_n,
        )  # fmt: skip
    assert [arguments[-1] for _, arguments in launches] == [132, 124, 1, 132]
    assert launcher._skip_plan.cache_info().misses == 1
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match=r"count: expected .*at least 0, got"):
            leave_processors(wrong)  # type: ignore[arg-type]


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


def residual_call(x: torch.Tensor, heads: int, must_do: torch.Tensor | None, **options: Any) -> ResidualState:
    """Call the residual's launcher on x [B, S, 1, D] as queries, keys and values, and return the state."""
    tile_m, tile_n = SM90A.tile_shape(x.shape[3])
    q = x.expand(-1, -1, heads, -1)
    sizes: dict[str, Any] = {"batch": len(x), "heads": heads, "seq_q": x.shape[1], "seq_k": x.shape[1]}
    state = ResidualState(**sizes, value_dim=x.shape[3], tile_m=tile_m, tile_n=tile_n, plan=[2], **options)
    out, lse = launcher.residual_attention_forward(
        q, x, x, *(state._buffers[name] for name in ResidualState.BUFFERS), must_do, None, scale=None, tile_m=tile_m,
        tile_n=tile_n,
    )  # fmt: skip
    assert (out.shape, lse.shape) == (q.shape, (len(x), heads, x.shape[1]))
    return state


@pytest.mark.parametrize("target", [SM90A], indirect=True)
@pytest.mark.parametrize("must_do", [None, torch.ones(1, dtype=torch.int32)])
@pytest.mark.parametrize("stored", ["fp8", "bf16"])
def test_what_a_residual_call_gives_its_three_kernels(
    stored: str, must_do: torch.Tensor | None, launches: list[Any]
) -> None:
    state = residual_call(torch.zeros(2, 500, 1, 128, dtype=torch.bfloat16), 3, must_do, residual_dtype=stored)
    configs, arguments = zip(*launches, strict=True)
    assert [getattr(config, "op", "attention") for config in configs] == ["attention", "count_masses", "choose_tiles"]
    assert configs[0].residual == stored
    mass, counts, decision, control, _, sizes = arguments[1]
    assert (mass.shape, sizes) == ((2, 3, 3, 7), (500, 500, 192, 80))
    residual = next(x for x in arguments[0] if isinstance(x, Residual))
    assert (residual.mass.data_ptr(), residual.decision.data_ptr()) == (mass.data_ptr(), decision.data_ptr())
    assert not any(x.any() for x in (mass, counts, decision))
    spans = sorted((x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in (mass, counts, decision))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert [x.data_ptr() for x in arguments[2][:3]] == [x.data_ptr() for x in (mass, counts, decision)]
    assert arguments[2][4].data_ptr() == state.skip_mask.data_ptr()
    assert control.data_ptr() == state.control.data_ptr()


@pytest.mark.parametrize("target", [SM90A], indirect=True)
def test_the_choice_for_more_batch_elements_than_one_launch_has(launches: list[Any]) -> None:
    """It comes behind attention, which has moved the state by then."""
    state = residual_call(torch.zeros(70_000, 1, 1, 64, dtype=torch.bfloat16), 1, None)
    ops = ["count_masses", "choose_tiles"]
    assert [config.op for config, _ in launches[1:]] == 2 * ops
    for (_, first), (_, second) in zip(launches[1:3], launches[3:], strict=True):
        for a, b in zip(first[:2], second[:2], strict=True):
            assert (len(a), len(b)) == (65535, 4465)
            assert b.data_ptr() == a.data_ptr() + 65535 * a.stride(0) * a.element_size()
    masks = [launches[at][1][4] for at in (2, 4)]
    assert [mask.shape[2] for mask in masks] == [65535, 4465]
    assert masks[1].data_ptr() == state.skip_mask[:, :, 65535:].data_ptr()


@pytest.mark.parametrize("target", [SM90A], indirect=True)
def test_more_tiles_than_masses_can_be_told_apart_are_refused(launches: list[Any]) -> None:
    """524,288 tokens of 64 heads, 8 times; the state is not made either."""
    with FakeTensorMode(), pytest.raises(ValueError, match=r"q, k: expected at most 2147483647 tiles of 192 by 80"):
        residual_call(torch.zeros(8, 524_288, 1, 128, dtype=torch.bfloat16), 64, None)
    assert not launches
