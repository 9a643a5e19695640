"""What importing the package pulls in, and what must not be imported; each in a process of its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    # From the root of the checkout, where a bare `import ops` finds a folder.
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_import_is_light() -> None:
    code = """
import sys
import torch
before = set(sys.modules)  # torch itself brings some
import lite_attention
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
assert not torch.cuda.is_initialized()
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert "lite_attention" in result.stdout.split()
    assert {"cutlass", "triton", "diffusers", "matplotlib", "tabulate"}.isdisjoint(result.stdout.split())


@pytest.mark.parametrize("folder", ["ops", "compile", "cute_kernels"])
def test_bare_folders_are_refused_in_one_line(folder: str) -> None:
    result = _python(f"import {folder}")
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ImportError: import lite_attention.{folder}, not {folder}: ")
    assert "During handling" not in result.stderr


@pytest.mark.parametrize(
    ("folder", "floors"),
    [("ops", {"ops"}), ("cute_kernels", {"ops", "cute_kernels"}), ("compile", {"ops", "compile"})],
)
def test_arrows_run_downwards(folder: str, floors: set[str]) -> None:
    """What the modules of a folder import at import time, of this package, lies in these folders."""
    for path in (CHECKOUT / folder).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = [name.split(".") for name in names if name and name.startswith("lite_attention")]
            assert all(name[1:2] and name[1] in floors for name in inside), (path.name, names)
