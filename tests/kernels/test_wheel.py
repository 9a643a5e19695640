"""The wheel of kernels: installed, it is found by itself, and serves where there is no compiler."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import types
import zipfile
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention import __version__
from lite_attention.cli import main
from lite_attention.cute_kernels import aot, cache, launch, wheel
from lite_attention.cute_kernels.config import ChoiceConfig
from lite_attention.cute_kernels.fingerprint import kernels_of
from tests.kernels.test_cache import CAN_LINK

CHECKOUT = pathlib.Path(__file__).parents[2]
KERNEL, OTHER = ChoiceConfig("choose_tiles"), ChoiceConfig("count_masses")

GET = f"""
import sys
import types
from lite_attention.cute_kernels import cache
from lite_attention.cute_kernels.config import ChoiceConfig
cache.has_compiler = lambda: False
assert callable(cache.get_kernel({KERNEL!r}))
assert "cutlass" not in sys.modules
try:
    cache.get_kernel({OTHER!r})
except RuntimeError as error:
    print(error)
""".replace("target=<target sm_90a>", "")


def label(of: str) -> bytes:
    return b"code\0" + f"{cache.LIBRARY_LABEL}{of}\0".encode() + b"GLIBC_2.4\0GLIBC_2.28\0GLIBC_2.9\0"


def install(written: pathlib.Path, site: pathlib.Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, written]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not CAN_LINK, reason="needs a C compiler and a CUDA toolkit")
def test_no_compiler_is_needed_where_it_is_installed(tmp_path: pathlib.Path) -> None:
    library = aot.compile_library([KERNEL], tmp_path / "ahead")
    assert library is not None
    install(wheel.write_wheel(library, tmp_path), tmp_path / "site")
    environment = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(CHECKOUT)]),
        "LITE_ATTENTION_CACHE": str(tmp_path / "unused"),
    }
    environment.pop("LITE_ATTENTION_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", GET], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"kernel {OTHER.name}: expected it in the library of kernels, or the CuTe DSL")
    assert not (tmp_path / "unused").exists()


def test_a_wheel_is_what_installers_expect(tmp_path: pathlib.Path) -> None:
    library = tmp_path / cache.LIBRARY_NAME
    library.write_bytes(label(kernels_of()))
    written = wheel.write_wheel(library, tmp_path)
    assert written.name.startswith(f"lite_attention_kernels-{__version__}-py3-none-manylinux_2_28_")
    first = written.read_bytes()
    assert wheel.write_wheel(library, tmp_path).read_bytes() == first  # nothing of the time or place
    with zipfile.ZipFile(written) as archive:
        assert archive.read(f"lite_attention_kernels/{cache.LIBRARY_NAME}") == library.read_bytes()
    install(written, tmp_path / "site")  # pip checks tags, RECORD and METADATA
    assert (tmp_path / "site" / "lite_attention_kernels" / cache.LIBRARY_NAME).read_bytes() == library.read_bytes()


def test_a_package_of_other_sources_is_left_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = tmp_path / cache.LIBRARY_PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    library = package / cache.LIBRARY_NAME
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LITE_ATTENTION_KERNELS", raising=False)
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: f"loaded {path}")
    monkeypatch.setattr(cache, "library", cache.library.__wrapped__)
    library.write_bytes(label(kernels_of()))
    assert cache.library() == f"loaded {library}"
    assert not caplog.records
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", "")
    assert cache.library() is None
    monkeypatch.delenv("LITE_ATTENTION_KERNELS")
    for other in ("0.0.9 0123456789abcdef", f"{__version__} 0123456789abcdef"):
        library.write_bytes(label(other))
        assert cache.library() is None
        assert f"expected kernels of lite_attention {kernels_of()}, got {other}" in caplog.messages[-1]
    named = tmp_path / "named"
    named.mkdir(mode=0o755)
    (named / cache.LIBRARY_NAME).write_bytes(label(kernels_of()))
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(named))  # goes first
    assert cache.library() == f"loaded {named / cache.LIBRARY_NAME}"


def test_the_command_writes_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / cache.LIBRARY_NAME
    library.write_bytes(label(kernels_of()))
    arguments = ["compile-kernels", "--head-dims", "64", "--dtypes", "bf16", "--out", str(tmp_path)]
    monkeypatch.setattr(aot, "compile_library", lambda configs, out: library)
    assert main(arguments) == 0
    assert not list(tmp_path.glob("*.whl"))
    assert main([*arguments, "--wheel"]) == 0
    (written,) = tmp_path.glob("*.whl")
    assert f"wheel: {written}; " in capsys.readouterr().out
    monkeypatch.setattr(aot, "compile_library", lambda configs, out: None)
    assert main([*arguments, "--wheel"]) == 1
    assert "--wheel: expected a library to put into it, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ({}, "skip_bf16_d128_192x80"),
        ({"skip": False}, "dense_bf16_d128_192x80"),
        ({"residual": "fp8"}, "residual_fp8_bf16_d128_192x80"),
        ({"residual": "bf16", "quantization": "int8"}, "residual_bf16_bf16_d128_192x80_int8"),
        ({"quantization": "int8_fp8"}, "skip_bf16_d128_128x192_int8_fp8"),
        ({"initial_mask": True, "must_do": True}, "skip_bf16_d128_192x80_id"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("there", "compiler"), [(True, False), (False, True), (False, False)])
def test_what_a_library_lacks_is_known_before_a_call(
    variant: dict[str, Any], name: str, there: bool, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"lite_attention_sm90a_{name}"
    has = name if there else "another"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "has_compiler", lambda: compiler)
    monkeypatch.setattr(launch, "library", lambda: types.SimpleNamespace(implements_function=has.__eq__))
    launch.unsupported_reason.cache_clear()
    got = launch.unsupported_reason(128, 128, torch.bfloat16, torch.device("cuda", 0), **variant)
    launch.unsupported_reason.cache_clear()
    lacking = f"and the library of kernels has no {name}: pip install"
    assert got is None if there or compiler else lacking in str(got)
