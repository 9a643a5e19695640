"""The portable kernel compiles for every target without a GPU, keeps its registers, and uses tensor cores as it should.

One configuration of each kind a target, and one with a residual; all with LITE_ATTENTION_BUILDS=all, which takes hours.
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import KernelConfig, QuantizeConfig
from lite_attention.ops.quantization import NONE
from lite_attention.ops.targets import SM80, SM89, SM90, TARGETS, Target
from tests.support.kernel_builds import Builds, checked_code, compile_all, count

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("portable kernels")]  # compiled once, not once a worker

PORTABLE = [target for target in TARGETS.values() if target.portable]
ALL = kernel_configs(all_variants=True, targets=PORTABLE)
CONFIGS = [c for c in ALL if isinstance(c, KernelConfig)]
QUANTIZERS = [c for c in ALL if isinstance(c, QuantizeConfig)]


def tells_most(config: KernelConfig) -> bool:
    """Whether it has most to keep in registers, of its quantization and target."""
    full = config.initial_mask and config.must_do and config.key_mask
    if config.residual:
        last = config.quantization.name == list(config.target.tiles)[-1]
        return full and last and config.residual == "fp8" and config.head_dim == 128
    narrow = config.head_dim == 64 and config.quantization == NONE and config.target is SM80
    return full and (config.head_dim == 128 or narrow)


if os.environ.get("LITE_ATTENTION_BUILDS") != "all":
    CONFIGS = [c for c in CONFIGS if c.dtype == "bf16" and tells_most(c)]
    QUANTIZERS = [
        c for c in QUANTIZERS if c.dtype == "bf16" and c.head_dim == 128 and c.key_mask and c.target in (SM80, SM89)
    ]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return compile_all([*CONFIGS, *QUANTIZERS], tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_build(config: KernelConfig, builds: Builds) -> None:
    budget, quantization = config.budget, config.quantization
    # On Hopper, where it is for comparison, products in e4m3 are two in fp16 and take conversions.
    in_halves = config.target is SM90 and quantization.values is not None
    code = checked_code(config, builds, spills=in_halves)
    # A warp's products of one tile.
    blocks, score_bytes, value_bytes = budget.blocks, config.score_dtype.itemsize, config.value_dtype.itemsize
    scores = blocks * (config.head_dim * score_bytes // 32) * (config.tile_n // 8)
    values = blocks * (config.tile_n * value_bytes // 32) * (budget.value_columns // 8)
    halves = (scores if score_bytes == 2 else 0) + (values if value_bytes == 2 else 0) + (2 * values * in_halves)
    assert count("HMMA", code) == halves
    assert count("IMMA", code) == (scores if score_bytes == 1 else 0)
    assert count("QMMA", code) == (values if value_bytes == 1 and not in_halves else 0)
    # Their operands, four 8 x 8 matrices of 16 bits at a time.
    of_q = blocks * config.head_dim * score_bytes // 32
    of_k = config.head_dim * score_bytes // 32 * (config.tile_n // 16)
    of_v = config.tile_n * value_bytes // 32 * (config.head_dim // 16)
    assert count("LDSM", code) == of_q + of_k + of_v
    # Copies of a thread: the queries, the first tile and the next one.
    k_tile, v_tile = (config.tile_n * config.head_dim * x for x in (score_bytes, value_bytes))
    copied = config.tile_m * config.head_dim * score_bytes + 2 * k_tile + budget.stages * v_tile
    assert count("LDGSTS", code) == copied // (16 * budget.threads)
    if quantization.scores is not None:
        conversions = len(re.findall(r"\bI2FP?\.F32\.S32\b", code))  # with a residual, of the number of the step
        assert conversions <= bool(config.residual), "scores are converted, a quarter as fast as anything else"


@pytest.mark.parametrize("config", QUANTIZERS, ids=lambda config: config.name)
def test_build_of_quantizers(config: QuantizeConfig, builds: Builds) -> None:
    code = checked_code(config, builds)
    assert count(r"LDG\.E\.128", code) >= 8  # 16 bytes at a time, several on their way


@pytest.mark.parametrize("target", PORTABLE, ids=lambda target: target.name)
def test_budget(target: Target) -> None:
    """CTAs that are to run side by side fit, with what is reserved for each; a warp has whole blocks of rows."""
    configs = [c for c in ALL if isinstance(c, KernelConfig) and c.target is target]
    assert {c.head_dim for c in configs} == {64, 96, 128, 192, 256}
    for config in configs:
        budget = config.budget
        assert budget.ctas * (budget.shared_bytes + 1024) <= target.shared_bytes + 1024
        assert budget.ctas * budget.threads * 255 <= target.registers
        assert budget.blocks * budget.warps * 16 == config.tile_m
        assert budget.max_tiles * config.tile_n >= 100_000  # keys
