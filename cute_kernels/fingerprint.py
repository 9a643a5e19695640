"""What compiled kernels are of: our sources, and the compiler's versions."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Iterator

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


def sources(package: pathlib.Path = _PACKAGE) -> list[pathlib.Path]:
    """Return the modules of `cute_kernels` and, in turn, all that they import of the package."""
    pending, found = sorted((package / "cute_kernels").glob("*.py")), set()
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending.extend(_imported(source, package))
    return sorted(found)


def _imported(source: pathlib.Path, package: pathlib.Path) -> Iterator[pathlib.Path]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
            room = package.joinpath(*(node.module or "").split(".")[1:])
            for alias in node.names:  # a module of the package, or a name out of one
                places = ((room / alias.name).with_suffix(".py"), room.with_suffix(".py"), room / "__init__.py")
                yield next(place for place in places if place.is_file())
