"""Pictures in tars and zips, found once; and the bytes of any picture, read by offset.

A scanner walks through one archive and adds every picture to a `Search`: its name, and a volume
(the number of the archive), an offset and a size, from which `Reader` gets its bytes in any order.
Nothing is unpacked.  index.py sorts what was found, numbers the classes and keeps it all.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from typing import Any, BinaryIO, Iterator

from equimini.training.parquet import GROUP_BYTES, open_parquet, read_group
from equimini.training.search import ENCODING, ENDINGS, FILE, FOLDER, NO_FILE, Damaged, Search
from equimini.utils.errors import UserError, first_line

BLOCK = 512  # bytes of a tar's header; contents are padded to multiples of it
LABEL_KEYS = ("cls", "label", "class", "class_id", "target")  # of a sample's .json
MAX_PICTURE = 2**30  # bytes of one deflated picture
MAX_TEXT = 2**24  # bytes of a label or a long name
OPEN_FILES = 64  # archives kept open by a process
HEADERS = re.compile(rb"PK(\x03\x04|\x01\x02)")  # of members of a zip, and of its list
BEHIND = "bytes behind the end of a tar, not read (of tars put together by cat, give each alone)"


def scan_tar(file: int, volume: int, start: int, end: int, found: Search,
             inside: str = "") -> Iterator[int]:
    """Pictures of a tar between two bytes of a file, and of the tars inside it (a class each).

    Members in a row that share their name up to its first dot are one sample, as in WebDataset:
    where one of them is a label (.cls, or .json), the others are its picture.  Yields places
    from which the search can continue later.  Raises Damaged.
    """
    sample, key = [], None
    try:
        for name, kind, offset, size, at in tar_members(file, start, end):
            clean = found.member(name, kind, inside)
            folder, base = os.path.split(clean)
            if (folder, base.split(".")[0]) != key:
                _add_sample(file, volume, sample, found)
                sample, key = [], (folder, base.split(".")[0])
                yield at
            if base.lower().endswith(".tar"):
                found.folders.add(clean[:-4])
                try:
                    for _ in scan_tar(file, volume, offset, offset + size, found, clean[:-4] + "/"):
                        pass
                except Damaged as error:
                    if not found.truncated:
                        raise Damaged(f"{clean} inside it: {error}") from None
                    found.damaged(clean, error)
            elif clean:
                sample.append((clean, offset, size))
    finally:  # also of a tar that is cut short
        _add_sample(file, volume, sample, found)
    yield end


def _add_sample(file: int, volume: int, members: list[tuple[str, int, int]],
                found: Search) -> None:
    """The pictures of members that share a key; with a label, the plainest one alone."""
    label = ""
    for name, offset, size in members:
        if name.endswith((".cls", ".json")) and size < MAX_TEXT:
            label = label or read_label(os.pread(file, size, offset), name)
    if label:
        first = members[0][0]
        members = [m for m in members if os.path.splitext(m[0])[1].lower() in ENDINGS]
        members = sorted(members, key=lambda m: m[0].count("."))[:1]
        if not members:
            found.leave_out("labels without a picture", first)
    for name, offset, size in members:
        if label or found.wants(name):
            found.add(name, volume, offset, size, label)


def read_label(content: bytes, name: str) -> str:
    """The class in a sample's .cls or .json, as text; "" if there is none."""
    text = content.decode(errors="replace").strip()
    if name.endswith(".json"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        found = [values[k] for k in LABEL_KEYS if k in values] if isinstance(values, dict) else []
        text = str(found[0]) if found and isinstance(found[0], (int, str)) else ""
    return text


def tar_members(file: int, start: int, end: int) -> Iterator[tuple[str, str, int, int, int]]:
    """Name, kind, offset and size of every member, and where its headers begin.

    Raises Damaged where a header is none, or tells of more bytes than there are before `end`;
    of a tar that is cut off inside another, what is there comes before.
    """
    at = first = start
    long: dict[str, Any] = {}  # what an extended header says of the next member
    while True:
        head = os.pread(file, min(BLOCK, max(0, end - at)), at)
        if len(head) < BLOCK:
            raise Damaged(f"it is cut short, at byte {at}")
        if not head.strip(b"\0"):
            break
        kind, offset = head[156:157], at + BLOCK
        try:
            size = long.get("size", _number(head[124:136]))
            if _number(head[148:156]) != sum(head) - sum(head[148:156]) + 8 * ord(" ") or size < 0:
                raise ValueError("wrong checksum")
            more = os.pread(file, size, offset) if kind in b"Lx" and size < MAX_TEXT else b""
            if kind == b"x":
                long |= _extended(more)
        except (ValueError, IndexError):
            raise Damaged(f"what stands at byte {at} is no member of a tar") from None
        folder = _text(head[345:500]) + "/" if head[257:263] == b"ustar\0" and head[345] else ""
        name, there = long.get("path", folder + _text(head[:100])), max(0, end - offset)
        if size > there and name.endswith(".tar"):
            yield name, FILE, offset, there, first
        if size > there:
            raise Damaged(f"it is cut short: {name} has {size} bytes, of which {there} are there")
        at = offset + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            long["path"] = _text(more)
        elif kind not in (b"x", b"K", b"g"):
            plain = kind in (b"0", b"\0", b"7") and not long.get("sparse")
            yield name, (FOLDER if kind == b"5" or plain and name.endswith("/") else
                         FILE if plain else NO_FILE), offset, size, first
            long, first = {}, at
    while at < end and (block := os.pread(file, min(2**20, end - at), at)):
        if block.strip(b"\0"):
            yield f"byte {at}", BEHIND, at, 0, first
            return
        at += len(block)


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
    """Pictures of a zip.  Raises Damaged, and UserError for one with a password."""
    first, damage = len(found.names), ""
    with open(path, "rb") as file:
        try:
            members = zipfile.ZipFile(file).infolist()
        except Exception as error:  # zipfile raises many kinds on damaged files
            members, damage = local_headers(file), first_line(error)
        for member in members:
            name, kind = member.filename, FILE
            if member.flag_bits & 1:
                raise UserError(f"{path} is locked with a password; unlock it first (unzip it and "
                                "zip it again without one)")
            if member.create_system == 3 and not member.flag_bits & 0x800:  # Unix: any bytes
                name = name.encode("cp437").decode(*ENCODING)
            if member.create_system == 0:  # DOS and Windows
                name = name.replace("\\", "/")
            if name.endswith("/"):
                kind = FOLDER
            elif member.external_attr >> 28 == 0o12:
                kind = NO_FILE
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = "members neither stored nor deflated, left out"
            name = found.member(name, kind)
            if name and found.wants(name):
                found.add(name, volume, member.header_offset, member.compress_size)
    if damage:
        names = found.names[first:]
        if names and all(re.fullmatch(r"\d{5}/img\d{8}\.\w+", name) for name in names):
            found.labels[first:] = ["0"] * len(names)  # StyleGAN's, whose folders are no classes
            found.leave_out("pictures whose labels (dataset.json) lie behind the damage, used as "
                            "one class", names[0], len(names))
        raise Damaged(f"it is cut short, or no zip ({damage}), of which {len(names)} pictures can "
                      "be read")


def local_headers(file: BinaryIO) -> Iterator[zipfile.ZipInfo]:
    """Members of a zip without its list, by their own headers, up to the damage."""
    empty, at = not os.fstat(file.fileno()).st_size, 0
    data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    while data[at:at + 4] == b"PK\3\4" and at + 30 <= len(data):
        flags, method = struct.unpack_from("<2H", data, at + 6)
        size, _, n, m = struct.unpack_from("<2I2H", data, at + 18)
        name, start = data[at + 30:at + 30 + n], at + 30 + n + m
        size, stop = _described(data, start) if flags & 8 else (size, start + size)
        if stop > len(data):
            return
        member = zipfile.ZipInfo(name.decode(*(ENCODING if flags & 0x800 else ["cp437"])))
        member.header_offset, member.compress_size = at, size
        member.flag_bits, member.compress_type, at = flags, method, stop
        yield member


def _described(data: mmap.mmap, start: int) -> tuple[int, int]:
    """Packed bytes of a zip's member that was written before its size was known, so that this
    stands behind it (in 4 or 8 bytes, then as many for the other size); and the next header."""
    for match in HEADERS.finditer(data, start):
        stop = match.start()
        for width in (4, 8):
            size = int.from_bytes(data[stop - 2 * width:stop - width], "little")
            if stop - start - size in (2 * width + 4, 2 * width + 8):
                return size, stop
    return 0, len(data) + 1


class Reader:
    """The bytes of any picture of a source, from its volume, offset and size."""

    def __init__(self, kind: str, volumes: list[str]) -> None:
        """kind: folder, tar, zip or parquet; volumes: its files, or the folder."""
        self.kind, self.volumes = kind, volumes
        self.open: OrderedDict[int, Any] = OrderedDict()  # the archives used last
        self.groups: OrderedDict[tuple[int, int], Any] = OrderedDict()  # and the row groups

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": OrderedDict(), "groups": OrderedDict()}

    def read(self, name: str, volume: int, offset: int, size: int) -> bytes:
        """Raises OSError or ValueError where the bytes are not there."""
        if "folder" in self.kind:
            with open(os.path.join(self.volumes[0], name), "rb", buffering=0) as file:
                return file.read()
        if self.kind == "parquet":
            return self._row(volume, offset >> 32, offset & 0xffffffff)
        file = self._file(volume).fileno()
        return (unpacked if self.kind == "zip" else _exactly)(file, offset, size)

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
        if (volume, group) not in self.groups:
            self.groups[volume, group] = read_group(self._file(volume), group)
            sizes = [rows.nbytes for rows in self.groups.values()]
            while len(sizes) > 1 and sum(sizes) > GROUP_BYTES:
                self.groups.popitem(last=False)
                del sizes[0]
        self.groups.move_to_end((volume, group))
        content = self.groups[volume, group][row].as_py()
        if content is None:
            raise ValueError("the row has no bytes")
        return content


def _exactly(file: int, offset: int, size: int) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise OSError("the archive ends before it")
    return content


def unpacked(file: int, offset: int, size: int) -> bytes:
    """A member of a zip, whose header stands at an offset and whose packed bytes are so many."""
    signature, _, _, method, *_, n, m = struct.unpack("<4s5H3I2H", _exactly(file, offset, 30))
    if signature != b"PK\3\4":
        raise ValueError("the zip has changed since its index was made")
    packed = _exactly(file, offset + 30 + n + m, size)
    if method == zipfile.ZIP_STORED:
        return packed
    unpacking = zlib.decompressobj(-15)
    content = unpacking.decompress(packed, MAX_PICTURE)
    if not unpacking.eof:
        raise ValueError("its packed bytes are damaged, or more than 1 GB")
    return content
