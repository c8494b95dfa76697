"""Looking for pictures: what is found, and what is left out; folders, and the links in them."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

from PIL import Image

TOOL_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
OUTSIDE = "names that lead out of the archive, left out"
NO_LABEL = "pictures without a label, left out"
NO_FILE = "links and other members that are no plain files, left out"
ENDINGS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
ENCODING = "utf-8", "surrogateescape"  # of names, as in os.fsencode


@dataclass
class Search:
    """Pictures found so far, and what was left out."""

    names: list[str] = field(default_factory=list)   # CLASS/NAME, or NAME alone
    labels: list[str] = field(default_factory=list)  # a sample's own label; "": by its folder
    volumes: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    folders: set[str] = field(default_factory=set)  # also those without a picture
    left_out: dict[str, list] = field(default_factory=dict)  # reason: [how many, an example]
    watched: list[str] = field(default_factory=list)  # files and folders that must stay the same
    class_names: list[str] = field(default_factory=list)  # that the archive itself tells

    def add(self, name: str, volume: int, offset: int, size: int, label: str = "") -> None:
        """One picture."""
        self.names.append(name)
        self.labels.append(label)
        for numbers, value in ((self.volumes, volume), (self.offsets, offset), (self.sizes, size)):
            numbers.append(value)

    def leave_out(self, reason: str, name: str) -> None:
        """Count a file that is not used."""
        self.left_out.setdefault(reason, [0, name])[0] += 1

    def wants(self, name: str) -> bool:
        """Whether a file of this name is a picture; what is neither that nor hidden is counted."""
        if hidden(name):
            return False
        ending = os.path.splitext(name)[1].lower()
        if ending not in ENDINGS:
            self.leave_out(f"{ending or 'no ending'}: files that nothing here reads", name)
        return ending in ENDINGS


class Damaged(Exception):
    """An archive that ends too early, or holds something else from here on."""


def hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden, or left behind by a tool."""
    return any(part.startswith(".") or part in TOOL_FOLDERS for part in name.split("/"))


def scan_folder(root: str, found: Search) -> None:
    """Pictures below a folder; links to folders are followed, so that a class may be a link.

    Left out are links to a folder that they or the root lie in, and whatever a class holds already.
    Links come last, so that a folder keeps its own name.
    """
    seen, links = set(), []

    def walk(here: str, name: str) -> bool:
        status = os.stat(here)
        key = name.split("/")[0], status.st_dev, status.st_ino  # two classes may share a folder
        if key in seen:
            return False
        seen.add(key)
        found.watched.append(here)
        for entry in sorted(os.scandir(here), key=lambda e: e.name):
            child = f"{name}/{entry.name}" if name else entry.name
            if not entry.is_dir():
                if found.wants(child):
                    found.add(child, 0, 0, 0)
            elif hidden(entry.name):
                pass
            elif entry.is_symlink():
                links.append((entry.path, child))
            elif walk(entry.path, child) and not name:
                found.folders.add(child)
        return True

    walk(root, "")
    for path, name in links:  # grows while it is read
        target = os.path.join(os.path.realpath(path), "")
        if any(os.path.join(os.path.realpath(here), "").startswith(target)
               for here in (os.path.dirname(path), root)):
            found.leave_out("links to a folder that they lie in, not followed", name)
        elif not walk(path, name):
            found.leave_out("links to a folder that its class holds already, not followed", name)
        elif "/" not in name:
            found.folders.add(name)


def scan_old_folder(root: str, found: Search) -> None:
    """Pictures below a folder as runs found them that began before `scan_folder`: also in hidden
    folders, and as often as links lead to them."""
    for here, _, files in os.walk(root, followlinks=True):
        for file in files:
            if os.path.splitext(file)[1].lower() in ENDINGS:
                found.add(os.path.relpath(os.path.join(here, file), root), 0, 0, 0)
