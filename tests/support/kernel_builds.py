"""Kernels compiled without a GPU: what ptxas said of each, and their machine code."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable

from lite_attention.cute_kernels.config import Config

Builds = tuple[pathlib.Path, dict[str, str]]

_COMPILE = """
import pathlib, sys
from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.build import compile_kernel
from lite_attention.ops.targets import TARGETS
configs = {config.name: config for config in kernel_configs(all_variants=True, targets=TARGETS.values())}
for name in sys.argv[2:]:
    print("KERNEL", name, flush=True)
    kernel = compile_kernel(configs[name], options="--keep-cubin --dump-dir " + sys.argv[1])
    pathlib.Path(sys.argv[1], name + ".cubin").write_bytes(kernel.artifacts.CUBIN)
"""


def compile_all(configs: Iterable[Config], folder: pathlib.Path) -> Builds:
    """Compile all in one process; return the folder of cubins, and what ptxas said of each."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, folder, *(config.name for config in configs)],
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


def checked_code(config: Config, builds: Builds, *, spills: bool = False) -> str:
    """Return the code of a kernel that neither spills, unless it may, nor waits where it need not."""
    folder, remarks = builds
    said = remarks[config.name]
    assert "ptxas info" in said, "ptxas said nothing: has the option for its remarks changed?"
    assert not re.search(r"C75\d\d|serializ", said), said
    code = disassemble(folder / f"{config.name}.cubin")
    if not spills:
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said
        assert not re.search(r"\b(LDL|STL)\b", code), "registers went to local memory"
    return code


def count(instruction: str, code: str) -> int:
    """How often machine code has an instruction."""
    return len(re.findall(rf"\b{instruction}\b", code))
