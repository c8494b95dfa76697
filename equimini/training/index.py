"""Any source of pictures, opened: their names, classes and bytes, by number.

    source = open_source("ILSVRC2012_img_train.tar", folder="runs/tokenizer/index")
    source.name(7), source.classes[source.labels[7]], source.read(7)

Pictures are in the order of their names, whatever they lie in: a folder and an archive of the same
files are the same data.  The index of a large source is kept in a folder, as arrays that all
processes map into memory, and made again when the source's size or time has changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from tqdm import tqdm

from equimini.training.archives import Reader, scan_tar, scan_zip
from equimini.training.arrange import arrange
from equimini.training.parquet import scan_parquet
from equimini.training.search import ENCODING, Damaged, Search, scan_folder, scan_old_folder
from equimini.utils.command_line import output_folder
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import locked, remove_leftovers, replacing
from equimini.utils.npz import map_array

FORMAT = 2
SMALL = 10_000  # pictures; of fewer no index is kept: they are found again in no time
PAUSE = 30      # seconds after which a search is put down, to be taken up again
PLACES = ("volumes", "offsets", "sizes")
ARRAYS = ("labels", "hashes", "ends", "text", *PLACES)


class Source:
    """Pictures in the order of their names, with class numbers."""

    def __init__(self, about: dict[str, Any], arrays: dict[str, np.ndarray],
                 kept: Path | None = None) -> None:
        """about: what is kept as JSON; arrays: one value a picture; kept: the file of both."""
        self.kept = kept
        self.folders: list[str] = about["folders"]  # the classes, as the source calls them
        self.classes: list[str] = about["classes"]  # and as people do
        self.flat: bool = about["flat"]  # one class, without a folder of its own
        self.numbered: bool = about["numbered"]  # labels are numbers in the source
        self.left_out: dict[str, list] = about["left_out"]  # reason: [how many, an example]
        self.path: str = about["path"]  # as it was given
        self.reader = Reader(about["kind"], about["volumes"])
        self.__setstate__({"arrays": arrays})

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """CLASS/NAME of picture i; of a flat source, NAME."""
        return self._own(i) if self.flat else f"{self.folders[self.labels[i]]}/{self._own(i)}"

    def _own(self, i: int) -> str:
        ends = self.arrays["ends"]
        return bytes(self.arrays["text"][ends[i - 1] if i else 0:ends[i]]).decode(*ENCODING)

    def _file(self, i: int) -> str:
        """Its path below the folder; a class with a number has no folder."""
        return self._own(i) if self.numbered else self.name(i)

    def where(self, i: int) -> str:
        """Picture i's file, or its archive and its name there, for messages."""
        volume = self.reader.volumes[int(self.arrays["volumes"][i])]
        return os.path.join(volume, self._file(i)) if "folder" in self.reader.kind \
            else f"{volume}: {self.name(i)}"

    def read(self, i: int) -> bytes:
        """The bytes of picture i's file.  Raises OSError or ValueError if they are not there."""
        name = self._file(i) if "folder" in self.reader.kind else ""
        return self.reader.read(name, *(int(self.arrays[key][i]) for key in PLACES))

    def __getstate__(self) -> dict[str, Any]:
        """Arrays that lie in a file are mapped anew by another process, not sent to it."""
        arrays = None if self.kept else self.arrays
        return {**self.__dict__, "arrays": arrays, "labels": None, "hashes": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = self.arrays or load(self.kept)[1]
        self.labels, self.hashes = self.arrays["labels"], self.arrays["hashes"]  # (n,)


def open_source(path: str, folder: str | Path | None = None, truncated: bool = False,
                as_before: bool = False) -> Source:
    """The pictures of a folder, or of one or several archives.

    path: a folder, a .tar, .zip or .parquet file, or a pattern of them, with {000..123}, {a,b}
    or *.  folder: where the index of a large source is kept; None: nowhere.  truncated: of an
    archive that is cut short, what can be read is used.  as_before: a folder is searched as by
    runs that began before there was an index.  Raises UserError for all that cannot be read so.
    """
    kind, volumes = find_volumes(path)
    if kind == "folder" and as_before:
        kind, folder = "old folder", None
    if folder is None:
        return Source(*build(path, kind, volumes, None, truncated))
    absolute = [os.path.abspath(volume) for volume in volumes]
    key = hashlib.sha256("\n".join([*absolute, str(truncated)]).encode(*ENCODING)).hexdigest()[:16]
    kept = output_folder(str(folder)) / f"{key}.npz"
    with locked(Path(folder), wait=True):
        remove_leftovers(Path(folder))
        about, arrays = load(kept)
        if not about or not trusted(about):
            about, arrays = build(path, kind, volumes, kept, truncated)
            if len(arrays["labels"]) <= SMALL:
                with suppress(OSError):  # unless it holds another index
                    Path(folder).rmdir()
                return Source(about, arrays)
            save(kept, about, arrays)
            arrays = load(kept)[1]
        return Source({**about, "path": path, "volumes": volumes}, arrays, kept)


def find_volumes(path: str) -> tuple[str, list[str]]:
    """folder, tar, zip or parquet, and the files (or the folder) of a --data.

    Raises UserError for what does not exist, or is none of them.
    """
    names = [path] if os.path.exists(path) else \
        [n for name in braces(path) for n in (sorted(glob.glob(name)) if "*" in name else [name])]
    missing = [name for name in names if not os.path.exists(name)]
    if missing or not names:
        also = f" (nor do {len(missing) - 1} more of {path})" if len(missing) > 1 else ""
        raise UserError(f"the data {'file' if len(names) > 1 else 'folder'} "
                        f"{missing[0] if missing else path} does not exist{also}")
    if len(names) == 1 and os.path.isdir(names[0]):
        return "folder", names
    kinds = {archive_kind(name) for name in names}
    if len(kinds) > 1:
        raise UserError(f"{path} names archives of several kinds ({', '.join(sorted(kinds))}); "
                        "give those of one")
    return kinds.pop(), names


def braces(path: str) -> list[str]:
    """`path` with {000..123} and {a,b} written out, as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", path)
    if not match:
        return [path]
    first, last, choices = match.groups()
    parts = choices.split(",") if choices else \
        [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name for part in parts for name in
            braces(path[:match.start()] + part + path[match.end():])]


def archive_kind(path: str) -> str:
    """What a file is, by its first bytes.  Raises UserError for none that is read."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; of several sources each must be an archive")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if head[:4] in (b"PK\3\4", b"PK\5\6") or path.endswith(".zip"):
        return "zip"
    if head[:4] == b"PAR1" or path.endswith(".parquet"):
        return "parquet"
    packed = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
    if head[:2] in packed:
        raise UserError(f"{path} is packed with {packed[head[:2]]}, so that nothing in it can be "
                        "read without all before; unpack it to a plain .tar")
    if head[257:262] == b"ustar" or path.endswith(".tar"):
        return "tar"
    raise UserError(f"{path} is no folder, and no archive that is read here (.tar, .zip or "
                    ".parquet)")


def build(path: str, kind: str, volumes: list[str], kept: Path | None,
          truncated: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Search a source and put its pictures into order; kept: where its index will be."""
    part = kept and kept.with_suffix(".part.npz")
    stamps, found = signature(volumes), Search(truncated)
    place, saved = take_up(part, stamps, found), time.monotonic()
    before = np.cumsum([0] + [os.path.getsize(v) for v in volumes])
    with tqdm(total=int(before[-1]) if "folder" not in kind else None, unit="B", unit_scale=True,
              desc=f"looking through {path}", delay=2) as bar:
        for number, at in scan(kind, volumes, place, found):
            bar.update(int(before[number]) + at - bar.n)
            if part and time.monotonic() - saved >= PAUSE:
                put_down(part, stamps, found, (number, at))
                saved = time.monotonic()
    about, arrays = arrange(path, kind, volumes, found)
    if part:
        part.unlink(missing_ok=True)
    about |= {"format": FORMAT, "built": time.time_ns(), "stamps": signature(found.watched
                                                                             or volumes)}
    return about, arrays


def scan(kind: str, volumes: list[str], place: tuple[int, int],
         found: Search) -> Iterator[tuple[int, int]]:
    """Fill `found` from a place on; yields places (volume, byte) to take the search up from."""
    for number in range(place[0], len(volumes)):
        volume, start = volumes[number], place[1] if number == place[0] else 0
        try:
            if kind == "tar":
                with open(volume, "rb") as file:
                    end = os.path.getsize(volume)
                    for at in scan_tar(file.fileno(), number, start, end, found):
                        yield number, at
            elif "folder" in kind:
                (scan_folder if kind == "folder" else scan_old_folder)(volume, found)
            else:
                (scan_zip if kind == "zip" else scan_parquet)(volume, number, found)
        except Damaged as error:
            found.damaged(volume, error, len(volumes) == 1)
        except OSError as error:
            raise UserError(f"cannot read {error.filename or volume}: "
                            f"{error.strerror or first_line(error)}") from None
        yield number + 1, 0


def put_down(part: Path, stamps: list, found: Search, place: tuple[int, int]) -> None:
    """Keep what was found, and where the search is."""
    names, labels, *places = found.columns()
    texts = {k: np.frombuffer("".join(f"{text}\0" for text in values).encode(*ENCODING), np.uint8)
             for k, values in (("names", names), ("labels", labels))}
    state = {"format": FORMAT, "stamps": stamps, "place": place, "folders": sorted(found.folders),
             "left_out": found.left_out, "class_names": found.class_names}
    save(part, state, texts | dict(zip(PLACES, map(np.array, places))))


def take_up(part: Path | None, stamps: list, found: Search) -> tuple[int, int]:
    """The opposite: fill `found`, and give the place; (0, 0) where there is nothing to take up."""
    state, arrays = load(part, ("names", "labels", *PLACES)) if part else ({}, {})
    if not state or state["stamps"] != stamps:
        return 0, 0
    for values, kept in zip(found.columns(), arrays.values()):
        values.extend(kept.tolist() if kept.dtype != np.uint8 else
                      kept.tobytes().decode(*ENCODING).split("\0")[:-1])
    found.folders, found.left_out = set(state["folders"]), state["left_out"]
    found.class_names = state["class_names"]
    return tuple(state["place"])


def signature(paths: list[str]) -> list[list]:
    """Size and time of files; time alone of folders, which changes when a file comes or goes."""
    found = []
    for path in paths:
        status = os.stat(path)
        size = 0 if os.path.isdir(path) else status.st_size
        found.append([os.path.abspath(path), size, status.st_mtime_ns])
    return found


def trusted(about: dict[str, Any]) -> bool:
    """Whether the source of an index is still as it was."""
    try:
        stamps = signature([path for path, *_ in about["stamps"]])
    except OSError:
        return False
    # a time so shortly before the index was made may still be that of a later change
    return stamps == about["stamps"] and all(time_ns < about["built"] - 2 * 10**9
                                             for *_, time_ns in stamps)


def save(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays and what is to be known about them in one file."""
    with replacing(path) as file:
        np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


def load(path: Path,
         names: tuple[str, ...] = ARRAYS) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The opposite, the arrays mapped into memory; both empty where there is no such file."""
    try:
        about = json.loads(map_array(path, "about").tobytes())
        arrays = {name: np.asarray(map_array(path, name)) for name in names}
        good = about["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return {}, {}
    return (about, arrays) if good else ({}, {})
