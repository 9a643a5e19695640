"""The cache of compiled kernels: on disk, safe to load from, and unharmed by what it finds there."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

import lite_attention
from lite_attention import __version__
from lite_attention.cute_kernels import aot, build, cache, fingerprint
from lite_attention.cute_kernels.aot import kernel_configs
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.cute_kernels.fingerprint import kernels_of

CONFIG = KernelConfig("bf16", 64, 192, 128)
CAN_LINK = (
    shutil.which("cc") is not None
    and pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64", "libcudart_static.a").is_file()
)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("LITE_ATTENTION_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", "")  # none, also where a package of them is installed
    cache.library.cache_clear()
    return tmp_path / "kernels"


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has in memory."""
    monkeypatch.setattr(cache, "_kernels", {})


def test_compiled_once_then_read_from_disk(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = build.compile_kernel

    def counting(config: KernelConfig, **options: str) -> object:
        compiled.append(config)
        return real(config, **options)

    monkeypatch.setattr(build, "compile_kernel", counting)
    new_process(monkeypatch)
    first = cache.get_kernel(CONFIG)
    assert cache.get_kernel(CONFIG) is first
    assert compiled == [CONFIG]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (stored,) = folder.rglob("*.o")
    assert not list(folder.rglob("*.tmp"))

    new_process(monkeypatch)
    assert callable(cache.get_kernel(CONFIG))
    assert compiled == [CONFIG]

    stored.write_bytes(stored.read_bytes()[:1000])  # a corrupt file is a miss
    new_process(monkeypatch)
    assert callable(cache.get_kernel(CONFIG))
    assert compiled == [CONFIG, CONFIG]
    assert stored.stat().st_size > 10_000


def test_a_folder_of_somebody_else_is_refused(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match=r"nobody else may write to, got owner .* LITE_ATTENTION_CACHE"):
        cache.cache_folder()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="expected one of user 12345"):
        cache.cache_folder()


def test_the_folder_is_the_users_unless_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LITE_ATTENTION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "lite_attention"


# ---- libraries of kernels ------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A library that `LITE_ATTENTION_KERNELS` names, by its folder; no code, but the label of one."""
    folder = tmp_path / "ahead"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    library = folder / cache.LIBRARY_NAME
    library.write_bytes(b"code\0" + label(kernels_of()) + b"more code")
    library.chmod(0o755)
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(folder))
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: f"loaded {path}")
    cache.library.cache_clear()
    yield library
    cache.library.cache_clear()


def label(of: str) -> bytes:
    return f"{cache.LIBRARY_LABEL}{of}\0".encode()


def test_a_library_of_these_sources_is_loaded(named: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.library() == f"loaded {named}"
    cache.library.cache_clear()
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(named))  # by itself
    assert cache.library() == f"loaded {named}"


@pytest.mark.parametrize(
    ("written", "got"),
    [
        (b"code", "something else"),
        (b"", "something else"),
        (label("0.0.9 0123456789abcdef"), "0.0.9 0123456789abcdef"),
        (label(f"{__version__} 0123456789abcdef"), f"{__version__} 0123456789abcdef"),
        (label(kernels_of())[:-3] + b"\0", kernels_of()[:-2]),
    ],
)
def test_a_library_of_other_sources_is_refused(written: bytes, got: str, named: pathlib.Path) -> None:
    named.write_bytes(written)
    expected = f"LITE_ATTENTION_KERNELS: expected kernels of lite_attention {kernels_of()}, got {got} in {named}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        cache.library()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("what", ["folder", "library"])
def test_a_library_that_others_may_write_is_refused(what: str, mode: int, named: pathlib.Path) -> None:
    (named.parent if what == "folder" else named).chmod(mode)
    with pytest.raises(PermissionError, match=rf"{what} of kernels .*nobody else may write to, .* mode {mode:o}"):
        cache.library()


def test_a_link_is_as_safe_as_what_it_leads_to(
    named: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir(mode=0o755)
    (tmp_path / "links" / cache.LIBRARY_NAME).symlink_to(named)
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(tmp_path / "links"))
    assert cache.library() is not None
    cache.library.cache_clear()
    named.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"folder of kernels {named.parent}: .*mode 777"):
        cache.library()


def test_a_library_of_somebody_else_is_refused(named: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    owner = named.stat().st_uid
    if owner == 0:
        assert cache.library() == f"loaded {named}"  # root may install one for all
        cache.library.cache_clear()
        os.chown(named, 54321, -1)
        owner = 54321
    with pytest.raises(PermissionError, match=f"expected one of user 0 or 12345 .*got owner {owner}"):
        cache.library()


def test_a_named_library_must_be_there(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match="LITE_ATTENTION_KERNELS"):
        cache.library()
    cache.library.cache_clear()


@pytest.mark.skipif(not CAN_LINK, reason="needs a C compiler and a CUDA toolkit")
def test_what_is_linked_is_what_is_loaded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ahead"
    library = aot.compile_library([CONFIG], out)
    assert library == out / cache.LIBRARY_NAME
    assert sorted(path.name for path in out.iterdir()) == sorted([f"{CONFIG.name}.o", cache.LIBRARY_NAME])
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(out))
    monkeypatch.setenv("LITE_ATTENTION_CACHE", str(tmp_path / "unused"))
    cache.library.cache_clear()
    new_process(monkeypatch)
    assert callable(cache.get_kernel(CONFIG))
    assert not (tmp_path / "unused").exists()
    cache.library.cache_clear()


def test_no_library_is_made_where_it_would_be_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_link", lambda objects, library: None)
    before = os.umask(0o002)  # of some systems
    try:
        aot.compile_library([], tmp_path / "made")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o755
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o775)
    with pytest.raises(PermissionError, match=r"folder of kernels .*mode 775; give --out another"):
        aot.compile_library([CONFIG], tmp_path / "there")


def test_progress_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(build, "compile_kernel", lambda config: config)
    monkeypatch.setattr(aot, "publish", lambda kernel, path, config: None)
    monkeypatch.setattr(aot, "_link", lambda objects, library: None)
    configs = kernel_configs((64,), ("bf16",))
    assert aot.compile_library(configs, tmp_path) is None
    told = capfd.readouterr()
    assert told.out == ""
    assert f"{len(configs)}/{len(configs)}" in told.err
    assert configs[-1].name in told.err


# ---- what kernels are of -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the package."""
    copy = tmp_path_factory.mktemp("copy") / "lite_attention"
    shutil.copytree(pathlib.Path(lite_attention.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def names_of(package: pathlib.Path) -> list[str]:
    return [source.relative_to(package).as_posix() for source in fingerprint.sources(package)]


def test_the_fingerprint_follows_the_sources(package: pathlib.Path) -> None:
    before = fingerprint.source_digest(package)
    assert before == fingerprint.source_digest()
    assert len({"ops/control.py", "ops/quantize.py", "ops/units.py", "ops/targets.py"} & set(names_of(package))) == 4
    for source in fingerprint.sources(package):
        text = source.read_bytes()
        source.write_bytes(text + b"\n# changed\n")
        assert fingerprint.source_digest(package) != before, source
        source.write_bytes(text)
    assert fingerprint.source_digest(package) == before
    for other in ("plot.py", "ops/oracle.py", "compile/backend.py"):
        with open(package / other, "a") as file:
            file.write("\n# changed\n")
    assert fingerprint.source_digest(package) == before


def test_the_fingerprint_has_all_that_kernels_use(package: pathlib.Path) -> None:
    """By what their modules hold when they are loaded, rather than by the text of their imports."""
    names = set(names_of(package))
    for source in sorted((package / "cute_kernels").glob("*.py")):
        module = importlib.import_module(f"lite_attention.cute_kernels.{source.stem}".removesuffix(".__init__"))
        for value in vars(module).values():
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name.startswith("lite_attention."):
                path = name.removeprefix("lite_attention.").replace(".", "/")
                assert names & {f"{path}.py", f"{path}/__init__.py"}, f"{source.name} uses {name}"


def test_the_fingerprint_has_the_compilers_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint.cache_fingerprint.cache_clear()
    seen = {fingerprint.cache_fingerprint()}
    for changed in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        monkeypatch.setattr(fingerprint.importlib.metadata, "version", lambda name, changed=changed: name == changed)
        fingerprint.cache_fingerprint.cache_clear()
        seen.add(fingerprint.cache_fingerprint())
    fingerprint.cache_fingerprint.cache_clear()
    assert len(seen) == 3


WITHOUT_POSIX = """
import sys, os, torch
sys.modules["fcntl"] = None
del os.getuid
import lite_attention.cute_kernels as kernels
from lite_attention.cute_kernels import cache, launch
launch.has_compiler = lambda: False
torch.cuda.get_device_capability = lambda device: (9, 0)
print(cache.cache_folder(), kernels.unsupported_reason(128, 128, torch.bfloat16, torch.device("cuda", 0)))
"""


def test_where_there_is_no_posix_a_reason_is_given(tmp_path: pathlib.Path) -> None:
    """As on Windows, for which there is no CuTe DSL."""
    environment = {**os.environ, "LITE_ATTENTION_CACHE": str(tmp_path / "kernels")}
    environment["LITE_ATTENTION_KERNELS"] = ""
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'kernels'} the CuTe DSL is not installed")
