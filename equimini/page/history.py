"""The strip on disk: columns that are only added, and a log of where each of them stands.

    columns.bin     one row a column: token, pixels as they are shown, class, seed
    history.jsonl   one line an edit: {"at": 5, "take": [12, 13], "put": [40, 41], "joined": false,
                    …how it was drawn}, or {"move": "undo"}, {"move": "redo"}

An edit takes rows out from place `at` on and puts others there; one that is "joined" belongs to
the step before it.  Rows are written before the line that names them, so an edit is on disk with
all it needs or not at all.  Memory holds the present strip, and eight bytes an edit.
"""

from __future__ import annotations

import json
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from equimini.utils.errors import UserError, first_line


class History:
    """The columns of a strip, (N,) of type `row`, with undo and redo.

    version: lines in the log, so every change raises it.  Raises UserError where the disk is full.
    """

    def __init__(self, folder: Path, row: np.dtype) -> None:
        self.row, self.store, self.log = row, folder / "columns.bin", folder / "history.jsonl"
        self.ids: list[int] = []  # the row of each column
        self.edits = array("q")  # where each edit's line begins; the undone ones come last
        self.done = self.version = 0  # edits that hold; lines in the log
        self._read_log()
        self.columns = self._rows(self.ids)

    def edit(self, at: int, take: int, put: np.ndarray, joined: bool = False, **how: Any) -> None:
        """Replace `take` columns from place `at` on by the rows `put`."""
        first = _append(self.store, put.tobytes()) // self.row.itemsize
        self._write({"at": at, "take": self.ids[at:at + take], "joined": joined,
                     "put": list(range(first, first + len(put))), **how})
        self.columns = np.concatenate((self.columns[:at], put, self.columns[at + take:]))

    def undo(self) -> None:
        """Take a step back, if there is one."""
        if self.done:
            self._write({"move": "undo"})
            self.columns = self._rows(self.ids)

    def redo(self) -> None:
        """Take an undo back, if there was one."""
        if self.done < len(self.edits):
            self._write({"move": "redo"})
            self.columns = self._rows(self.ids)

    def last(self) -> dict[str, Any]:
        """The edit that the present strip ends with; {} where there is none."""
        return self._line(self.done - 1) if self.done else {}

    def before(self, step: bool) -> np.ndarray:
        """The columns that the last edit, or the whole step, found."""
        ids, done = self.ids.copy(), self.done
        while done:
            done -= 1
            edit = self._line(done)
            ids[edit["at"]:edit["at"] + len(edit["put"])] = edit["take"]
            if not (step and edit["joined"]):
                break
        return self._rows(ids)

    def _write(self, line: dict[str, Any]) -> None:
        self._apply(line, _append(self.log, json.dumps(line).encode() + b"\n"))

    def _apply(self, line: dict[str, Any], begin: int) -> None:
        self.version += 1
        if "move" not in line:
            del self.edits[self.done:]
            self.edits.append(begin)
            self._splice(line, "take", "put", 1)
        elif line["move"] == "undo":
            while self._splice(self._line(self.done - 1), "put", "take", -1)["joined"]:
                pass
        else:
            self._splice(self._line(self.done), "take", "put", 1)
            while self.done < len(self.edits) and self._line(self.done)["joined"]:
                self._splice(self._line(self.done), "take", "put", 1)

    def _splice(self, edit: dict[str, Any], out: str, into: str, step: int) -> dict[str, Any]:
        self.ids[edit["at"]:edit["at"] + len(edit[out])] = edit[into]
        self.done += step
        return edit

    def _line(self, i: int) -> dict[str, Any]:
        with open(self.log, "rb") as file:
            file.seek(self.edits[i])
            return json.loads(file.readline())

    def _rows(self, ids: list[int]) -> np.ndarray:
        return np.memmap(self.store, self.row, "r")[ids] if ids else np.empty(0, self.row)

    def _fits(self, line: dict[str, Any], rows: int) -> bool:
        """Whether a line is a change that can be made to the present strip."""
        if move := line.get("move"):
            return move == "undo" and self.done > 0 or move == "redo" and self.done < len(self.edits)
        at, take, put = line["at"], line["take"], line["put"]
        return (type(at) is int and 0 <= at <= len(self.ids) and type(line["joined"]) is bool
                and bool(self.done or not line["joined"])
                and isinstance(take, list) and take == self.ids[at:at + len(take)]
                and isinstance(put, list) and all(type(k) is int and 0 <= k < rows for k in put))

    def _read_log(self) -> None:
        """All edits, but for a last line that a kill or a power failure cut off."""
        for path in (self.store, self.log):
            path.touch()
        rows, end = self.store.stat().st_size // self.row.itemsize, 0
        os.truncate(self.store, rows * self.row.itemsize)
        with open(self.log, "rb") as file:
            for line in file:
                try:
                    content = json.loads(line)
                    whole = line.endswith(b"\n") and self._fits(content, rows)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    whole = False
                if not whole and file.read(1):  # to cut here would lose what follows
                    raise UserError(f"{self.log} is damaged in line {self.version + 1}, and more "
                                    "lines follow; restore the folder, or choose another --out")
                if not whole:
                    break
                self._apply(content, end)
                end += len(line)
        os.truncate(self.log, end)


def _append(path: Path, data: bytes) -> int:
    """Add bytes to a file, all or none; returns where they begin."""
    begin = -1
    try:
        begin = path.stat().st_size
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):  # deleted, or read-only: nothing was added
            os.truncate(path, begin)
        raise UserError(f"cannot write {path}: {first_line(error)}; the strip is as it was "
                        "before") from None
    return begin
