"""The kinds of files for tests.soak.files: right ones, how they are changed, what reads them."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import re
import shutil
import tarfile
import zipfile
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image

import equimini.training.index as index
import sample
import train_generator
import train_tokenizer
from equimini import load_generator
from equimini.convert import release
from equimini.evaluate.sources import Reference, open_source
from equimini.page.history import History
from equimini.sampling.edit import open_picture
from equimini.training import cache_latents
from equimini.training.cache_latents import CachedLatents
from equimini.training.options import DataConfig
from equimini.utils import command_line
from equimini.utils.checkpoint import load_tokenizer
from equimini.utils.images import load_columns
from tests.convert.test_convert import random_tokenizer, tokenizer_file
from tests.helpers.scripts import GENERATOR, TOKENIZER, call
from tests.soak.mutations import damage, in_checkpoint, in_json, in_zip

ROW = np.dtype([("token", "f4", 4), ("pixels", "u1", (4, 2, 3)), ("label", "i4")])
TEXTS = (
    "", " ", "-1", "0", "1", "2", "3", "64", "100", "1e400", "nan", "-inf", "0x10", "٣", "a:b", ":",
    ",", "1,,2", "5-3", "0-99999999999", "{0..2}", "*", "..", "/", "/dev/null", "x.png", "s/s.npz",
    "generator.pt", "tokenizer.pt", "pictures", "é\u200b\n", "\udcff", "all", "forest", "forest:3",
    "auto", "cpu", "cuda:9", "mps", "none", "--", "linear", "euler", "bf16", "x" * 300)


@dataclass
class Target:
    """One kind.  files: a folder that each case gets a copy of; mutated: names in it of which one
    is changed (none: a command line is made instead); use: called in that folder; checked: changed
    bytes must be noticed, or not matter."""

    name: str
    files: Path
    mutated: list[str]
    mutations: tuple[Callable, ...]
    use: Callable[..., Any]
    checked: bool = False
    right: Any = None

    def check(self) -> Any:
        """What the undamaged files give."""
        os.chdir(self.files)
        return self.use()


def sha(*values: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in values)).hexdigest()


def make_targets(folder: Path) -> dict[str, Target]:
    """Train two small models and write every kind of file once."""
    made = folder / "made"
    made.mkdir()
    call("train_tokenizer.py", *TOKENIZER, "--steps", 6, cwd=made)
    call("train_generator.py", *GENERATOR, "--steps", 6, cwd=made)
    shutil.copy(made / "runs/tokenizer/last.pt", made / "tokenizer.pt")
    shutil.copy(made / "runs/generator/last.pt", made / "generator.pt")
    draw = np.random.default_rng(0)
    for k in range(6):
        (made / f"pictures/{k % 2}").mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 50, 3), np.uint8)
        ending = ("png", "jpg", "webp")[k // 2]
        Image.fromarray(pixels).save(made / f"pictures/{k % 2}/{k}.{ending}")
    call("equimini.training.cache_latents", "--tokenizer", "tokenizer.pt", "--out", "latents",
         "--data", "pictures", "--workers", 0, "--val-fraction", 0.4, cwd=made)
    words = "--checkpoint generator.pt --steps 1"
    call("sample.py", *words.split(), "--save-tokens", "tokens.pt", "--columns", 5, cwd=made)
    call("sample.py", *SCROLL.split(), "--scroll", 12, cwd=made)
    square = draw.normal(size=(8, 40))
    (made / "s").mkdir()
    np.savez(made / "s/s.npz", mu=square.mean(1), sigma=np.cov(square))
    np.savez(made / "s/p.npz", arr_0=draw.integers(0, 256, (4, 16, 16, 3), np.uint8))
    with tarfile.open(made / "x.tar", "w") as tar, zipfile.ZipFile(made / "x.zip", "w") as packed:
        for path in sorted((made / "pictures").glob("*/*")):
            tar.add(path, f"./{path.parent.name}/{path.name}")
            packed.write(path, f"{path.parent.name}/{path.name}")
            packed.writestr("dataset.json", '{"labels": [["0/0.png", 1], ["1/1.png", 0]]}')
    index.SMALL = 0  # so that an index of few pictures is kept
    os.utime(made / "x.tar", (0, 0))  # long ago: its index is trusted
    os.chdir(made)
    index.open_source("x.tar", "index")
    kept = next(Path("index").iterdir()).name
    weights = random_tokenizer()
    tokenizer_file(made / "new.ckpt", weights)
    tokenizer_file(made / "old.ckpt", weights, _use_new_zipfile_serialization=False)
    (made / "strip").mkdir()
    history = History(made / "strip", ROW)
    for k in range(4):
        history.edit(k, 0, np.zeros(3, ROW), joined=k == 2, seed=k)
    history.undo(), history.redo()

    targets: dict[str, Target] = {}

    def add(name: str, names: str, mutated: str | list[str], mutations: tuple[Callable, ...],
            use: Callable[..., Any], checked: bool = False) -> None:
        """A kind whose cases get a folder with `names`."""
        for each in names.split():
            (target := folder / name / each).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (made / each).is_dir() else shutil.copy2)(made / each, target)
        targets[name] = Target(name, folder / name, mutated.split() if isinstance(mutated, str)
                               else mutated, mutations, use, checked)

    def resume(script: Any) -> Callable[[], int]:
        return lambda: script.main(["--resume", "--steps", "7"]) or 1

    model, tokenizer = load_generator(made / "generator.pt"), load_tokenizer(made / "tokenizer.pt")
    pt, packed = (damage, in_zip, in_checkpoint, in_checkpoint), (damage, in_zip, in_zip)
    text, mixed = (damage, in_json), (damage, inside)
    latents = [f"latents/{p.name}" for p in sorted((made / "latents").iterdir())]
    add("generator", "generator.pt", "generator.pt", pt, draw_picture, True)
    add("tokenizer", "tokenizer.pt", "tokenizer.pt", pt, decode, True)
    add("resumed tokenizer", "runs/tokenizer", "runs/tokenizer/last.pt", pt,
        resume(train_tokenizer))
    add("resumed generator", "runs", "runs/generator/last.pt", pt, resume(train_generator))
    add("log", "runs", "runs/generator/log.jsonl", text, resume(train_generator))
    add("token file", "tokens.pt", "tokens.pt", pt,
        lambda: sha(open_picture("tokens.pt", model, 0)[1]), True)
    add("foreign", "new.ckpt old.ckpt", "new.ckpt old.ckpt", mixed, convert)
    add("statistics", "s", "s/s.npz s/p.npz", packed, read_npz)
    add("archive", "x.tar x.zip", "x.tar x.zip", mixed, read_archives)
    add("index", "x.tar index", f"index/{kept}", packed,
        lambda: read_all(index.open_source("x.tar", "index")))
    add("latents", "latents", latents, mixed, lambda: [
        CachedLatents("latents", split, tokenizer, 0)[0, 0] for split in ("train", "val")])
    add("cache", "latents tokenizer.pt pictures", latents, mixed,
        lambda: cache_latents.encode(cache_latents.CacheConfig(
            out="latents", tokenizer="tokenizer.pt", data="pictures", workers=0,
            val_fraction=0.4)) or 1)
    add("scroll", "walk generator.pt", "walk/state.pt", pt,
        lambda: sample.main([*SCROLL.split(), "--scroll", "14", "--resume"]) or 1)
    add("strip", "strip", "strip/history.db", (damage,), read_strip)
    add("picture", "pictures", "pictures/0/0.png pictures/0/2.jpg pictures/0/4.webp", (damage,),
        read_pictures)
    add("command line", "generator.pt tokenizer.pt s pictures", "", (command,), run_command)
    return targets


SCROLL = "--checkpoint generator.pt --steps 1 --tile-columns 4 --out walk --classes 0:2,1:2"


def inside(draw: random.Random, data: bytes) -> bytes:
    """A change inside a zip or JSON; of bytes where the file is neither."""
    return (in_json if data[:1] in (b"{", b"[") else in_zip if data[:2] == b"PK" else
            damage)(draw, data)


def draw_picture() -> str:
    model = load_generator("generator.pt")
    return sha(model.sample(model.classes[:1], seed=1, steps=1, columns=3))


def decode() -> str:
    tokenizer = load_tokenizer("tokenizer.pt")
    with torch.no_grad():
        return sha(tokenizer.decode(torch.zeros(1, 3, tokenizer.config.token_channels)))


def convert() -> int:
    for name in ("new.ckpt", "old.ckpt"):
        release.main([name, "--out", name + ".pt"])
    return 1


def read_npz() -> int:
    for name in ("s/s.npz", "s/p.npz"):
        found = open_source(name, "--reference", 8, DataConfig(), None)
        if not isinstance(found, Reference):
            [found[0, k] for k in range(min(len(found), 20))]
    return 1


def read_archives() -> int:
    for name in ("x.tar", "x.zip"):
        read_all(index.open_source(name, truncated=True))
        read_all(index.open_source(name))
    return 1


def read_all(source: index.Source) -> int:
    for k in range(min(len(source), 100)):
        source.where(k)
        with suppress(OSError, ValueError):  # a picture that cannot be read is left out
            source.read(k)
    return 1


def read_strip() -> int:
    history = History(Path("strip"), ROW)
    history.before(), history.last()
    for act in (history.undo, history.undo, history.redo):
        act()
    history.edit(0, min(2, len(history.columns)), np.zeros(1, ROW))
    History(Path("strip"), ROW)
    return 1


def read_pictures() -> int:
    for path in sorted(Path("pictures").glob("*/*")):
        load_columns(path, 32, 4)
    return 1


PROGRAMS = {  # what each is always given, so that no case takes long
    "tokenizer": (train_tokenizer.main, TOKENIZER + ["--steps", "1", "--dry-run"]),
    "generator": (train_generator.main, GENERATOR + ["--steps", "1", "--dry-run"]),
    "resumed": (train_generator.main, ["--resume", "--init-from", "generator.pt"]),
    "sample": (sample.main, "--checkpoint generator.pt --steps 1 --columns 3 --count 1".split()),
    "convert": (release.main, ["generator.pt", "--out", "out.pt"])}


@functools.cache
def options_of(name: str) -> list[str]:
    """The options that a program's --help names."""
    said = io.StringIO()
    with suppress(SystemExit), redirect_stdout(said):
        PROGRAMS[name][0](["--help"])
    return sorted(set(re.findall(r"--[a-z][a-z-]+", said.getvalue())) - {"--help"})


def command(draw: random.Random) -> tuple[str, list[str]]:
    """A program and words for it: its own options, with values of which most are odd."""
    name = draw.choice(list(PROGRAMS))
    words, options = list(PROGRAMS[name][1]), options_of(name)
    for _ in range(draw.choice((1, 1, 2, 4))):
        words += [draw.choice(options)] + [draw.choice(TEXTS)] * (draw.random() < 0.85)
    return name, words


def run_command(what: tuple[str, list[str]]) -> int:
    command_line.run(lambda: PROGRAMS[what[0]][0](what[1]))
    return 1
