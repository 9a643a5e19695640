"""What a kernel is compiled for: names that tell all of it, and limits that are checked when it is configured."""

from __future__ import annotations

import dataclasses

import pytest

from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import KernelConfig, QuantizeConfig
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import SM90A

OTHER = dataclasses.replace(SM90A, name="sm_100a", tiles={"none": {64: (192, 128)}})


def test_names_tell_kernels_apart() -> None:
    """One library may hold the kernels of several architectures."""
    configs = kernel_configs(all_variants=True, targets=(SM90A, OTHER))
    assert len({config.name for config in configs}) == len(configs)
    of_other = [config for config in configs if config.target is OTHER]
    assert {config.head_dim for config in of_other} == {64}
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
