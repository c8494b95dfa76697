"""What tests.soak.files tries: right files, how they are changed, and what reads them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
import zipfile
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from PIL import Image

import sample
import train_generator
import train_tokenizer
from equimini import load_generator
from equimini.convert import release
from equimini.evaluate.sources import Reference, open_source
from equimini.page.history import History
from equimini.sampling.edit import open_picture
from equimini.training import cache_latents, index
from equimini.training.options import DataConfig
from equimini.utils import command_line
from equimini.utils.checkpoint import load_tokenizer
from equimini.utils.images import load_columns
from tests.convert.test_convert import random_tokenizer, tokenizer_file
from tests.helpers.scripts import GENERATOR, TOKENIZER, call

ROW = np.dtype([("token", "f4", 4), ("pixels", "u1", (4, 2, 3)), ("label", "i4")])
TEXTS = (
    "", " ", "-1", "0", "1", "2", "3", "64", "100", "1e400", "nan", "-inf", "0x10", "٣", "a:b", ":",
    ",", "1,,2", "5-3", "0-99999999999", "{0..2}", "*", "pictures/..", "/proc", "/dev/null",
    "x.png", "s/s.npz", "generator.pt", "tokenizer.pt", "pictures", "é\u200b\n", "\udcff", "all",
    "forest", "forest:3", "auto", "cpu", "cuda:9", "mps", "none", "--", "linear", "euler", "bf16",
    "x" * 300)
NUMBERS = (0, 1, 127, 128, 255, 2**15 - 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD = (None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), "",
       "..", "../x", "/", "a\0b", "\ud800", "x" * 3000, [], [[]], {}, {"": 1}, [None] * 3, b"")
SCROLL = "--checkpoint generator.pt --steps 1 --tile-columns 4 --out walk --classes 0:2,1:2"


class Target(NamedTuple):
    """One kind; right: what `use` gives, where changed bytes must be noticed or not matter."""

    name: str
    files: Path  # each case gets a copy of this folder
    mutated: list[str]  # names in it of which one is changed; none: a command line is made
    mutations: tuple[Callable, ...]
    use: Callable[..., Any]  # called in that folder
    right: Any = None


def make_targets(folder: Path) -> dict[str, Target]:
    """Train two small models and write every kind of file once."""
    (made := folder / "made").mkdir()
    os.chdir(made)
    for kind, flags in (("tokenizer", TOKENIZER), ("generator", GENERATOR)):
        call(f"train_{kind}.py", *flags, "--steps", 6, cwd=made)
        shutil.copy(f"runs/{kind}/last.pt", f"{kind}.pt")
    for name in ("pictures/0", "pictures/1", "s", "strip"):
        Path(name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for k in range(6):
        pixels = Image.fromarray(draw.integers(0, 256, (40, 50, 3), np.uint8))
        pixels.save(f"pictures/{k % 2}/{k}." + ("png", "jpg", "webp")[k // 2])
    call("equimini.training.cache_latents", "--tokenizer", "tokenizer.pt", "--out", "latents",
         "--data", "pictures", "--workers", 0, "--val-fraction", 0.4, cwd=made)
    words = "--checkpoint generator.pt --steps 1 --columns 5 --save-tokens tokens.pt"
    call("sample.py", *words.split(), cwd=made)
    call("sample.py", *SCROLL.split(), "--scroll", 12, cwd=made)
    square = draw.normal(size=(8, 40))
    np.savez("s/s.npz", mu=square.mean(1), sigma=np.cov(square))
    np.savez("s/p.npz", arr_0=draw.integers(0, 256, (4, 16, 16, 3), np.uint8))
    with tarfile.open("x.tar", "w") as tar, zipfile.ZipFile("x.zip", "w") as packed:
        for path in (pictures := sorted(Path("pictures").glob("*/*"))):
            tar.add(path, f"./{path.parent.name}/{path.name}")
            packed.write(path, f"{path.parent.name}/{path.name}")
        packed.writestr("dataset.json", '{"labels": [["0/0.png", 1], ["1/1.png", 0]]}')
    with suppress(ImportError):  # pyarrow is not everywhere
        from pyarrow import parquet, table
        images = {"image": [path.read_bytes() for path in pictures], "label": [0, 0, 0, 1, 1, 1]}
        parquet.write_table(table(images), "x.parquet", row_group_size=2)
    index.SMALL = 0  # so that an index of few pictures is kept
    os.utime("x.tar", (0, 0))  # long ago: its index is trusted
    index.open_source("x.tar", "index")
    kept = next(Path("index").iterdir()).name
    weights = random_tokenizer()
    tokenizer_file(made / "new.ckpt", weights)
    tokenizer_file(made / "old.ckpt", weights, _use_new_zipfile_serialization=False)
    history = History(Path("strip"), ROW)
    for k in range(4):
        history.edit(k, 0, np.zeros(3, ROW), joined=k == 2, seed=k)
    history.undo(), history.redo()

    for name, (program, _) in PROGRAMS.items():
        with suppress(SystemExit), redirect_stdout(said := io.StringIO()):
            program(["--help"])
        OPTIONS[name] = sorted({*re.findall(r"--[a-z][a-z-]+", said.getvalue())} - {
            "--help", "--compile"})  # which begins a compiler
    model, tokenizer = load_generator("generator.pt"), load_tokenizer("tokenizer.pt")
    text, mixed, pt = (damage, in_json), (damage, in_zip), (damage, in_zip, in_checkpoint)
    latents = " ".join(map(str, sorted(Path("latents").iterdir())))
    caching = cache_latents.CacheConfig(out="latents", tokenizer="tokenizer.pt", data="pictures",
                                        workers=0, val_fraction=0.4)
    targets = {}

    def add(name: str, mutated: str, mutations: tuple[Callable, ...], use: Callable[..., Any],
            beside: str = "", checked: bool = False) -> None:
        """A kind whose cases get a folder with the files to be mutated, and those `beside`."""
        for each in {*(beside or mutated).split()}:
            (place := folder / name / each).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (made / each).is_dir() else shutil.copy2)(made / each, place)
        os.chdir(folder / name)
        targets[name] = Target(name, folder / name, mutated.split(), mutations, use,
                               use() if checked else None)

    def resume(script: Any) -> Callable[[], None]:
        return lambda: script.main(["--resume", "--steps", "7"])

    add("generator", "generator.pt", pt, lambda: sha((model := load_generator(
        "generator.pt")).sample(model.classes[:1], seed=1, steps=1, columns=3)), checked=True)
    add("tokenizer", "tokenizer.pt", pt, decode, checked=True)
    add("resumed tokenizer", "runs/tokenizer/last.pt", pt, resume(train_tokenizer), "runs")
    add("resumed generator", "runs/generator/last.pt", pt, resume(train_generator), "runs")
    add("log", "runs/generator/log.jsonl", text, resume(train_generator), "runs")
    add("token file", "tokens.pt", pt, lambda: sha(open_picture("tokens.pt", model, 0)[1]),
        checked=True)
    add("foreign", "new.ckpt old.ckpt", mixed, lambda: [
        release.main([name, "--out", name + ".pt"]) for name in ("new.ckpt", "old.ckpt")])
    add("statistics", "s/s.npz s/p.npz", mixed, read_npz)
    for name in made.glob("x.*"):
        add(name.suffix[1:], name.name, mixed, lambda name=name.name: [
            read(index.open_source(name, truncated=t)) for t in (True, False)])
    add("index", f"index/{kept}", mixed, lambda: read(index.open_source("x.tar", "index")),
        "x.tar index")
    add("latents", latents, mixed, lambda: [cache_latents.CachedLatents(
        "latents", split, tokenizer, 0)[0, 0] for split in ("train", "val")])
    add("cache", latents, mixed, lambda: cache_latents.encode(caching),
        "latents tokenizer.pt pictures")
    add("scroll", "walk/state.pt", pt,
        lambda: sample.main([*SCROLL.split(), "--scroll", "14", "--resume"]), "walk generator.pt")
    add("strip", "strip/history.db", (damage,), read_strip, "strip")
    add("picture", "pictures/0/0.png pictures/0/2.jpg pictures/0/4.webp", (damage,),
        lambda: [load_columns(path, 32, 4) for path in pictures], "pictures")
    add("command line", "", (command,), lambda what: command_line.run(
        lambda: PROGRAMS[what[0]][0](what[1])), "generator.pt tokenizer.pt s pictures")
    return targets


def damage(draw: random.Random, data: bytes) -> bytes:
    """One to four changes of bytes: flipped, cut off, taken out, put in, doubled, zeroed."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, size = draw.randrange(len(found) + 1), draw.choice((1, 2, 4, 8, 100, 5000))
        part, width = found[at:at + size], draw.choice((1, 2, 4, 8))
        number = draw.choice(NUMBERS) % 256**width
        length, new = draw.choice((
            (1, bytes(x ^ 1 << draw.randrange(8) for x in part[:1])), (len(found), b""),
            (size, b""), (0, draw.randbytes(min(size, 100))), (0, part), (size, bytes(len(part))),
            (width, number.to_bytes(width, draw.choice(("little", "big"))))))
        found[at:at + length] = new
    return bytes(found)


def in_zip(draw: random.Random, data: bytes) -> bytes:
    """A zip with one member changed, left out, doubled or renamed; its checksums are right.  What
    is no zip is changed otherwise."""
    if data[:2] != b"PK":
        return (in_json if data[:1] in (b"{", b"[") else damage)(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    k, written = draw.randrange(len(members)), io.BytesIO()
    name, content = members[k]
    other = draw.choice((name[:-1], "../" + name, name.upper(), "x"))
    head = damage(draw, content[:128]) + content[128:]  # the first bytes say what it is
    whole = name, damage(draw, content)
    members[k:k + 1] = draw.choice(([], [members[k], whole], [(other, content)], [(name, head)],
                                    [whole], [whole], [whole], [whole]))
    with zipfile.ZipFile(written, "w", draw.choice((0, 0, zipfile.ZIP_DEFLATED))) as archive:
        for member in members:
            archive.writestr(*member)
    return written.getvalue()


def in_checkpoint(draw: random.Random, data: bytes) -> bytes:
    """A checkpoint with one or two of its values or keys changed."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(draw.choice((1, 1, 2))):
        content = changed(draw, content, odd_tensor)
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


def in_json(draw: random.Random, data: bytes) -> bytes:
    """JSON, or lines of it, with a value or a key changed."""
    lines = data.decode().splitlines(keepends=True)
    if whole := not lines[0].rstrip().endswith("}"):
        lines = [data.decode()]
    k = draw.randrange(len(lines))
    value = changed(draw, json.loads(lines[k]), lambda draw, old: draw.choice(ODD))
    lines[k] = json.dumps(value, default=repr) + ("" if whole else "\n")
    if draw.random() < 0.1:
        lines.append(draw.choice(("[" * 10**5, "{}\n", "null\n", "\n", "\xff\n", '{"step": 1')))
    return "".join(lines).encode("utf-8", "replace")


def changed(draw: random.Random, value: Any, leaf: Any) -> Any:
    """A nest of dicts and lists with one place, at random, that is odd."""
    nest = isinstance(value, (dict, list, tuple))
    if not nest or not value or draw.random() < 0.05:
        return draw.choice(ODD) if draw.random() < 0.4 else leaf(draw, value)
    copy, chance = dict(value) if isinstance(value, dict) else list(value), draw.random()
    key = draw.choice(list(copy) if isinstance(value, dict) else range(len(copy)))
    if chance < 0.1:
        del copy[key]
    elif chance < 0.15 and isinstance(copy, dict):
        copy[draw.choice(("", "x", 0, str(key) + ".weight"))] = copy.pop(key)
    else:
        copy[key] = changed(draw, copy[key], leaf)
    return tuple(copy) if isinstance(value, tuple) else copy


def odd_tensor(draw: random.Random, old: Any) -> Any:
    """A tensor of another shape, dtype or content; of anything else, something near it."""
    if isinstance(old, torch.Tensor):
        filled = (lambda x: torch.full_like(old, x) if old.is_floating_point() else old * 0)
        return draw.choice((
            lambda: old[None], lambda: old.flatten(), lambda: old[:0] if old.dim() else old.int(),
            lambda: old.to(torch.complex64), lambda: old.to(torch.int64), lambda: old.bool(),
            lambda: filled(float("nan")), lambda: filled(6e4), lambda: filled(0.0),
            lambda: old.double(), lambda: old.half(), lambda: torch.zeros(1).expand(2**40),
            lambda: torch.zeros(3, 0, 5), lambda: torch.tensor(1.0),
            lambda: old.to_sparse(), lambda: old.tolist()))()
    if isinstance(old, bool) or old is None:
        return draw.choice((not old, 2))
    if isinstance(old, (int, float)):
        return draw.choice((-old, old + 1, old * 2, old * 10**6, str(old), [old], float(old)))
    return draw.choice((str(old) + "x", [old], "")) if isinstance(old, str) else draw.choice(ODD)


def sha(*values: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in values)).hexdigest()


@torch.no_grad()
def decode() -> str:
    tokenizer = load_tokenizer("tokenizer.pt")
    return sha(tokenizer.decode(torch.zeros(1, 3, tokenizer.config.token_channels)))


def read_npz() -> None:
    for name in ("s/s.npz", "s/p.npz"):
        found = open_source(name, "--reference", 8, DataConfig(), None)
        if not isinstance(found, Reference):
            [found[0, k] for k in range(min(len(found), 20))]


def read(source: index.Source) -> None:
    for k in range(min(len(source), 100)):
        source.where(k)
        with suppress(OSError, ValueError):  # a picture that cannot be read is left out
            source.read(k)


def read_strip() -> None:
    history = History(Path("strip"), ROW)
    history.before(), history.last(), history.undo(), history.undo(), history.redo()
    history.edit(0, min(2, len(history.columns)), np.zeros(1, ROW))
    History(Path("strip"), ROW)


PROGRAMS = {  # what each is always given, so that no case takes long
    "tokenizer": (train_tokenizer.main, TOKENIZER + ["--steps", "1", "--dry-run"]),
    "generator": (train_generator.main, GENERATOR + ["--steps", "1", "--dry-run"]),
    "resumed": (train_generator.main, ["--resume", "--init-from", "generator.pt"]),
    "sample": (sample.main, "--checkpoint generator.pt --steps 1 --columns 3 --count 1".split()),
    "convert": (release.main, ["generator.pt", "--out", "out.pt"])}
OPTIONS: dict[str, list[str]] = {}  # of each, as --help names them


def command(draw: random.Random) -> tuple[str, list[str]]:
    """A program and words for it: its own options, with values of which most are odd."""
    name = draw.choice(list(PROGRAMS))
    words, options = list(PROGRAMS[name][1]), OPTIONS[name]
    for _ in range(draw.choice((1, 1, 2, 4))):
        words += [draw.choice(options)] + [draw.choice(TEXTS)] * (draw.random() < 0.85)
    return name, words
