"""Compiled kernels: in memory, on disk, and ahead of time.

A kernel is looked for in this process, then in the library that `LITE_ATTENTION_KERNELS` names (made by
`python -m lite_attention compile-kernels`), then in the user's cache folder, and is compiled at last.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lite_attention.cute_kernels.config import Config

__all__ = ["LIBRARY_NAME", "Kernel", "cache_folder", "get_kernel", "has_compiler", "library", "publish"]

_log = logging.getLogger("lite_attention")

Kernel = Callable[..., Any]

_LIBRARY_VARIABLE = "LITE_ATTENTION_KERNELS"
_CACHE_VARIABLE = "LITE_ATTENTION_CACHE"
LIBRARY_NAME = "lite_attention_kernels.so"

_kernels: dict[Config, Kernel] = {}
_lock = threading.Lock()


def has_compiler() -> bool:
    """Return whether the CuTe DSL is installed, without importing it."""
    return importlib.util.find_spec("cutlass") is not None and importlib.util.find_spec("tvm_ffi") is not None


@functools.cache
def library() -> Any | None:
    """Return the module of kernels compiled ahead of time, None if `LITE_ATTENTION_KERNELS` names none.

    Raises:
        FileNotFoundError: it names something that is not there.
        ImportError: apache-tvm-ffi is not installed.
    """
    named = os.environ.get(_LIBRARY_VARIABLE)
    if not named:
        return None
    path = pathlib.Path(named)
    path = path / LIBRARY_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{_LIBRARY_VARIABLE}: expected a library of kernels, got {path}, which is not there")
    try:
        import tvm_ffi
    except ImportError as error:
        raise ImportError(f"{_LIBRARY_VARIABLE} is set, and loading it needs: pip install apache-tvm-ffi") from error
    return tvm_ffi.load_module(str(path))


def get_kernel(config: Config) -> Kernel:
    """Return a kernel, compiled if it must be.

    Raises:
        PermissionError: the cache folder belongs to somebody else, or others may write to it.
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
    path = cache_folder() / _fingerprint() / f"{config.name}.o"
    with _locked(path.with_suffix(".lock")):
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
    """Write a compiled kernel's object file, so that others see the whole of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        kernel.export_to_c(temporary, function_name=config.name)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@functools.cache
def _fingerprint() -> str:
    """Return what tells caches apart that must not be mixed: our sources, the compiler's version and the target."""
    digest = hashlib.sha256()
    for source in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    for name in ("control.py", "quantize.py", "units.py"):
        digest.update((pathlib.Path(__file__).parent.parent / "ops" / name).read_bytes())
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        digest.update(f"{package}=={importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:16]


def cache_folder() -> pathlib.Path:
    """Return the folder of compiled kernels: `LITE_ATTENTION_CACHE`, or lite_attention in the user's cache folder.

    Code is loaded from it, so it must be the user's own and writable to nobody else.

    Raises:
        PermissionError: it is not.
    """
    named = os.environ.get(_CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(named) if named else pathlib.Path(base) / "lite_attention"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"cache folder {folder}: expected one of user {os.getuid()} that nobody else may write to, got owner "
            f"{status.st_uid}, mode {status.st_mode & 0o777:o}; set {_CACHE_VARIABLE} to another folder"
        )
    return folder


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Let one process at a time compile a kernel."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
