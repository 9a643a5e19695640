"""What importing the package pulls in, and what must not be imported; each in a process of its own."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    # From the root of the checkout, where a bare `import ops` finds a folder.
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)


HEAVY = {"cutlass", "triton", "diffusers", "transformers", "matplotlib", "tabulate", "torch._dynamo", "torch._inductor"}
OURS, OTHERS = 98, 20  # modules that an import may load besides those of torch


@pytest.mark.parametrize(
    "statement",
    [
        "import lite_attention",
        "from lite_attention.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from lite_attention.cli import main\ntry: main(['compile-kernels', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["package", "help", "help of a command"],
)
def test_import_is_light(statement: str) -> None:
    code = f"""
import sys
import torch
before = set(sys.modules)  # torch itself brings some
{statement}
print("loaded", *(set(sys.modules) - before))
assert not torch.cuda.is_initialized()
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    first, *loaded = result.stdout.splitlines()[-1].split()
    assert first == "loaded"
    ours = {name for name in loaded if name.partition(".")[0] == "lite_attention"}
    assert "lite_attention" in ours
    assert HEAVY.isdisjoint({name.partition(".")[0] for name in loaded} | set(loaded))
    assert len(ours) <= OURS
    assert len(loaded) - len(ours) <= OTHERS, sorted(set(loaded) - ours)


@pytest.mark.parametrize("package", ["lite_attention", "lite_attention.compile", "lite_attention.parallel"])
def test_names_of_first_use_are_listed_before_it(package: str) -> None:
    code = f"""
import importlib
package = importlib.import_module({package!r})
assert not {{*package._LAZY}} & {{*vars(package)}}
print(sorted({{*package.__all__}} - {{*dir(package)}}), "__file__" in dir(package))
"""
    result = _python(code)
    assert result.stdout == "[] True\n", result.stderr


def test_running_eagerly_loads_no_compiler() -> None:
    code = """
import io, sys
import torch
import lite_attention
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)

model = lite_attention.enable(Attention().requires_grad_(False), compile=False, tile_shape=(16, 16))
model(torch.randn(1, 64, 8))
lite_attention.set_threshold(model, -4.0)
lite_attention.reset(model)
assert len(lite_attention.report(model, file=io.StringIO()).swapped) == 1
lite_attention.disable(model)
heavy = ("torch._dynamo", "torch._inductor", "sympy", "lite_attention.compile.backend", "lite_attention.compile.export")
print(*[name for name in heavy if name in sys.modules])
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("folder", ["ops", "compile", "cute_kernels"])
def test_bare_folders_are_refused_in_one_line(folder: str) -> None:
    result = _python(f"import {folder}")
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"ImportError: import lite_attention.{folder}, not {folder}: ")
    assert "During handling" not in result.stderr


@pytest.mark.parametrize(
    ("folder", "floors"),
    [("ops", {"ops"}), ("cute_kernels", {"ops", "cute_kernels", "_version"}), ("compile", {"ops", "compile"})],
)
def test_arrows_run_downwards(folder: str, floors: set[str]) -> None:
    """What the modules of a folder import at import time, of this package, lies in these folders."""
    for path in (CHECKOUT / folder).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = [name.split(".") for name in names if name and name.startswith("lite_attention")]
            assert all(name[1:2] and name[1] in floors for name in inside), (path.name, names)


def _modules() -> dict[str, Path]:
    """Return the package's modules by name, with their files."""
    package = CHECKOUT / "lite_attention"
    folders = [package, *(f for depth in ("*", "*/*") for f in package.glob(depth) if f.is_dir())]
    files = [file.relative_to(CHECKOUT) for folder in folders for file in folder.glob("*.py")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): CHECKOUT / file for file in files}


def _imported(source: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a source names, within functions and for types alone too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom) and node.module in known:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inside & known.keys()
            if inside - known.keys():
                yield node.module


RUNS_UP = ("lite_attention.ops.schema", "lite_attention.cute_kernels")  # an op's CUDA entry, at its first call


def test_no_circle_of_imports() -> None:
    known = _modules()
    arrows = {name: set(_imported(file.read_text(), known)) for name, file in known.items()}
    upper, lower = "lite_attention.calibration.probe", "lite_attention.api"
    assert lower in arrows[upper]  # it sees what there is
    arrows[RUNS_UP[0]].remove(RUNS_UP[1])
    graphlib.TopologicalSorter(arrows).prepare()  # CycleError names the modules
    arrows[lower].add(upper)
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(arrows).prepare()


def _private_of_torch(source: str) -> Iterator[str]:
    """Yield the private names of torch, and modules of it, that a source names."""
    for node in ast.walk(ast.parse(source)):
        names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            if first in ("torch", "forward_ad") and any(part[0] == "_" and part[:2] != "__" for part in parts):
                yield name


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {name: [*_private_of_torch(file.read_text())] for name, file in _modules().items()}
    assert found.pop("lite_attention.ops.torch_internals")
    assert {name: private for name, private in found.items() if private} == {}


def test_the_wheel_has_every_package() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    listed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    package = CHECKOUT / "lite_attention"
    folders = [package, *package.glob("*"), *package.glob("*/*")]  # some of them are links, which ** leaves out
    found = [".".join(f.relative_to(CHECKOUT).parts) for f in folders if (f / "__init__.py").exists()]
    assert sorted(listed) == sorted(found)
