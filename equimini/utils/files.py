"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator

from equimini.utils.errors import UserError, first_line


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of `replacing` whose process is dead (killed while it wrote)."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A temporary file to write to, flushed to disk and renamed to `path` at the end.

    If anything goes wrong before, an older file at `path` stays as it is.  Raises UserError if
    the disk is full or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {first_line(error)}; what was there before is "
                        "still there") from None
    finally:
        temporary.unlink(missing_ok=True)
