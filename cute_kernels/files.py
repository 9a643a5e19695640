"""Files that code is loaded from: written whole, and by nobody else."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

__all__ = ["check_owner", "whole"]


def check_owner(path: pathlib.Path, what: str, remedy: str, *, or_root: bool = False) -> None:
    """Check that a file or folder is the user's, and that nobody else may write to it.

    Args:
        path: of the file or folder.
        what: it is, for the message.
        remedy: what to do about it, likewise.
        or_root: it may be root's too.

    Raises:
        PermissionError: it is not.
    """
    if not hasattr(os, "getuid"):  # on Windows a user's folders are the user's
        return
    owners = sorted({os.getuid(), 0}) if or_root else [os.getuid()]
    status = path.stat()
    if status.st_uid not in owners or status.st_mode & 0o022:
        users = " or ".join(map(str, owners))
        raise PermissionError(
            f"{what} {path}: expected one of user {users} that nobody else may write to, got owner "
            f"{status.st_uid}, mode {status.st_mode & 0o777:o}; {remedy}"
        )


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[str]:
    """Give the name of a file to write, which then takes a path's place: others see the whole of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
