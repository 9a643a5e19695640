"""Files that are written are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention import ThresholdTable
from lite_attention.calibration import autosave
from lite_attention.files import write_whole


def _table(path: Path) -> None:
    ThresholdTable({"a": torch.full((1, 1, 1), -3.0)}).save(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: write_whole(path, lambda file: file.write(b"new")),
    "threshold table": _table,
    "autosave": lambda path: autosave.write(path, {"options": {}}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("there_before", [True, False])
def test_a_full_disk_leaves_what_was_there_and_the_next_attempt_works(
    write: Callable[[Path], Any], there_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if there_before:
        path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] * there_before
    assert not there_before or path.read_bytes() == b"old"
    write(path)
    assert path.read_bytes() not in (b"", b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_fails_midway_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_link_links_to_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, lambda file: file.write(b"new"))
    assert target.read_bytes() == b"new"
    assert link.is_symlink()


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "whole", lambda file: file.write(b""))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
