"""What a kernel is compiled for: names that tell all of it, and limits that are checked when it is configured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lite_attention.cute_kernels import launch
from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import RESIDUAL_DTYPES, ChoiceConfig, KernelConfig, QuantizeConfig
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import SM80, SM89, SM90A, SM100

OTHER = dataclasses.replace(SM90A, name="sm_100a", tiles={"none": {64: (192, 128)}})


def test_names_tell_kernels_apart() -> None:
    """One library may hold the kernels of several architectures."""
    configs = kernel_configs(all_variants=True, targets=(SM90A, OTHER))
    assert len({config.name for config in configs}) == len(configs)
    of_other = [config for config in configs if config.target is OTHER]
    assert {config.head_dim for config in of_other if not isinstance(config, ChoiceConfig)} == {64}
    assert all("_sm100a_" in config.name for config in of_other)
    assert "lite_attention_sm90a_skip_bf16_d128_192x80_int8_idk" in {config.name for config in configs}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_kernels_are_those_of_the_tables(quantization: str) -> None:
    found = {
        (c.head_dim, (c.tile_m, c.tile_n))
        for c in kernel_configs()
        if isinstance(c, KernelConfig) and c.quantization.name == quantization
    }
    assert found == set(SM90A.tiles[quantization].items())


@pytest.mark.parametrize(
    ("sizes", "quantization", "message"),
    [
        ((128, 192, 128), "none", "147 of 160|registers"),
        ((256, 128, 80), "none", "bytes of shared memory"),
        ((128, 192, 128), "int8_fp8", "registers"),
        ((128, 192, 80), "int8_fp8", "tile_n: expected a multiple of 32 for 'int8_fp8', got 80"),
        ((128, 192, 72), "none", "tile_n: expected a multiple of 16 for 'none', got 72"),
        ((128, 64, 80), "none", "tile_m: expected 128 or 192, got 64"),
        ((128, 160, 80), "none", "tile_m: expected 128 or 192, got 160"),
    ],
)
def test_what_does_not_fit_is_refused(sizes: tuple[int, int, int], quantization: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelConfig("bf16", *sizes, quantization=QUANTIZATIONS[quantization])


@pytest.mark.parametrize(
    ("op", "head_dim", "rows", "message"),
    [
        ("quantize_key", 96, 112, "head_dim: expected a power of two from 8 to 128 for quantize_key, got 96"),
        ("quantize_query", 256, 16, "head_dim: expected a power of two from 8 to 128 for quantize_query, got 256"),
        ("key_sums", 4, 256, "head_dim: expected a power of two from 8 to 128 for key_sums, got 4"),
        ("quantize_value", 16, 128, "head_dim: expected a power of two from 32 to 128 for quantize_value, got 16"),
        ("quantize_query", 8, 16, "rows: expected a multiple of 32 for quantize_query, got 16"),
        ("quantize_key", 64, 80 + 8, "rows: expected a multiple of 16 for quantize_key, got 88"),
        ("quantize_key", 64, 0, "rows: expected a multiple of 16 for quantize_key, got 0"),
        ("key_sums", 16, 256, "rows: expected a multiple of 512 for key_sums, got 256"),
        ("quantize_value", 64, 192, "rows: expected a multiple of 128 for quantize_value, got 192"),
    ],
)
def test_what_threads_cannot_share_out_is_refused(op: str, head_dim: int, rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(op, "bf16", head_dim, rows)


@pytest.mark.parametrize(
    ("dims", "dtype", "capability", "hip", "compiler", "reason"),
    [
        ((128, 128), torch.bfloat16, (9, 0), None, True, None),
        ((256, 256), torch.float16, (9, 0), None, True, None),
        (
            (128, 128),
            torch.float32,
            (9, 0),
            None,
            True,
            "the Hopper kernel computes in bfloat16 and float16",
        ),
        ((80, 80), torch.bfloat16, (9, 0), None, True, f"the Hopper kernel has head dims {SM90A.head_dims()}, values"),
        ((128, 64), torch.bfloat16, (9, 0), None, True, "the Hopper kernel has head dims"),
        (
            (128, 128),
            torch.bfloat16,
            (7, 5),
            None,
            True,
            "there are kernels for compute capability 8.0, 8.6, 8.7, 8.9, 9.0, 10.0, 10.3, 11.0, 12.0, 12.1, got 7.5",
        ),
        ((128, 128), torch.bfloat16, (9, 0), "6.4", True, "there are kernels for GPUs of NVIDIA, got ROCm 6.4"),
        (
            (128, 128),
            torch.bfloat16,
            (9, 0),
            None,
            False,
            "the CuTe DSL is not installed: pip install",
        ),
    ],
)
def test_why_no_kernel_runs_a_call(
    dims: tuple[int, int], dtype: torch.dtype, capability: tuple[int, int], hip: str | None, compiler: bool,
    reason: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(launch, "has_compiler", lambda: compiler)
    monkeypatch.setattr(launch, "library", lambda: None)
    launch.unsupported_reason.cache_clear()
    got = launch.unsupported_reason(*dims, dtype, torch.device("cuda", 0))
    launch.unsupported_reason.cache_clear()
    assert (got is None) == (reason is None)
    assert reason is None or (got is not None and got.startswith(reason))


def test_the_portable_kernel_has_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [c.name for c in kernel_configs((128,), ("bf16",), targets=(SM80,))]
    for name in ("residual_fp8_bf16_d128_128x64", "residual_fp8_bf16_d128_128x64_int8_k", "choose_tiles"):
        assert f"lite_attention_sm80_{name}" in names
    monkeypatch.setattr(launch, "target_of", lambda *_: SM80)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(launch, "has_compiler", lambda: True)
    monkeypatch.setattr(launch, "library", lambda: None)
    launch.unsupported_reason.cache_clear()
    about = (128, 128, torch.bfloat16, torch.device("cuda", 0))
    for residual in RESIDUAL_DTYPES:
        assert launch.unsupported_reason(*about, residual=residual) is None
        launch.check_supported("residual_attention", *about, residual=residual)
    launch.unsupported_reason.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 192, 64), "tile_m: expected 128, got 192"),
        ((256, 128, 128), "bytes of shared memory"),
        ((256, 128, 160), "236 of 224 registers a thread"),
    ],
)
def test_what_does_not_fit_the_portable_kernel_is_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelConfig("bf16", *sizes, target=SM89)


def test_a_fallback_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    launch.say_once.cache_clear()
    with caplog.at_level("WARNING", "lite_attention"):
        for target in (SM89, SM100, SM100):
            launch.say_once(target)
    assert [record.getMessage() for record in caplog.records] == [f"Blackwell (sm_100): {SM100.notice}"]
    launch.say_once.cache_clear()


def test_rows_far_apart_are_copied() -> None:
    """The portable kernel counts bytes between rows in 32 bits."""
    for apart, as_it_lies in ((2**30 - 8, True), (2**30, False)):
        assert launch.reads((2**40, apart, 128, 1)) == as_it_lies
