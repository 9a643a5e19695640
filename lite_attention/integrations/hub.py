"""A package of the ops for the kernels hub: `python -m lite_attention.integrations.hub --out DIR`.

Users of the `kernels` package then load it without installing anything else:

    lite_attention = kernels.get_kernel("OWNER/lite-attention", version=1)       # from the hub
    lite_attention = kernels.get_local_kernel(DIR)                               # from a folder, made with --build

What goes there is `ops` and `cute_kernels`: pure Python, whose kernels are compiled when they are first needed. The
hub wants copies that can be loaded anywhere, and several at a time. So imports are made relative, and the namespace of
the ops is the build's own. With `--build` the folder also has what the hub's builder would make of these sources.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lite_attention import ops
from lite_attention._version import __version__
from lite_attention.cute_kernels.fingerprint import sources
from lite_attention.ops.targets import TARGETS

__all__ = ["BACKENDS", "package_sources", "write_build", "write_package"]

BACKENDS = ("cpu", "cuda")
_PACKAGE = Path(ops.__file__).parents[1]
_NAME = "lite-attention"
_MODULE = "lite_attention"
_VERSION = 1  # in the hub's sense: of what users call
_DEPENDS = {"cpu": [], "cuda": ["tvm-ffi", "nvidia-cutlass-dsl"]}  # in the hub's words; torch brings the rest
_WITHOUT = ("aot", "wheel")  # modules that only the command line needs

_NAMESPACE = """\
\"\"\"Where the ops live in `torch.ops`, and where modules are that are named in strings.\"\"\"

from __future__ import annotations

from .._ops import add_op_namespace_prefix

__all__ = ["KERNELS", "NAMESPACE"]

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
KERNELS = f"{__name__.rpartition('.ops.')[0]}.cute_kernels"  # the package of kernels beside this one
"""
_FLAKE = """\
{
  description = "Flake of lite-attention";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
_TEST = """\
import pytest
import torch

import lite_attention

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_skipped_is_dense(device: str) -> None:
    q, k, v = (torch.randn(1, 300, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    state = lite_attention.SkipState.for_inputs(q, k, threshold=float("-inf"))
    out = lite_attention.skip_attention(q, k, v, state)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, dense, atol=2e-2, rtol=0)
"""


def package_sources(package: Path = _PACKAGE) -> dict[str, str]:
    """Return the modules of the package for the hub, by their paths: relative imports only.

    Raises:
        ValueError: a module imports this package in a way that has no relative form.
    """
    kernels = [path for path in (package / "cute_kernels").glob("*.py") if path.stem not in _WITHOUT]
    files = sources(package, [package / "ops" / "__init__.py", *sorted(kernels)])
    modules = {path.relative_to(package).as_posix(): _relative(path, package) for path in files}
    return {"__init__.py": _init(), **modules, "ops/namespace.py": _NAMESPACE}


def _relative(path: Path, package: Path) -> str:
    """Return a source with relative imports in place of those of the package by its name."""
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    dots = "." * len(path.relative_to(package).parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_inside(alias.name) for alias in node.names):
            raise ValueError(f"{path}, line {node.lineno}: expected `from {_MODULE}... import`, got `import`")
        if isinstance(node, ast.ImportFrom) and node.module is not None and _inside(node.module):
            inner = node.module.removeprefix(_MODULE).removeprefix(".")
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {dots}{inner} ", 1)
    return "".join(lines)


def _inside(module: str) -> bool:
    return module.partition(".")[0] == _MODULE


def _init() -> str:
    """Return the package's first module: what `ops` offers."""
    names = "".join(f"    {name},\n" for name in ops.__all__)
    listed = "".join(f'    "{name}",\n' for name in sorted([*ops.__all__, "__version__"]))
    return (
        '"""Attention for diffusion transformers that remembers which tiles do not matter, and skips them."""\n\n'
        f"from ._version import __version__\nfrom .ops import (\n{names})\n\n__all__ = [\n{listed}]\n"
    )


def write_package(out: Path, owner: str) -> None:
    """Write what the hub's builder takes.

    Args:
        out: folder to write to; what is in its torch-ext is replaced.
        owner: of the hub's repository.
    """
    files = {f"torch-ext/{_MODULE}/{name}": text for name, text in package_sources().items()}
    files |= {"build.toml": _build_toml(owner), "flake.nix": _FLAKE, "CARD.md": _card(owner)}
    files |= {"tests/test_lite_attention.py": _TEST}
    shutil.rmtree(out / "torch-ext", ignore_errors=True)
    _write(out, files)


def write_build(out: Path, backend: str, name: str | None = None) -> Path:
    """Write what users of the hub get for a backend, and return its folder.

    Args:
        out: folder of the package.
        backend: "cpu" or "cuda".
        name: tells this build from others in a process, and is in the namespace of its ops; None = a digest of it.
            So the same build is loaded from one place only, unless it is given two names.

    Raises:
        ValueError: no such backend, or a name that is none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    files = package_sources()
    name = _digest(files) if name is None else name
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits and underscores, got {name!r}")
    namespace = f"_{_MODULE}_{backend}_{name}"
    files |= {"_ops.py": _ops(namespace), "metadata.json": json.dumps(_metadata(namespace, backend), indent=2) + "\n"}
    folder = out / "build" / f"torch-{backend}"
    shutil.rmtree(folder, ignore_errors=True)
    _write(folder, files)
    return folder


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]


def _ops(namespace: str) -> str:
    """Return the module that the hub's builder adds."""
    return (
        '"""The namespace of the ops of this build."""\n\nimport torch\n\n'
        f"ops = torch.ops.{namespace}\n\n\ndef add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    """Return an op\'s name with its namespace."""\n    return f"{namespace}::{{op_name}}"\n'
    )


def _capabilities() -> list[str]:
    served = {capability for target in TARGETS.values() for capability in target.capabilities}
    return [f"{major}.{minor}" for major, minor in sorted(served)]


def _metadata(namespace: str, backend: str) -> dict[str, object]:
    described: dict[str, object] = {"type": backend}
    if backend == "cuda":
        described["archs"] = _capabilities()
    return {
        "id": namespace, "name": _NAME, "version": _VERSION, "license": "MIT", "python-depends": _DEPENDS[backend],
        "backend": described,
    }  # fmt: skip


def _build_toml(owner: str) -> str:
    return (
        f'[general]\nname = "{_NAME}"\nversion = {_VERSION}\nedition = 5\nlicense = "MIT"\n'
        f"backends = {json.dumps(list(BACKENDS))}\n\n"
        f'[general.hub]\nrepo-id = "{owner}/{_NAME}"\n\n'
        f"[general.cuda]\npython-depends = {json.dumps(_DEPENDS['cuda'])}\n\n"
        f"[torch-noarch]\ncuda_capabilities = {json.dumps(_capabilities())}\n"
    )


def _card(owner: str) -> str:
    return f"""\
---
library_name: kernels
license: mit
---

# LiteAttention

Attention for diffusion transformers that remembers which tiles do not matter and skips them: the ops of
lite-attention {__version__}. Compute capabilities: {", ".join(_capabilities())}; on a CPU in plain PyTorch. Kernels are
compiled when first needed, which takes seconds, and kept.

```python
import torch
from kernels import get_kernel

lite_attention = get_kernel("{owner}/{_NAME}", version={_VERSION}, trust_remote_code=True)
q, k, v = (torch.randn(1, 4096, 24, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
state = lite_attention.SkipState.for_inputs(q, k, num_steps=20)
out = lite_attention.skip_attention(q, k, v, state)  # a call for each step
```
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the package that the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(description="Writes a package of the ops for the kernels hub.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--owner", default="lite-attention", help="of the hub's repository")
    parser.add_argument("--build", action="store_true", help="also what kernels.get_local_kernel loads")
    args = parser.parse_args(argv)
    write_package(args.out, args.owner)
    print(f"sources: {args.out}")
    for backend in BACKENDS if args.build else ():
        print(f"build: {write_build(args.out, backend)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
