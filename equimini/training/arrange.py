"""The order, names and class numbers of the pictures that a search found."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from typing import Any

import numpy as np

from equimini.training.archives import Reader
from equimini.training.search import ENCODING, NO_LABEL, TABLE, Search
from equimini.utils.errors import UserError, first_line

MAX_CLASSES = 100_000
SPLITS = {"train", "training", "val", "valid", "validation", "test", "dev"}


def arrange(path: str, kind: str, volumes: list[str],
            found: Search) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Names, class numbers and places of what was found, in the order of the names.

    Raises UserError where nothing was, or where folders are no classes.
    """
    tables = label_by_tables(path, Reader(kind, volumes), found)
    if labelled := tables or any(found.labels):
        names, used, numbered = by_label(found)
    else:
        names, used, numbered = without_top(found, kind), range(len(found.names)), False
    if not len(used):
        raise UserError(nothing_found(path, found))
    order = sorted(used, key=lambda i: names[i].replace("/", "\0"))
    order = tell_apart(names, order, kind, volumes, found)
    flat = "/" not in names[order[0]]
    for i in order:
        if ("/" not in names[i]) != flat:
            raise UserError(f"{path} holds pictures both directly "
                            f"({min(n for n in names if '/' not in n)}) and in sub-folders; put "
                            "each picture into a class sub-folder, or all in one")
    firsts = [names[i].partition("/")[0] for i in order]
    if flat:
        where = os.path.basename(os.path.realpath(volumes[0]))
        classes, firsts = [where if "folder" in kind else where.split(".")[0]], None
    elif numbered:
        count = len(found.class_names) or max(map(int, set(firsts))) + 1
        classes = [str(k) for k in range(count)]
    else:
        empty = set() if labelled else {f for f in found.folders if "/" not in f}
        classes = sorted({*firsts, *empty})
        if kind != "old folder":
            check_splits(path, classes)
    number = {name: k for k, name in enumerate(classes)}
    short = [names[i] if flat else names[i].partition("/")[2] for i in order]
    coded = [name.encode(*ENCODING) for name in short]
    arrays = {"labels": np.array([number[f] for f in firsts] if firsts else [0] * len(order)),
              "hashes": np.array([name_hash(own_name(names[i], found.aliases)) for i in order],
                                 np.uint32),
              "ends": np.cumsum([len(name) for name in coded]),
              "text": np.frombuffer(b"".join(coded), np.uint8),
              **{k: np.array(getattr(found, k))[order] for k in ("volumes", "offsets", "sizes")}}
    arrays = {k: v.astype(np.min_scalar_type(v.max())) if v.dtype == np.int64 else v
              for k, v in arrays.items()}
    about = {"kind": kind, "path": path, "volumes": volumes, "folders": classes, "flat": flat,
             "numbered": numbered, "classes": found.class_names if numbered and found.class_names
             else classes, "left_out": found.left_out}
    return about, arrays


def label_by_tables(path: str, reader: Reader, found: Search) -> bool:
    """Give pictures the labels in the dataset.json of their archive or folder, as StyleGAN and EDM
    keep them; whether there is one.  Raises UserError for labels that are no whole numbers."""
    tables: dict[int, dict[str, int]] = {}
    for i in reversed([i for i, name in enumerate(found.names) if name == TABLE]):
        _, _, *place = (values.pop(i) for values in found.columns())
        try:
            table = json.loads(reader.read(TABLE, *place))
            if isinstance(table, dict) and "labels" in table:
                tables[place[0]] = dict(table["labels"] or {})
            else:  # somebody else's
                found.leave_out(".json: files that nothing here reads", TABLE)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{TABLE} in {path} is damaged: {first_line(error)}") from None
    for label in (label for pairs in tables.values() for label in pairs.values()):
        if isinstance(label, bool) or not isinstance(label, int):
            what = "vectors" if isinstance(label, list) else f"such as {label!r}"
            raise UserError(f"the labels in {path} are {what}; classes must be whole numbers")
    for i, (name, volume) in enumerate(zip(found.names, found.volumes)):
        if volume in tables:  # one class for all if there are no labels
            found.labels[i] = str(tables[volume].get(name, "")) if tables[volume] else "0"
    return bool(tables)


def by_label(found: Search) -> tuple[list[str], list[int], bool]:
    """LABEL/NAME of every picture, those that have a label, and whether labels are numbers (most
    of them: then the others are damaged)."""
    whole = {label: bool(re.fullmatch(r"-?\d{1,18}", label)) for label in set(found.labels)}
    counts = Counter(whole[label] for label in found.labels if label)
    numbered, limit = counts[True] > counts[False], len(found.class_names) or MAX_CLASSES
    used, names = [], []
    for i, (name, label) in enumerate(zip(found.names, found.labels)):
        good = not numbered or whole[label]
        names.append(f"{int(label) if numbered and good else label}/{name}")
        if not label:
            found.leave_out(NO_LABEL, name)
        elif not good or numbered and not 0 <= int(label) < limit:
            found.leave_out(f"labels that are not 0 to {limit - 1}, left out",
                            f"{name}: {label[:40]}")
        else:
            used.append(i)
    return names, used, numbered


def without_top(found: Search, kind: str) -> list[str]:
    """Names without the folders that all pictures of an archive lie in, above their classes."""
    names = found.names
    while "folder" not in kind and names and all(name.count("/") > 1 for name in names) and \
            len({name.partition("/")[0] for name in names}) == 1:
        top = names[0].partition("/")[0] + "/"
        names = [name.removeprefix(top) for name in names]
        found.folders = {f.removeprefix(top) for f in found.folders if f.startswith(top)}
    return names


def tell_apart(names: list[str], order: list[int], kind: str, volumes: list[str],
               found: Search) -> list[int]:
    """`order` without members that a later one of the same archive replaces.

    Pictures of one name in several archives get that of their archive in front.
    """
    for attempt in range(2):
        again, last = [], -1
        for i in order:
            if last < 0 or names[i] != names[last]:
                again.append(i)
                last = i
            elif found.volumes[i] == found.volumes[last] and kind in ("tar", "zip"):
                found.leave_out("members that a later one of the same name replaces", names[i])
                again[-1] = last = i
            else:
                if not attempt:
                    found.leave_out("names found in several archives, told apart by these",
                                    names[i])
                volume = found.volumes[i]
                stem = os.path.basename(volumes[volume]).split(".")[0] + f"-{volume}" * attempt
                folder, _, rest = names[i].partition("/")
                again.append(i)
                names[i] = f"{folder}/{stem}/{rest}" if rest else f"{stem}-{folder}"
        order = sorted(again, key=lambda i: names[i].replace("/", "\0"))
    return order


def check_splits(path: str, classes: list[str]) -> None:
    """Raise UserError for the folders train/ and val/, which are no classes."""
    lower = {name.lower() for name in classes}
    if len(classes) > 1 and lower <= SPLITS and lower & {"train", "training"}:
        train = next(name for name in classes if name.lower() in ("train", "training"))
        other = next(name for name in reversed(classes) if name != train)
        raise UserError(f"{path} holds {train}/ and {other}/, which are no classes; give the "
                        f"one as --data {os.path.join(path, train)} and the other as --val-data "
                        f"{os.path.join(path, other)}")


def nothing_found(path: str, found: Search) -> str:
    """What to say of a source without pictures."""
    archives = next((e for e in (".tar", ".zip", ".parquet") if any(r.startswith(e + ":") for r in
                                                                    found.left_out)), "")
    if archives:
        return (f"no image files in {path}, but {archives} archives; give them as "
                f"--data '{os.path.join(path, '*' + archives)}'")
    left = "; ".join(f"{reason}: {n}, e.g. {name}" for reason, (n, name) in found.left_out.items())
    return (f"no image files in {path}; expected {path}/CLASS/picture.jpg, or pictures directly "
            f"in {path}{f' (left out: {left})' if left else ''}")


def own_name(name: str, aliases: dict[str, str]) -> str:
    """A name below links to folders, as it is without them: a picture stays on one side of the
    split, by whatever class it is found."""
    for link, home in reversed(aliases.items()):  # links inside links come last
        if name.startswith(link + "/"):
            return home + name[len(link):]
    return name


def name_hash(name: str) -> int:
    """32 bits of a name, evenly spread."""
    digest = hashlib.blake2b(name.encode(*ENCODING), digest_size=4).digest()
    return int.from_bytes(digest, "little")
