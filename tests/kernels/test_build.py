"""Every kernel compiles for sm_90a without a GPU, keeps its registers, and uses the tensor cores as it should.

A change that spills, or makes ptxas serialise the asynchronous products, would cost half the speed and no test of
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

from lite_attention.cute_kernels.ahead import kernel_configs
from lite_attention.cute_kernels.config import KernelConfig

pytestmark = pytest.mark.xdist_group("kernels")  # compiled once, not once a worker

CONFIGS = [c for c in kernel_configs(dtypes=("bf16",)) if c.skip or not c.key_mask or c.head_dim == 128]
CONFIGS += [c for c in kernel_configs((64, 128), ("fp16",), all_variants=True) if c.initial_mask and c.must_do]

COMPILE = """
import pathlib, sys
from lite_attention.cute_kernels.ahead import kernel_configs
from lite_attention.cute_kernels.build import compile_kernel
configs = {config.name: config for config in kernel_configs(all_variants=True)}
for name in sys.argv[2:]:
    print("KERNEL", name, flush=True)
    kernel = compile_kernel(configs[name], options="--keep-cubin --dump-dir " + sys.argv[1])
    pathlib.Path(sys.argv[1], name + ".cubin").write_bytes(kernel.artifacts.CUBIN)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, str]]:
    """Compile all in one process; return the folder of cubins, and what ptxas said of each."""
    folder = tmp_path_factory.mktemp("kernels")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, folder, *(config.name for config in CONFIGS)],
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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_build(config: KernelConfig, builds: tuple[pathlib.Path, dict[str, str]]) -> None:
    folder, remarks = builds
    said = remarks[config.name]
    assert "ptxas info" in said, "ptxas said nothing: has the option for its remarks changed?"
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not re.search(r"C75\d\d|serializ", said), said
    code = disassemble(folder / f"{config.name}.cubin")
    assert not re.search(r"\b(LDL|STL)\b", code), "registers went to local memory"
    # First scores, then scores and values in the loop, then the last values.
    expected = 2 * (config.head_dim // 16) + 2 * (config.tile_n // 16)
    assert len(re.findall(r"\bHGMMA\b", code)) == expected
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) == 4


def test_a_budget_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="registers"):
        KernelConfig("bf16", 128, 192, 128)
    with pytest.raises(ValueError, match="shared memory"):
        KernelConfig("bf16", 256, 128, 80)
