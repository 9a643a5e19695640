"""What compiled kernels are of: our sources, and the compiler's versions."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator, Sequence

from lite_attention._version import __version__

__all__ = ["cache_fingerprint", "kernels_of", "source_digest", "sources"]

_PACKAGE = pathlib.Path(__file__).parent.parent


@functools.cache
def cache_fingerprint() -> str:
    """Return what tells caches apart that must not be mixed."""
    digest = hashlib.sha256(source_digest().encode())
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        digest.update(f"{package}=={importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:16]


@functools.cache
def kernels_of() -> str:
    """Return what a library of kernels must be of to be used by these sources; needs no compiler."""
    return f"{__version__} {source_digest()}"


def source_digest(package: pathlib.Path = _PACKAGE) -> str:
    """Return a digest of the sources of kernels, and of what calls them."""
    digest = hashlib.sha256()
    for source in sources(package):
        digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def sources(package: pathlib.Path = _PACKAGE, start: Sequence[pathlib.Path] | None = None) -> list[pathlib.Path]:
    """Return some modules, by default those of `cute_kernels`, and, in turn, all that they import of the package."""
    pending = sorted((package / "cute_kernels").glob("*.py")) if start is None else list(start)
    found: set[pathlib.Path] = set()
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending.extend(_imported(source, package))
    return sorted(found)


def _imported(source: pathlib.Path, package: pathlib.Path) -> Iterator[pathlib.Path]:
    statements = [n for n in ast.walk(ast.parse(source.read_bytes())) if isinstance(n, ast.ImportFrom)]
    for node in statements:
        room = _room(node, source, package)
        if room is not None:
            for alias in node.names:  # a module of the package, or a name out of one
                inner = room / alias.name
                places = (f"{inner}.py", inner / "__init__.py", f"{room}.py", room / "__init__.py")
                yield next(pathlib.Path(place) for place in places if os.path.isfile(place))


def _room(node: ast.ImportFrom, source: pathlib.Path, package: pathlib.Path) -> pathlib.Path | None:
    """Return the folder or module, without suffix, that names are imported from; None outside of the package."""
    first, *rest = (node.module or "").split(".")
    if node.level:  # relative, in a copy of these sources under another name
        return source.parents[node.level - 1].joinpath(first, *rest)
    return package.joinpath(*rest) if first == package.name else None
