"""Every kernel compiles for its target without a GPU, keeps its registers, and uses the tensor cores as it should.

A change that spills, or makes ptxas serialize the asynchronous products, would cost half the speed and no test of
numbers would see it.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import ChoiceConfig, Config, KernelConfig, QuantizeConfig
from lite_attention.ops.targets import SM90A

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

Builds = tuple[pathlib.Path, dict[str, str]]

COMPILE = """
import pathlib, sys
from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.build import compile_kernel
configs = {config.name: config for config in kernel_configs(all_variants=True)}
for name in sys.argv[2:]:
    print("KERNEL", name, flush=True)
    kernel = compile_kernel(configs[name], options="--keep-cubin --dump-dir " + sys.argv[1])
    pathlib.Path(sys.argv[1], name + ".cubin").write_bytes(kernel.artifacts.CUBIN)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Compile all in one process; return the folder of cubins, and what ptxas said of each."""
    folder = tmp_path_factory.mktemp("kernels")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, folder, *(config.name for config in CONFIGS + QUANTIZERS + CHOICES)],
        env={**os.environ, "CUTE_DSL_COMPILER_OPT": "remarks{ptx}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    remarks = dict(re.findall(r"KERNEL (\S+)\n(.*?)(?=KERNEL |\Z)", done.stdout, re.DOTALL))
    return folder, remarks


def disassemble(cubin: pathlib.Path) -> str:
    site = pathlib.Path(sysconfig.get_paths()["platlib"])
    tool = next(site.glob("nvidia/*/bin/nvdisasm"), None) or shutil.which("nvdisasm")
    assert tool is not None, "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def checked_code(config: Config, builds: Builds) -> str:
    """Return the code of a kernel that neither spills nor waits where it need not."""
    folder, remarks = builds
    said = remarks[config.name]
    assert "ptxas info" in said, "ptxas said nothing: has the option for its remarks changed?"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"C75\d\d|serializ", said), said
    code = disassemble(folder / f"{config.name}.cubin")
    assert not re.search(r"\b(LDL|STL)\b", code), "registers went to local memory"
    return code


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
    assert len(re.findall(r"\bHGMMA\b", code)) == floats
    assert len(re.findall(r"\bQGMMA\b", code)) == eights
    assert len(re.findall(r"\bIGMMA\b", code)) == integers
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
