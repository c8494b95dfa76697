"""Looking for pictures: what is found, and what is left out; folders, and the links in them."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

from PIL import Image

from equimini.utils.errors import UserError

TOOL_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
TABLE = "dataset.json"  # StyleGAN's and EDM's labels
FILE, FOLDER = "file", "folder"  # what a member of an archive is, or the reason it is left out:
NO_FILE = "links and other members that are no plain files, left out"
OUTSIDE = "names that lead out of the archive, left out"
NO_LABEL = "pictures without a label, left out"
ENDINGS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
ENCODING = "utf-8", "surrogateescape"  # of names, as in os.fsencode


class Damaged(Exception):
    """An archive that ends too early, or holds something else from here on."""


@dataclass
class Search:
    """Pictures found so far, and what was left out."""

    truncated: bool = False  # of an archive that is damaged, use what can be read
    names: list[str] = field(default_factory=list)   # CLASS/NAME, or NAME alone
    labels: list[str] = field(default_factory=list)  # a sample's own label; "": by its folder
    volumes: array = field(default_factory=lambda: array("q"))
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    folders: set[str] = field(default_factory=set)  # also those without a picture
    left_out: dict[str, list] = field(default_factory=dict)  # reason: [how many, an example]
    watched: list[str] = field(default_factory=list)  # files and folders that must stay the same
    class_names: list[str] = field(default_factory=list)  # that the archive itself tells
    aliases: dict[str, str] = field(default_factory=dict)  # link to a folder: its name elsewhere

    def add(self, name: str, volume: int, offset: int, size: int, label: str = "") -> None:
        """One picture."""
        name, label = name.replace("\0", "_"), label.replace("/", "_").replace("\0", "_")
        for values, value in zip(self.columns(), (name, label, volume, offset, size)):
            values.append(value)

    def columns(self) -> tuple:
        """What is known of each picture."""
        return self.names, self.labels, self.volumes, self.offsets, self.sizes

    def leave_out(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file that is not used."""
        self.left_out.setdefault(reason, [0, name])[0] += count

    def damaged(self, where: str, what: object, alone: bool = True) -> None:
        """Count an archive that ends too early.  Raises UserError unless this was asked for, and
        where nothing can be read; alone: there is no other archive."""
        if not self.truncated or alone and not self.names:
            hope = ", or add --allow-truncated to use what can be read" * (not self.truncated)
            raise UserError(f"{where} is damaged: {what}; copy it again"
                            + hope * (not alone or bool(self.names)))
        self.leave_out("archives that are damaged, used up to there", f"{where}: {what}")

    def member(self, name: str, kind: str, inside: str = "") -> str:
        """The clean name of an archive's member if it is a file to look at; "" if not, and noted.

        inside: the class of an archive in the archive.
        """
        clean = os.path.normpath(name).lstrip("/")
        if name.startswith("/") or clean.startswith(".."):
            self.leave_out(OUTSIDE, name)
        elif hidden(clean):
            pass
        elif kind == FILE:
            return inside + clean
        elif kind == FOLDER:
            self.folders.add(inside + clean)
        else:
            self.leave_out(kind, name)
        return ""

    def wants(self, name: str) -> bool:
        """Whether a file of this name is a picture, or the table of labels; what is neither that
        nor hidden is counted."""
        if hidden(name) or name == TABLE:
            return name == TABLE
        ending = os.path.splitext(name)[1].lower()
        if ending not in ENDINGS:
            self.leave_out(f"{ending or 'no ending'}: files that nothing here reads", name)
        return ending in ENDINGS


def hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden, or left behind by a tool."""
    return any(part.startswith(".") or part in TOOL_FOLDERS for part in name.split("/"))


def scan_folder(root: str, found: Search) -> None:
    """Pictures below a folder; links to folders are followed, so that a class may be a link.

    Left out are links to a folder that they or the root lie in, and whatever a class holds already.
    Links come last, so that a folder keeps its own name.
    """
    seen, links = set(), []
    homes = [(os.path.realpath(root), "")]  # folders that were walked through, and their names

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
        target = os.path.realpath(path)
        if any(within(os.path.realpath(here), target) for here in (os.path.dirname(path), root)):
            found.leave_out("links to a folder that they lie in, not followed", name)
        elif not walk(path, name):
            found.leave_out("links to a folder that its class holds already, not followed", name)
        else:
            found.folders |= {name} if "/" not in name else set()
            home = next((called + target[len(real):] for real, called in homes
                         if within(target, real)), "")
            if home:
                found.aliases[name] = home.strip("/")
            else:
                homes.append((target, name))


def within(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it; both absolute, without links."""
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def scan_old_folder(root: str, found: Search) -> None:
    """Pictures below a folder as runs found them that began before `scan_folder`: also in hidden
    folders, and as often as links lead to them."""
    for here, _, files in os.walk(root, followlinks=True):
        for file in files:
            if os.path.splitext(file)[1].lower() in ENDINGS:
                found.add(os.path.relpath(os.path.join(here, file), root), 0, 0, 0)
