"""The strip on disk: history.db, an SQLite database of edits that can be made and taken back.

An edit replaces `take` columns from place `at` on by `put` others.  Its record holds, compressed,
{"at", "take", "put", "joined", …how it was drawn} as a line of JSON, and the bytes of the new
columns less those of the old ones, which serve both ways.  One that is "joined" belongs to the step
before it.  The first `done` edits hold (the database's user_version says how many), those behind
them were undone.  A later format would have an application_id other than 0.  A record is on disk as
a whole or not at all; memory holds the present strip.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import time
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from equimini.utils.errors import UserError, first_line, reading
from equimini.utils.files import replacing


class History:
    """The columns of a strip, (N,) of type `row`, with undo and redo.

    version: every change raises it.  Raises UserError for a damaged file, and a full disk.
    """

    def __init__(self, folder: Path, row: np.dtype) -> None:
        self.path, self.row, self.columns = folder / "history.db", row, np.empty(0, row)
        self.version = int(time.time())  # none that a page of an earlier server has
        if not self.path.exists():
            (convert if (folder / "history.jsonl").exists() else create)(folder, row)
        try:
            self.db = sqlite3.connect(self.path, check_same_thread=False)
            self.edits, self.done, other = self.db.execute(
                "SELECT (SELECT COUNT(record) FROM edits), user_version, application_id "
                "FROM pragma_user_version, pragma_application_id").fetchone()
            if other or not 0 <= self.done <= self.edits:
                raise ValueError("another program or a later version wrote it")
        except (sqlite3.Error, ValueError) as error:
            empty = self.path.is_file() and not self.path.stat().st_size  # a database, to SQLite
            why = "it is empty" if empty else first_line(error)
            raise UserError(f"{self.path} holds no strip that can be read ({why}); put a copy of it "
                            "back, move it away to begin anew, or choose another --out") from None
        for k in range(self.done):
            self.columns = self._changed(self.columns, k + 1)

    def edit(self, at: int, take: int, put: np.ndarray, joined: bool = False, **how: Any) -> None:
        """Replace `take` columns from place `at` on by the columns `put`."""
        rows, packer = max(take, len(put)), zlib.compressobj(9, strategy=zlib.Z_FILTERED)
        about = {"at": at, "take": take, "put": len(put), "joined": joined, **how}
        change = _bytes(put, rows) - _bytes(self.columns[at:at + take], rows)
        record = packer.compress(json.dumps(about).encode() + b"\n" + change.tobytes())
        columns = np.concatenate((self.columns[:at], put, self.columns[at + take:]))
        self._write(columns, self.done + 1, ("DELETE FROM edits WHERE number > ?", (self.done,)),
                    ("INSERT INTO edits VALUES (?, ?)", (self.done + 1, record + packer.flush())))
        self.edits = self.done

    def undo(self) -> None:
        """Take a step back, if there is one."""
        self._write(*self._earlier())

    def redo(self) -> None:
        """Take an undo back, if there was one."""
        columns, done = self.columns, self.done
        while done < self.edits and (done == self.done or self._read(done + 1)[0]["joined"]):
            done += 1
            columns = self._changed(columns, done)
        self._write(columns, done)

    def last(self) -> dict[str, Any]:
        """The edit that the present strip ends with; {} where there is none."""
        return self._read(self.done)[0] if self.done else {}

    def before(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The columns that the last step found, and the edit that they ended with."""
        columns, done = self._earlier()
        return columns, self._read(done)[0] if done else {}

    def _earlier(self) -> tuple[np.ndarray, int]:
        columns, done, joined = self.columns, self.done, True
        while done and joined:
            columns, joined = self._changed(columns, done, back=True), self._read(done)[0]["joined"]
            done -= 1
        return columns, done

    def _read(self, number: int) -> tuple[dict[str, Any], np.ndarray]:
        """What an edit is, and the difference that it makes."""
        with reading(self.path):
            record, = self.db.execute("SELECT record FROM edits WHERE number = ?",
                                      (number,)).fetchone()
            about, _, change = zlib.decompress(record).partition(b"\n")
            about = json.loads(about)
            rows = max(about["take"], about["put"])
            return about, np.frombuffer(change, np.uint8).reshape(rows, self.row.itemsize)

    def _changed(self, columns: np.ndarray, number: int, back: bool = False) -> np.ndarray:
        """Columns after an edit; back: before it."""
        about, change = self._read(number)
        at, take, put = (about[k] for k in ("at", *("put", "take")[::1 if back else -1]))
        wide = _bytes(columns[at:at + take], len(change))
        new = _columns(wide - change if back else wide + change, self.row)[:put]
        return np.concatenate((columns[:at], new, columns[at + take:]))

    def _write(self, columns: np.ndarray, done: int, *changes: tuple[str, tuple]) -> None:
        """Change the database, all or nothing; then so many edits hold, and these columns."""
        try:
            with self.db:
                for change in (*changes, (f"PRAGMA user_version = {done}",)):
                    self.db.execute(*change)
        except sqlite3.Error as error:
            raise UserError(f"cannot write {self.path}: {first_line(error)}; the strip is as it "
                            "was before") from None
        self.columns, self.done = columns, done
        self.version += 1


def _bytes(columns: np.ndarray, rows: int) -> np.ndarray:
    """Columns as bytes (rows, bytes of a row), zeros behind them, in a form that shrinks well.

    Red and blue are less green, pixels less those above them; all of it is modulo 256, so that
    differences of two such forms are exact.
    """
    wide = np.zeros(rows, columns.dtype)
    wide[:len(columns)] = columns
    pixels = wide["pixels"]  # (rows, H, f, 3)
    pixels[..., ::2] -= pixels[..., 1:2]
    pixels[:, 1:] -= pixels[:, :-1].copy()
    return wide.view(np.uint8).reshape(rows, columns.itemsize)


def _columns(wide: np.ndarray, row: np.dtype) -> np.ndarray:
    """The reverse of `_bytes`."""
    columns = wide.view(row)[:, 0]
    pixels = columns["pixels"]
    pixels[:] = pixels.cumsum(1, np.uint8)
    pixels[..., ::2] += pixels[..., 1:2]
    return columns


def create(folder: Path, row: np.dtype) -> None:
    """Make history.db with no edits; it is there as a whole or not at all."""
    path = folder / "history.db"
    with reading(path), replacing(path) as file, closing(sqlite3.connect(file.name)) as db:
        db.execute("PRAGMA page_size = 65536")  # in 4 KiB there is room for one edit
        db.execute("CREATE TABLE edits (number INTEGER PRIMARY KEY, record BLOB NOT NULL)")


def convert(folder: Path, row: np.dtype) -> None:
    """Make history.db of the files of older strips: columns.bin, all that ever stood in them, and
    history.jsonl, a log whose lines name columns by their number there."""
    lines = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        strip, rows = History(Path(made), row), np.fromfile(folder / "columns.bin", row)
        for k, line in enumerate(lines):
            try:
                edit = json.loads(line)
                if move := edit.get("move"):
                    {"undo": strip.undo, "redo": strip.redo}[move]()
                    continue
                at, take, put = (edit.pop(name) for name in ("at", "take", "put"))
                if strip.columns[at:at + len(take)].tobytes() != rows[take].tobytes():
                    raise ValueError("it changes another strip")
                strip.edit(at, len(take), rows[put], **edit)
            except Exception as error:  # a damaged line raises many kinds
                if k + 1 < len(lines):  # the last one a kill may have cut off
                    raise UserError(f"{folder}/history.jsonl is damaged in line {k + 1} "
                                    f"({first_line(error)}), and more lines follow; restore it, or "
                                    "choose another --out") from None
        strip.db.close()
        os.replace(strip.path, folder / "history.db")
