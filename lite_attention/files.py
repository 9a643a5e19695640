"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["write_whole"]


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that takes the place of one that is there only when it is complete and on the disk.

    Args:
        path: of the file; where it is a link, of what it links to.
        write: is given the open file.

    Raises:
        OSError: it cannot be written; what was there is as before, and nothing is left beside it.
    """
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # in the same folder, so that it can be moved
    try:
        with open(unfinished, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
