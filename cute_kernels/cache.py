"""Compiled kernels: in memory, on disk, and ahead of time.

A kernel is looked for in this process, then in the library that `LITE_ATTENTION_KERNELS` names, or else that the
package `lite_attention_kernels` has (both made by `python -m lite_attention compile-kernels`), then in the user's cache
folder, and is compiled at last.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import filelock

from lite_attention.cute_kernels.config import Config
from lite_attention.cute_kernels.files import check_owner, whole
from lite_attention.cute_kernels.fingerprint import cache_fingerprint, kernels_of
from lite_attention.ops.namespace import NAMESPACE

__all__ = [
    "LIBRARY_LABEL",
    "LIBRARY_NAME",
    "LIBRARY_PACKAGE",
    "Kernel",
    "cache_folder",
    "get_kernel",
    "has_compiler",
    "library",
    "publish",
]

_log = logging.getLogger("lite_attention")

Kernel = Callable[..., Any]

_LIBRARY_VARIABLE = "LITE_ATTENTION_KERNELS"
_CACHE_VARIABLE = "LITE_ATTENTION_CACHE"
LIBRARY_NAME = "lite_attention_kernels.so"
LIBRARY_PACKAGE = f"{NAMESPACE}_kernels"  # a copy of these sources has none
LIBRARY_LABEL = "kernels of lite_attention "  # in a library, before what it is of

_kernels: dict[Config, Kernel] = {}
_lock = threading.Lock()


def has_compiler() -> bool:
    """Return whether the CuTe DSL is installed, without importing it."""
    return importlib.util.find_spec("cutlass") is not None and importlib.util.find_spec("tvm_ffi") is not None


@functools.cache
def library() -> Any | None:
    """Return the module of kernels compiled ahead of time, None if there is none.

    It is the one that `LITE_ATTENTION_KERNELS` names, or, where that is not set, that of the installed package
    `lite_attention_kernels`. Set and empty means none. A package of other sources is not used, which a warning says: an
    update of one of the two must not stop the other.

    Raises:
        FileNotFoundError: the variable names something that is not there.
        PermissionError: others than the user and root may change what it names.
        ValueError: that was compiled from other sources than these.
        ImportError: apache-tvm-ffi is not installed, which that needs.
    """
    named = os.environ.get(_LIBRARY_VARIABLE)
    if named is None:
        return _installed()
    return _named(pathlib.Path(named)) if named else None


def _named(path: pathlib.Path) -> Any:
    path = path / LIBRARY_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{_LIBRARY_VARIABLE}: expected a library of kernels, got {path}, which is not there")
    _check_library(path)
    try:
        import tvm_ffi
    except ImportError as error:
        raise ImportError(f"{_LIBRARY_VARIABLE} is set, and loading it needs: pip install apache-tvm-ffi") from error
    return tvm_ffi.load_module(str(path))


def _installed() -> Any | None:
    """Return the installed library. Files of an installed package are as safe as the Python beside them."""
    spec = importlib.util.find_spec(LIBRARY_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = pathlib.Path(spec.origin).with_name(LIBRARY_NAME)
    got = _label_of(path)
    if got != kernels_of():
        _log.warning(
            "package %s: expected kernels of lite_attention %s, got %s; they are not used: install a wheel of these "
            "sources, made by `python -m lite_attention compile-kernels --wheel`",
            LIBRARY_PACKAGE, kernels_of(), got,
        )  # fmt: skip
        return None
    import tvm_ffi  # which the package requires

    return tvm_ffi.load_module(str(path))


def _label_of(library: pathlib.Path) -> str:
    """Return the label of a library, without loading it."""
    label = re.search(re.escape(LIBRARY_LABEL.encode()) + rb"([\x20-\x7e]*)\0", library.read_bytes())
    return "something else" if label is None else label[1].decode()


def _check_library(path: pathlib.Path) -> None:
    """Check, before it is loaded, whose a library is, and what it is of."""
    file = path.resolve()  # what a link leads to
    places = ((path.parent, "folder of kernels"), (file.parent, "folder of kernels"), (file, "library of kernels"))
    for place, what in places:
        check_owner(place, what, f"set {_LIBRARY_VARIABLE} to another", or_root=True)
    got = _label_of(path)
    if got != kernels_of():
        raise ValueError(
            f"{_LIBRARY_VARIABLE}: expected kernels of lite_attention {kernels_of()}, got {got} in {path}; "
            "make them anew with `python -m lite_attention compile-kernels`"
        )


def get_kernel(config: Config) -> Kernel:
    """Return a kernel, compiled if it must be.

    Raises:
        PermissionError: the cache folder belongs to somebody else, or others may write to it.
        RuntimeError: no library has it, and there is no compiler.
    """
    kernel = _kernels.get(config)
    if kernel is None:
        with _lock:
            kernel = _kernels.get(config) or _find(config)
            _kernels[config] = kernel
    return kernel


def _find(config: Config) -> Kernel:
    ahead = library()
    if ahead is not None and ahead.implements_function(config.name):
        kernel: Kernel = ahead[config.name]
        return kernel
    if not has_compiler():
        raise RuntimeError(
            f"kernel {config.name}: expected it in the library of kernels, or the CuTe DSL to compile it, got neither; "
            "pip install 'lite-attention[cu13]', or make the library with --all-variants"
        )
    path = cache_folder() / cache_fingerprint() / f"{config.name}.o"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):  # one process at a time compiles a kernel
        cached = _load(path, config)
        return cached if cached is not None else _compile(path, config)


def _load(path: pathlib.Path, config: Config) -> Kernel | None:
    if not path.is_file():
        return None
    from cutlass.cute.runtime import load_module

    try:
        kernel: Kernel = load_module(str(path), enable_tvm_ffi=True)[config.name]
    except Exception as error:  # a broken file is a miss, whatever the loader makes of it
        _log.warning("cached kernel %s is unusable and will be compiled anew: %s", path, error)
        return None
    return kernel


def _compile(path: pathlib.Path, config: Config) -> Kernel:
    from lite_attention.cute_kernels.build import compile_kernel

    start = time.perf_counter()
    kernel = compile_kernel(config)
    _log.info("compiled %s in %.1f s", config.name, time.perf_counter() - start)
    publish(kernel, path, config)
    compiled: Kernel = kernel
    return compiled


def publish(kernel: Any, path: pathlib.Path, config: Config) -> None:
    """Write a compiled kernel's object file."""
    with whole(path) as temporary:
        kernel.export_to_c(temporary, function_name=config.name)


def _users_cache() -> pathlib.Path:
    """Return the user's cache folder, as Linux has it: the compiler runs nowhere else."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def cache_folder() -> pathlib.Path:
    """Return the folder of compiled kernels: `LITE_ATTENTION_CACHE`, or lite_attention in the user's cache folder.

    Code is loaded from it, so it must be the user's own and writable to nobody else.

    Raises:
        PermissionError: it is not.
    """
    named = os.environ.get(_CACHE_VARIABLE)
    folder = pathlib.Path(named) if named else _users_cache() / "lite_attention"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_owner(folder, "cache folder", f"set {_CACHE_VARIABLE} to another")
    return folder
