"""The cache of compiled kernels: on disk, safe to load from, and unharmed by what it finds there."""

from __future__ import annotations

import pathlib
import stat

import pytest

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention.cute_kernels import build, cache
from lite_attention.cute_kernels.config import KernelConfig

CONFIG = KernelConfig("bf16", 64, 192, 128)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("LITE_ATTENTION_CACHE", str(tmp_path / "kernels"))
    monkeypatch.delenv("LITE_ATTENTION_KERNELS", raising=False)
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
    with pytest.raises(PermissionError, match="nobody else may write"):
        cache.cache_folder()
    folder.chmod(0o700)
    monkeypatch.setattr(cache.os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="expected one of user 12345"):
        cache.cache_folder()


def test_a_named_library_must_be_there(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_ATTENTION_KERNELS", str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match="LITE_ATTENTION_KERNELS"):
        cache.library()
    cache.library.cache_clear()


def test_the_fingerprint_follows_the_sources(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache._fingerprint.cache_clear()
    before = cache._fingerprint()
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda package: "0.0")
    cache._fingerprint.cache_clear()
    assert cache._fingerprint() != before
    cache._fingerprint.cache_clear()
