"""A wheel of a library of kernels: where it is installed, no compiler is needed, and no kernel waits for one."""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
import platform
import re
import zipfile

from lite_attention._version import __version__
from lite_attention.cute_kernels.cache import LIBRARY_NAME, LIBRARY_PACKAGE
from lite_attention.cute_kernels.files import whole

__all__ = ["write_wheel"]

_METADATA = f"""\
Metadata-Version: 2.4
Name: {LIBRARY_PACKAGE.replace("_", "-")}
Version: {__version__}
Summary: The kernels of lite-attention, compiled ahead of time
License-Expression: MIT
Requires-Dist: lite-attention=={__version__}
Requires-Dist: apache-tvm-ffi>=0.1.11,<0.2
"""
_WHEEL = "Wheel-Version: 1.0\nGenerator: lite-attention\nRoot-Is-Purelib: false\n"
_INIT = '"""The kernels of lite-attention, compiled ahead of time; it finds them by itself."""\n'


def write_wheel(library: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write a wheel of a library of kernels into a folder, and return it.

    It serves every Python 3, on Linux with a glibc no older than the library asks for.
    """
    tag = f"py3-none-{_platform(library.read_bytes())}"
    stem = f"{LIBRARY_PACKAGE}-{__version__}"
    info = f"{stem}.dist-info"
    files = {
        f"{LIBRARY_PACKAGE}/__init__.py": _INIT.encode(),
        f"{LIBRARY_PACKAGE}/{LIBRARY_NAME}": library.read_bytes(),
        f"{info}/METADATA": _METADATA.encode(),
        f"{info}/WHEEL": f"{_WHEEL}Tag: {tag}\n".encode(),
    }
    rows = [f"{name},{_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    wheel = folder / f"{stem}-{tag}.whl"
    with whole(wheel) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            # Without a date: the same library gives the same bits.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        os.chmod(temporary, 0o644)
    return wheel


def _platform(library: bytes) -> str:
    """Return the platform tag: the newest version of glibc that symbols of the library are of."""
    versions = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library)]
    return f"manylinux_2_{max(versions, default=17)}_{platform.machine()}"


def _digest(content: bytes) -> str:
    """Return a file's digest as RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
