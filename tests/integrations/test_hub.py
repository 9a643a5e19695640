"""The package for the kernels hub: what its users load runs, compiles, and stands beside other copies."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention.cute_kernels import fingerprint
from lite_attention.integrations import hub

OF_TORCH = ("filelock", "typing_extensions")  # it brings them
PACKAGE = Path(lite_attention.__file__).parent


def load(build: Path) -> ModuleType:
    """Import a build as `kernels` does: from its folder, as a module of its own name."""
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> tuple[torch.Tensor, ...]:
    """Queries that look at the first tile of keys."""
    q, k, v = (torch.randn(1, 200, 2, 32) for _ in range(3))
    k[:, 64:] -= 2
    return q.abs(), k, v


def steps(package: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Some steps of each op."""
    votes = package.SkipState.for_inputs(q, k, threshold=-3.0)
    sizes = {"batch": 1, "heads": 2, "seq_q": 200, "seq_k": 200, "value_dim": 32, "tile_m": 64, "tile_n": 64}
    kept = package.ResidualState(**sizes, plan=package.step_plan(4), keep=0.5, residual_dtype="fp32")
    outs = [package.attention(q, k, v)]
    for _ in range(3):
        outs += [package.skip_attention(q, k, v, votes), package.residual_attention(q, k, v, kept)]
    assert votes.sparsity().sum() > 0
    return outs


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load(hub.write_build(tmp_path_factory.mktemp("copy"), "cpu"))


def test_a_copy_computes_what_the_library_does(copy: ModuleType) -> None:
    q, k, v = inputs()
    for got, expected in zip(steps(copy, q, k, v), steps(lite_attention, q, k, v), strict=True):
        assert torch.equal(got, expected)
    assert copy.SkipState is not lite_attention.SkipState
    assert set(copy.__all__) == {*lite_attention.ops.__all__, "__version__"}


def test_a_copy_compiles_whole(copy: ModuleType) -> None:
    q, k, v = inputs()
    state = copy.SkipState.for_inputs(q, k)
    compiled = torch.compile(copy.skip_attention, backend="eager", fullgraph=True)
    other = copy.SkipState.for_inputs(q, k)
    assert torch.equal(compiled(q, k, v, state), copy.skip_attention(q, k, v, other))


def test_two_versions_stand_side_by_side(copy: ModuleType, tmp_path: Path) -> None:
    other = load(hub.write_build(tmp_path, "cpu", "next"))
    assert other.__name__ == "_lite_attention_cpu_next"
    assert hasattr(torch.ops._lite_attention_cpu_next, "skip_attention")
    q, k, v = inputs()
    for got, expected in zip(steps(other, q, k, v), steps(copy, q, k, v), strict=True):
        assert torch.equal(got, expected)


def test_a_build_is_named_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((hub.write_build(tmp_path / "a", "cpu") / "metadata.json").read_text())["id"]
    assert json.loads((hub.write_build(tmp_path / "b", "cpu") / "metadata.json").read_text())["id"] == first
    monkeypatch.setattr(hub, "_NAMESPACE", hub._NAMESPACE + "# changed\n")
    assert json.loads((hub.write_build(tmp_path / "c", "cpu") / "metadata.json").read_text())["id"] != first


@pytest.mark.slow
def test_kernels_of_a_copy_compile(copy: ModuleType) -> None:
    """The modules that targets and quantizations name in strings are the copy's own."""
    pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")
    build = importlib.import_module(f"{copy.__name__}.cute_kernels.build")
    config = importlib.import_module(f"{copy.__name__}.cute_kernels.config")
    kernel = build.compile_kernel(config.KernelConfig("bf16", 64, 192, 128))
    assert callable(kernel)
    assert config.KernelConfig("bf16", 64, 192, 128).budget.__class__.__module__.startswith(copy.__name__)


def test_a_copy_imports_no_other(copy: ModuleType) -> None:
    folder = Path(copy.__file__ or "").parent
    files = sorted(folder.rglob("*.py"))
    names = {file.relative_to(folder).as_posix() for file in files}
    assert {"ops/cpu.py", "cute_kernels/forward_sm90.py", "cute_kernels/softmax_int8.py"} <= names
    top = {"__init__.py", "_ops.py", "_version.py", "ops", "cute_kernels"}
    assert {name.partition("/")[0] for name in names} == top
    for file in files:
        tree = ast.parse(file.read_text())
        used = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
        used += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        allowed = {*sys.stdlib_module_names, "torch", "cutlass", "cuda", "tvm_ffi", *OF_TORCH}
        assert {name.partition(".")[0] for name in used} <= allowed, file
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            assert not node.value.startswith("lite_attention."), node.value  # a module by its name


def test_fingerprints_see_through_relative_imports(copy: ModuleType) -> None:
    package = Path(copy.__file__ or "").parent
    theirs = {path.relative_to(package).as_posix() for path in fingerprint.sources(package)}
    ours = {path.relative_to(PACKAGE).as_posix() for path in fingerprint.sources()}
    assert theirs - {"_ops.py"} == ours - {"cute_kernels/aot.py", "cute_kernels/wheel.py"}


def test_what_has_no_relative_form_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "ops" / "module.py"
    source.parent.mkdir()
    source.write_text("import os\nimport lite_attention.ops\n")
    with pytest.raises(ValueError, match=r"module.py, line 2: expected `from lite_attention... import`, got `import`"):
        hub._relative(source, tmp_path)
    source.write_text('"""from lite_attention.ops import x"""\nfrom lite_attention import (\n    ops,\n)\n')
    assert hub._relative(source, tmp_path) == '"""from lite_attention.ops import x"""\nfrom .. import (\n    ops,\n)\n'


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of \('cpu', 'cuda'\), got 'rocm'"):
        hub.write_build(tmp_path, "rocm")
    with pytest.raises(ValueError, match="name: expected letters, digits and underscores, got 'a-b'"):
        hub.write_build(tmp_path, "cpu", "a-b")


LOADED = """
import sys, pathlib, torch
from kernels import get_kernel, get_local_kernel
from kernels._rust import Backend, Build, Metadata
folder = pathlib.Path(sys.argv[1])
assert Build.open(folder).general.backends == [Backend.CPU, Backend.CUDA]
cuda = Metadata.read_from_file(folder / "build" / "torch-cuda" / "metadata.json")
assert cuda.backend.backend_type == Backend.CUDA and "9.0" in cuda.backend.archs, cuda
package = get_local_kernel(folder, backend="cpu")
assert get_kernel("somebody/lite-attention", version=1, backend="cpu") is package
q, k, v = (torch.randn(1, 300, 2, 64) for _ in range(3))
state = package.SkipState.for_inputs(q, k, threshold=float("-inf"))
dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
torch.testing.assert_close(package.skip_attention(q, k, v, state), dense)
assert not [name for name in sys.modules if name.startswith("lite_attention")]
"""


def test_the_hubs_own_loader_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("kernels", reason="the package of the hub is not installed")
    assert hub.main(["--out", str(tmp_path), "--owner", "somebody", "--build"]) == 0
    for path in (tmp_path / "torch-ext").rglob("*.py"):
        compile(path.read_text(), path, "exec")
    import kernels

    environment = {
        "PYTHONPATH": str(Path(kernels.__file__).parents[1]),
        "LOCAL_KERNELS": f"somebody/lite-attention={tmp_path}",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", LOADED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
