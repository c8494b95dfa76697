"""Pictures in an .npz as ADM's evaluator reads them: arr_0 uint8 (N, H, W, 3), arr_1 labels."""

from __future__ import annotations

import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np

from equimini.utils.errors import UserError, first_line
from equimini.utils.files import replacing


@contextmanager
def write_samples(path: Path | str, n: int, height: int,
                  width: int) -> Iterator[Callable[[np.ndarray, Sequence[int]], None]]:
    """Gives a function add(pictures uint8 (B, height, width, 3), labels), to be called until there
    are n; nothing is kept in memory but the labels.  Raises ValueError for any other number."""
    labels: list[int] = []
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(
                member, {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, 3)})

            def add(pictures: np.ndarray, classes: Sequence[int]) -> None:
                if pictures.dtype != np.uint8 or pictures.shape != (
                        len(classes), height, width, 3) or len(labels) + len(classes) > n:
                    raise ValueError(f"expected at most {n - len(labels)} uint8 pictures of "
                                     f"{height}x{width}x3 with labels, got {pictures.dtype} "
                                     f"{pictures.shape}, {len(classes)} labels")
                member.write(np.ascontiguousarray(pictures).data)
                labels.extend(map(int, classes))

            yield add
            if len(labels) != n:
                raise ValueError(f"expected {n} pictures, got {len(labels)}")
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.array(labels, np.int64))


def open_npz(path: Path | str, what: str) -> np.lib.npyio.NpzFile:
    """An .npz file; nothing in it is unpickled.

    what: the option, and what the file must hold, for the message.  Raises UserError.
    """
    try:
        with open(path, "rb") as file:
            begins = file.read(12)
        if not begins:
            raise ValueError("the file is empty")
        if begins.startswith(b"\x93NUMPY"):
            raise ValueError("it is one array without a name, as np.save writes (.npy)")
        if not begins.startswith(b"PK"):
            raise ValueError(f"it is no .npz archive (it begins with {begins!r})")
        return np.load(path)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
    except Exception as error:  # zipfile raises many kinds
        raise UserError(f"{what}: the file is cut short or damaged ({first_line(error)})") from None


def map_array(path: Path | str, name: str) -> np.ndarray:
    """An array of an .npz as a memory map, or, where it is compressed, read into memory.

    Raises ValueError for a file that is missing or damaged, or has no such array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                        else np.lib.format.read_array_header_2_0)
                shape, fortran, kind = read(member)
                begin = member.tell()
            archive.fp.seek(entry.header_offset + 26)  # its own header: lengths of name and extras
            begin += entry.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))
        if entry.compress_type != zipfile.ZIP_STORED or kind.hasobject:
            with np.load(path) as file:
                return file[name]
        return np.memmap(path, kind, "r", begin, shape, "F" if fortran else "C")
    except Exception as error:  # numpy reads a header as Python, and zipfile raises many kinds
        raise ValueError(first_line(error)) from None
