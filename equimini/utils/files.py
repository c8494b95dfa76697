"""Files: written whole or not at all, named by their SHA-256, downloaded and checked."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from tqdm import tqdm

from equimini.utils.errors import UserError, first_line, reading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


_locks: list[int] = []  # open files of `locked`


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds a lock on the folder, which ends with this process, however that ends.

    If another process holds it, it waits, or raises UserError.  Where folders cannot be locked
    (Windows, some network disks) there is none.
    """
    try:
        number = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:  # deleted meanwhile, or not to be read
        raise UserError(f"cannot use the folder {folder}: {first_line(error)}") from None
    try:
        if fcntl:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(number)
        raise UserError(f"another process is writing to {folder}; wait for its end, or choose "
                        "another --out") from None
    except OSError:
        pass  # no locks here
    _locks.append(number)
    try:
        yield
    finally:
        _locks.remove(number)
        if fcntl:
            os.close(number)


def leave_locks() -> None:
    """In a forked process: its copy would keep a lock beyond the death of its owner."""
    while _locks:
        os.close(_locks.pop())


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A temporary file to write to, flushed to disk and renamed to `path` at the end.

    If anything goes wrong before, an older file at `path` stays as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (ConnectionError, TimeoutError):  # of a download: nothing is wrong with the disk
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {first_line(error)}; what was there before is "
                        "still there") from None
    finally:
        with suppress(OSError):  # on a disk that has become read-only
            temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """A file in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def claim(folder: Path, plan: dict[str, Any], holds: str, instead: str) -> None:
    """Note in plan.json what the files in `folder` are made with.

    holds, instead: words for that message, such as 'latents' and 'choose another --out'.
    """
    path, plan = folder / "plan.json", json.loads(json.dumps(plan))  # tuples become lists
    before = read_plan(path) if path.exists() else plan
    if changed := sorted(k for k in before.keys() | plan.keys() if before.get(k) != plan.get(k)):
        raise UserError(f"{folder} holds {holds} of other settings ({', '.join(changed)}); "
                        f"{instead}")
    write_text(path, json.dumps(plan, indent=1))


def read_plan(path: Path) -> dict[str, Any]:
    """The note of `claim`.  Raises UserError for a damaged one."""
    with reading(path):
        return dict(json.loads(path.read_text()))


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str, option: str) -> None:
    """Fetch a file; it gets its name only if it is whole and its SHA-256 begins with `sha256`.

    option: the flag that takes the file's place, for the message.  Raises UserError.
    """
    by_hand = f"fetch it by other means and put it at {path}, or give its place with {option}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as source, replacing(path) as file:
            size = int(source.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(source, "read", total=size, desc=path.name) as read:
                shutil.copyfileobj(read, file)
            file.flush()
            if size and file.tell() != size:
                raise ConnectionError(f"it ended after {file.tell()} of {size} bytes")
            found = file_hash(file.name)
            if not found.startswith(sha256):
                raise UserError(f"what {url} gave has the SHA-256 {found}, expected {sha256}; it "
                                f"was not kept; {by_hand}")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} ({first_line(error)}); {by_hand}") from None
