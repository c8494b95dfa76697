"""Which pictures are held out for validation, and what the classes are called."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from equimini.noise import rng
from equimini.training.index import Source, open_source
from equimini.training.options import BUILT_IN, DataConfig
from equimini.utils import checkpoint
from equimini.utils.errors import UserError, first_line
from equimini.utils.images import printable, read_rgb


class Part(NamedTuple):
    """Some pictures of a source, and their class numbers."""

    source: Source
    indices: np.ndarray
    labels: np.ndarray


def split_pictures(run: DataConfig) -> tuple[Part, Part, list[str]]:
    """The pictures for training and for validation, and the class names.

    Raises UserError for sources that cannot be used.
    """
    source = open_pictures(run, run.data)
    usable = name_classes(source, run.class_names)
    if run.val_data:
        val = open_pictures(run, run.val_data)
        return part(source, usable), number_as(source, val, run.val_data), source.classes
    if len(usable) < 2:
        raise UserError(f"{run.data} holds one picture; training needs at least two (one is held "
                        "out for validation)")
    held_out, kept = hold_out(run, source, usable)
    return part(source, kept), part(source, held_out), source.classes


def part(source: Source, indices: np.ndarray | None = None) -> Part:
    """These pictures of a source; None: all."""
    indices = np.arange(len(source), dtype=np.int32) if indices is None else indices
    return Part(source, indices, source.labels[indices])


def open_pictures(run: DataConfig, path: str) -> Source:
    """A source, with its index in --index, or in --out where that is a folder."""
    folder = run.index or (os.path.join(run.out, "index") if os.path.isdir(run.out) else None)
    return open_source(path, folder, run.allow_truncated, as_before=run.split == "order")


def hold_out(run: DataConfig, source: Source,
             usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pictures held out, and the others; at least one that can be read is held out.

    By name: those whose hash lies below a threshold, so that a picture stays on its side whatever
    else comes or goes.
    """
    if run.split == "name":
        hashes = source.hashes[usable]
        ranking = np.argsort(hashes, kind="stable")
        count = int((hashes < run.val_fraction * 2**32).sum())
    else:  # as runs did that began before there was a choice
        ranking = rng("split", run.seed).permutation(len(usable))
        count = round(len(usable) * run.val_fraction)
    good = next((k for k, i in enumerate(ranking) if readable(source, int(usable[i]))), 0)
    count = min(max(count, good + 1), len(usable) - 1)
    return usable[np.sort(ranking[:count])], usable[np.sort(ranking[count:])]


def readable(source: Source, i: int) -> bool:
    """Whether picture i can be decoded."""
    try:
        read_rgb(BytesIO(source.read(i)), 1)
    except Exception:  # see `ImageFolder.decode`
        return False
    return True


def name_classes(source: Source, path: str) -> np.ndarray:
    """Give the classes the names in a file; returns the pictures whose class has one.

    path: of a list, a name per line in the order of the numbers, or of lines with a class folder
    (a wnid) and its words; "": the classes are called as their folders.  Of several words between
    commas the first is taken.  Raises UserError where a class has none.
    """
    usable = np.arange(len(source), dtype=np.int32)
    if not path:
        return usable
    words = read_class_names(path)
    if isinstance(words, dict):
        if missing := [name for name in source.folders if name not in words]:
            raise UserError(f"--class-names {path} has no name for {len(missing)} of the classes, "
                            f"{printable(missing[0])} among them")
        words = [words[name] for name in source.folders]
    elif len(words) != len(source.folders) and not source.numbered:
        raise UserError(f"--class-names {path} has {len(words)} names, the data "
                        f"{len(source.folders)} classes; give one line for each class")
    usable = usable[source.labels < len(words)]
    if more := len(source) - len(usable):
        source.left_out[f"class numbers beyond the {len(words)} of --class-names, left out"] = \
            [more, source.name(int((source.labels >= len(words)).argmax()))]
    source.folders = [*source.folders, *map(str, range(len(source.folders), len(words)))]
    source.folders = source.folders[:len(words)]
    twice = {word for word, count in Counter(words).items() if count > 1}
    source.classes = [f"{word} ({name})" if word in twice else word
                      for word, name in zip(words, source.folders)]
    return usable


def read_class_names(path: str) -> list[str] | dict[str, str]:
    """A list of names, or names by class folder; see `name_classes`."""
    try:
        text = Path(path).read_text("utf-8")
        found = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --class-names {path}: {first_line(error)}") from None
    if isinstance(found, dict):  # class folder to words, or number to [class folder, words]
        pairs = {str(v[0]): str(v[1]) for v in found.values() if isinstance(v, list)}
        return pairs or {k: _first_word(str(v)) for k, v in found.items()}
    lines = [str(line).strip() for line in found if str(line).strip()]
    pairs = dict(re.split(r"[\s:,]+", line, maxsplit=1) for line in lines
                 if re.fullmatch(r"n\d{8}[\s:,]+.*", line))
    if len(pairs) == len(lines):
        return {k: _first_word(v) for k, v in pairs.items()}
    return [_first_word(line) for line in lines]


def _first_word(text: str) -> str:
    return text.split(",")[0].strip()


def number_as(source: Source, other: Source, path: str) -> Part:
    """All pictures of `other`, their classes numbered as in `source`.

    Raises UserError where it has classes that `source` lacks.
    """
    number = {name: k for k, name in enumerate(source.folders)}
    if other.flat and len(number) == 1:
        number = {other.folders[0]: 0}
    elif other.flat or any(name not in number for name in other.folders):
        raise UserError(f"--val-data {path} has the classes {other.folders}, --data has "
                        f"{source.folders}")
    numbers = np.array([number[name] for name in other.folders], np.int32)
    return Part(other, np.arange(len(other), dtype=np.int32), numbers[other.labels])


def as_trained(cfg: DataConfig, path: str) -> DataConfig:
    """`cfg`, with the pictures held out that were in the training of checkpoint `path`.

    Options that say otherwise are followed, with a warning: the model was then trained on some
    of the pictures held out.
    """
    run = {"split": "order", **trained_with(path)}
    if "val_fraction" not in run or cfg.data in BUILT_IN or cfg.val_data:
        return cfg
    names = ["split"] + ["val_fraction"] * (not run.get("latents"))
    for name in names + ["seed"] * (run["split"] == "order" and "seed" in run):
        asked, default = getattr(cfg, name), type(cfg).__dataclass_fields__[name].default
        if asked == default:
            cfg = dataclasses.replace(cfg, **{name: run[name]})
        elif asked != run[name]:
            warnings.warn(f"--{name.replace('_', '-')} {asked} holds out other pictures than the "
                          f"training of {path}, which had {run[name]}: some of them were trained "
                          "on", stacklevel=2)
    return cfg


def trained_with(path: str) -> dict[str, Any]:
    """The run's options in a checkpoint (tensors are not read); empty if there are none."""
    try:
        content = torch.load(checkpoint.find(path), "cpu", weights_only=True, mmap=True)
        return content["config"].get("run", {})
    except Exception:  # whoever loads the weights says what is wrong with the file
        return {}


def check_split(before: DataConfig, now: DataConfig) -> None:
    """Raise UserError where a resumed run would hold out other pictures than before."""
    if now.data in BUILT_IN or now.val_data or getattr(now, "latents", ""):
        return
    for name in ("split", "val_fraction") + ("seed",) * (now.split == "order"):
        if getattr(before, name) != getattr(now, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(now, name)} would hold out other "
                            f"pictures than the run to resume, which has {getattr(before, name)}; "
                            "leave it out, or start a run of its own with --init-from")
