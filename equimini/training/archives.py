"""Pictures in tars and zips, found once; and the bytes of any picture, read by offset.

A scanner walks through one archive and adds every picture to a `Search`: its name, and a volume
(the number of the archive), an offset and a size, from which `Reader` gets its bytes in any order.
Nothing is unpacked.  index.py sorts what was found, numbers the classes and keeps it all.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Iterator

from equimini.training.parquet import open_parquet, parquet_columns
from equimini.training.search import ENCODING, ENDINGS, NO_FILE, OUTSIDE, Damaged, Search, hidden
from equimini.utils.errors import UserError, first_line

BLOCK = 512  # bytes of a tar's header; contents are padded to multiples of it
LABEL_KEYS = ("cls", "label", "class", "class_id", "target")  # of a sample's .json
MAX_PICTURE = 2**30  # bytes of one deflated picture
OPEN_FILES = 64  # archives kept open by a process


def scan_tar(file: int, volume: int, start: int, end: int, found: Search) -> Iterator[int]:
    """Pictures of a tar between two bytes of a file, and of the tars inside it (a class each).

    Members in a row that share their name up to its first dot are one sample, as in WebDataset:
    where one of them is a label (.cls, or .json), the others are its picture.  Yields places
    from which the search can continue later.  Raises Damaged.
    """
    sample, key = [], None
    try:
        for name, kind, offset, size, at in tar_members(file, start, end):
            clean = os.path.normpath(name).lstrip("/")
            folder, base = os.path.split(clean)
            if (folder, base.split(".")[0]) != key:
                _add_sample(file, volume, sample, found)
                sample, key = [], (folder, base.split(".")[0])
                yield at
            if name.startswith("/") or clean.startswith(".."):
                found.leave_out(OUTSIDE, name)
            elif hidden(clean):
                pass
            elif kind == b"5":
                found.folders.add(clean)
            elif kind not in (b"0", b"\0", b"7"):
                found.leave_out(NO_FILE, name)
            elif base.endswith(".tar"):
                _scan_inner(file, volume, base[:-4], offset, offset + size, found)
            else:
                sample.append((clean, offset, size))
    finally:  # also of a tar that is cut short
        _add_sample(file, volume, sample, found)
    yield end


def _scan_inner(file: int, volume: int, label: str, start: int, end: int, found: Search) -> None:
    """A tar inside a tar, whose pictures are the class `label`."""
    inside = Search(left_out=found.left_out)
    found.folders.add(label)
    try:
        for _ in scan_tar(file, volume, start, end, inside):
            pass
    except Damaged as error:
        raise Damaged(f"{label}.tar inside it: {error}") from None
    finally:
        for i, name in enumerate(inside.names):
            found.add(f"{label}/{name}", volume, inside.offsets[i], inside.sizes[i],
                      inside.labels[i])


def _add_sample(file: int, volume: int, members: list[tuple[str, int, int]],
                found: Search) -> None:
    """The pictures of members that share a key; with a label, the plainest one alone."""
    label = ""
    for name, offset, size in members:
        if name.endswith((".cls", ".json")) and size < MAX_PICTURE:
            label = label or read_label(os.pread(file, size, offset), name)
    names = [name for name, *_ in members]
    if label:
        members = [m for m in members if os.path.splitext(m[0])[1].lower() in ENDINGS]
        members = sorted(members, key=lambda m: m[0].count("."))[:1]
        if not members:
            found.leave_out("labels without a picture", names[0])
    for name, offset, size in members:
        if label or found.wants(name):
            found.add(name, volume, offset, size, label)


def read_label(content: bytes, name: str) -> str:
    """The class in a sample's .cls or .json, as text; "" if there is none."""
    text = content.decode(errors="replace").strip()
    if name.endswith(".json"):
        try:
            values = json.loads(text)
        except ValueError:
            return ""
        found = [values[k] for k in LABEL_KEYS if k in values] if isinstance(values, dict) else []
        text = str(found[0]) if found and isinstance(found[0], (int, str)) else ""
    return text.replace("/", "_")


def tar_members(file: int, start: int, end: int) -> Iterator[tuple[str, bytes, int, int, int]]:
    """Name, type, offset and size of every member, and where its headers begin.

    Raises Damaged where a header is none, or tells of more bytes than there are before `end`.
    """
    at = first = start
    long: dict[str, Any] = {}  # what an extended header says of the next member
    while True:
        head = os.pread(file, min(BLOCK, max(0, end - at)), at)
        if len(head) < BLOCK:
            raise Damaged(f"it is cut short, at byte {at}")
        if not head.strip(b"\0"):
            return
        kind, offset = head[156:157], at + BLOCK
        try:
            size = long.get("size", _number(head[124:136]))
            checksum = _number(head[148:156])
        except ValueError:
            checksum = -1
        if checksum != sum(head) - sum(head[148:156]) + 8 * ord(" "):
            raise Damaged(f"what stands at byte {at} is no member of a tar")
        if offset + size > end:
            raise Damaged(f"it is cut short: {_text(head[:100])} has {size} bytes, "
                          f"of which {max(0, end - offset)} are there")
        at = offset + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            long["path"] = _text(os.pread(file, size, offset))
        elif kind == b"x":
            long |= _extended(os.pread(file, size, offset))
        elif kind not in (b"K", b"g"):
            folder = _text(head[345:500]) + "/" if head[257:263] == b"ustar\0" and head[345] else ""
            kind = b"S" if long.get("sparse") else kind
            yield long.get("path", folder + _text(head[:100])), kind, offset, size, first
            long, first = {}, at


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(*ENCODING)


def _number(field: bytes) -> int:
    """A number of a tar's header: octal text, or (GNU) binary."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _extended(content: bytes) -> dict[str, Any]:
    """Name and size in a pax header, lines of "LENGTH KEY=VALUE"."""
    values, at = {}, 0
    while at < len(content) and content[at:at + 1].isdigit():
        length = int(content[at:].split(b" ", 1)[0])
        key, _, value = content[at:at + length - 1].split(b" ", 1)[1].partition(b"=")
        if key == b"path":
            values["path"] = _text(value)
        elif key == b"size":
            values["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            values["sparse"] = True
        at += max(1, length)
    return values


def scan_zip(path: str, volume: int, found: Search) -> None:
    """Pictures of a zip; labels as StyleGAN and EDM keep them, in dataset.json.  Raises Damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.flag_bits & 1 for member in members):
                raise UserError(f"{path} is locked with a password; unlock it first (unzip it and "
                                "zip it again without one)")
            table = archive.read("dataset.json") if "dataset.json" in archive.NameToInfo else b"{}"
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise Damaged(f"it is cut short, or no zip ({first_line(error)}); the list of a zip's "
                      "members stands at its end, so that nothing of it can be read") from None
    labels = dataset_labels(table, path)
    for member in members:
        name = member.filename
        if member.create_system == 3 and not member.flag_bits & 0x800:  # Unix: any bytes
            name = name.encode("cp437").decode(*ENCODING)
        clean = os.path.normpath(name).lstrip("/")
        if name.startswith("/") or clean.startswith(".."):
            found.leave_out(OUTSIDE, name)
        elif hidden(clean) or name == "dataset.json":
            pass
        elif member.is_dir():
            found.folders.add(clean)
        elif member.external_attr >> 28 == 0o12:
            found.leave_out(NO_FILE, name)
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            found.leave_out("members neither stored nor deflated, left out", name)
        elif found.wants(clean):
            found.add(clean, volume, member.header_offset, member.compress_size,
                      labels.get(name, ""))


def dataset_labels(content: bytes, path: str) -> dict[str, str]:
    """Picture to class of a dataset.json; empty if it has no labels.

    Raises UserError for labels that are no whole numbers.
    """
    try:
        table = json.loads(content)
        pairs = dict(table.get("labels") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"dataset.json in {path} is damaged: {first_line(error)}") from None
    for name, label in pairs.items():
        if isinstance(label, bool) or not isinstance(label, int):
            what = "vectors" if isinstance(label, list) else f"such as {label!r}"
            raise UserError(f"the labels in {path} are {what}; classes must be whole numbers")
    return {name: str(label) for name, label in pairs.items()}


class Reader:
    """The bytes of any picture of a source, from its volume, offset and size."""

    def __init__(self, kind: str, volumes: list[str]) -> None:
        """kind: folder, tar, zip or parquet; volumes: its files, or the folder."""
        self.kind, self.volumes = kind, volumes
        self.open: OrderedDict[int, Any] = OrderedDict()  # the archives used last
        self.group: tuple[int, int, Any] = -1, -1, None  # the row group used last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": OrderedDict(), "group": (-1, -1, None)}

    def read(self, name: str, volume: int, offset: int, size: int) -> bytes:
        """Raises OSError or ValueError where the bytes are not there."""
        if "folder" in self.kind:
            return Path(self.volumes[0], name).read_bytes()
        if self.kind == "parquet":
            return self._row(volume, offset >> 32, offset & 0xffffffff)
        file = self._file(volume).fileno()
        if self.kind == "tar":
            return _exactly(file, size, offset)
        signature, _, _, method, *_, n, m = struct.unpack("<4s5H3I2H", _exactly(file, 30, offset))
        if signature != b"PK\3\4":
            raise ValueError("the zip has changed since its index was made")
        packed = _exactly(file, size, offset + 30 + n + m)
        if method == zipfile.ZIP_STORED:
            return packed
        unpacking = zlib.decompressobj(-15)
        content = unpacking.decompress(packed, MAX_PICTURE)
        if not unpacking.eof:
            raise ValueError("its packed bytes are damaged, or more than 1 GB")
        return content

    def _file(self, volume: int) -> Any:
        """An archive, which stays open until OPEN_FILES others were used."""
        if volume not in self.open:
            path = self.volumes[volume]
            self.open[volume] = open_parquet(path) if self.kind == "parquet" else open(path, "rb")
            if len(self.open) > OPEN_FILES:
                self.open.popitem(last=False)[1].close()
        self.open.move_to_end(volume)
        return self.open[volume]

    def _row(self, volume: int, group: int, row: int) -> bytes:
        if self.group[:2] != (volume, group):
            file = self._file(volume)
            name = parquet_columns(file, self.volumes[volume], Search())[0]
            self.group = volume, group, file.read_row_group(group, [name]).column(0)
        value = self.group[2][row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ValueError("the row has no bytes")
        return content


def _exactly(file: int, size: int, offset: int) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise OSError("the archive ends before it")
    return content
