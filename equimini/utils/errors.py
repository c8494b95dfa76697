"""Errors a user can act on."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import Any, Iterator

import torch

OUT_OF_MEMORY = ("the memory is used up; lower --batch-size (pictures at a time), --width or "
                 "--columns (their length), or --cache-gb, or take a smaller --preset; for a "
                 "training, --accumulate N makes a step of N smaller parts, and the generator's "
                 "--checkpoint-activations keeps less of each")
SHARED_MEMORY_FULL = ("the shared memory (/dev/shm) by which loader processes hand over pictures "
                      "is full; give --workers 0, or more of it (docker: --shm-size 1g)")
LOADER_KILLED = ("a process that loads pictures was killed, as by a system whose memory is used "
                 "up; give --workers 0, or fewer")
TOO_MANY_FILES = ("too many files are open, as loader processes need them; give --workers 0, or "
                  "allow more (ulimit -n)")

class UserError(Exception):
    """Something the user can mend, raised wherever it is found; the message says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Whatever goes wrong inside does because the file `path` does not hold what it should.

    A damaged file can raise anything; it becomes a UserError that names the file.
    """
    try:
        yield
    except Exception as error:
        if in_words(error) is not None:  # the memory is used up, say
            raise
        raise UserError(f"{path} is damaged, or not what it should be ({type(error).__name__}: "
                        f"{first_line(error)})") from error


def in_words(error: Exception) -> str | None:
    """What to tell the user about an error; None for one that is a fault of the program."""
    text = str(error)
    if isinstance(error, UserError):
        return text.rsplit("UserError: ", 1)[-1].strip()  # a loader wraps it in a traceback
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return OUT_OF_MEMORY  # the last of them is what torch says on a CPU
    if isinstance(error, RuntimeError):
        shared = "</torch_" in text or "shared memory" in text
        if "Too many open files" in text:
            return TOO_MANY_FILES
        if "Bus error" in text or shared and ("No space left" in text or
                                                "annot allocate" in text):
            return SHARED_MEMORY_FULL
        if "DataLoader worker (pid" in text:
            return LOADER_KILLED
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return TOO_MANY_FILES
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; make room and continue (what was written before is still there)"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"the name {str(error.filename)[:60]}… is too long for a file"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"cannot write {error.filename or 'the output'}: its disk is read-only"
    return None
