"""Every kernel compiles for its target without a GPU, keeps its registers, and uses the tensor cores as it should.

A change that spills, or makes ptxas serialize the asynchronous products, would cost half the speed and no test of
numbers would see it.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import ChoiceConfig, KernelConfig, QuantizeConfig
from lite_attention.ops.targets import SM90A
from tests.support.kernel_builds import Builds, checked_code, compile_all, count

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kernels")]  # compiled once, not once a worker

BF16 = kernel_configs(dtypes=("bf16",))
FP16 = kernel_configs(SM90A.head_dims("int8"), ("fp16",), all_variants=True)
CONFIGS = [c for c in BF16 if isinstance(c, KernelConfig) and not c.residual]
CONFIGS = [c for c in CONFIGS if c.skip or not c.key_mask or c.head_dim == 128]
RESIDUAL = [c for c in BF16 if isinstance(c, KernelConfig) and c.residual and not c.key_mask]
CONFIGS += [c for c in RESIDUAL if c.head_dim in (64, 128)]
CONFIGS += [c for c in FP16 if isinstance(c, KernelConfig) and c.initial_mask and c.must_do and not c.residual]
CHOICES = [c for c in BF16 if isinstance(c, ChoiceConfig)]
QUANTIZERS = [c for c in BF16 + FP16 if isinstance(c, QuantizeConfig)]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return compile_all(CONFIGS + QUANTIZERS + CHOICES, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_build(config: KernelConfig, builds: Builds) -> None:
    code = checked_code(config, builds)
    # First scores, then scores and values in the loop, then the last values.
    floats, eights, integers = 2 * (config.tile_n // 16), 0, 0
    if config.quantization.values is not None:
        floats, eights = 0, 2 * (config.tile_n // 32)
    if config.quantization.scores is not None:
        integers = 2 * (config.head_dim // 32)
        conversions = len(re.findall(r"\bI2FP?\.F32\.S32\b", code))  # with a residual, of the number of the step
        assert conversions <= bool(config.residual), "scores are converted, a quarter as fast as anything else"
    else:
        floats += 2 * (config.head_dim // 16)
        if config.residual:  # sums of the first tile and in the loop, residuals, and 80 besides
            assert count("FADD", code) <= 2 * config.tile_n // 2 + config.head_dim // 2 + 80, "sums are made twice"
    assert count("HGMMA", code) == floats
    assert count("QGMMA", code) == eights
    assert count("IGMMA", code) == integers
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) == 4


@pytest.mark.parametrize("config", CHOICES, ids=lambda config: config.name)
def test_build_of_choices(config: ChoiceConfig, builds: Builds) -> None:
    code = checked_code(config, builds)
    assert ("RED" in code or "ATOM" in code) == (config.op == "count_masses")


@pytest.mark.parametrize("config", QUANTIZERS, ids=lambda config: config.name)
def test_build_of_quantizers(config: QuantizeConfig, builds: Builds) -> None:
    code = checked_code(config, builds)
    threads_of_a_row = config.head_dim // 8
    loads = 8
    if config.op == "quantize_value":
        loads = 16 + 2  # the largest magnitudes, in float32
        assert len(re.findall(r"\bSTG\.E\.128\b", code)) == 8
    elif config.op not in ("key_sums", "value_max"):
        loads = config.rows // ((32 if config.op == "quantize_query" else 128) // threads_of_a_row)
        assert len(re.findall(r"\bSTG\.E\.64\b", code)) == loads
        loads += 2  # the mean, in float32
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) == loads
