"""Files that can be read but do not hold what they should: one sentence, nothing lost.

Found by `python -m tests.soak.files`.
"""

import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch

from equimini import load_generator, load_tokenizer
from equimini.config import Checked
from equimini.evaluate.options import GENERATOR
from equimini.evaluate.sources import open_source
from equimini.page.history import History
from equimini.sampling.edit import open_picture
from equimini.sampling.options import SamplingOptions
from equimini.training.cache_latents import CachedLatents
from equimini.training.loop import Log
from equimini.training.options import DataConfig
from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from equimini.utils.files import claim
from tests.helpers.scripts import call, mistake

MISSING = object()


def change(path, place, value):
    """Save a checkpoint again with another value at a place such as 'config.model'."""
    content = torch.load(path, weights_only=True)
    *way, last = place.split(".")
    inner = content
    for name in way:
        inner = inner[name]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    torch.save(content, path)


@pytest.mark.parametrize("place, value", (
    ("format", MISSING), ("config", MISSING), ("config.model", 5), ("config.model", {3: 4, "x": 5}),
    ("config.model.objective", 3), ("classes", [1, 2]), ("columns", "x"), ("columns", -3),
    ("ema", []), ("ema", {3: torch.ones(1)}), ("tokenizer", None), ("tokenizer.config", MISSING),
    ("ema", lambda ema: {**ema, "no_class": ema["no_class"].to_sparse()}),
    ("model", torch.zeros(1).expand(2**40))))
def test_a_generator(runs, tmp_path, place, value):
    path = shutil.copy(runs / "runs/generator/last.pt", tmp_path)
    change(path, place, value)
    with pytest.raises(UserError, match="last.pt|checkpoint's") as told:
        load_generator(path).sample([0], steps=1, columns=2)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("place", (
    "tokenizer.config.base_channels", "tokenizer.config.z_channels", "tokenizer.config.blocks",
    "tokenizer.config.image_size", "config.model.embed_dim", "config.model.layers",
    "config.model.class_tokens", "config.model.head_width", "config.model.head_depth"))
def test_a_model_far_larger_than_its_weights_is_not_built(runs, tmp_path, place):
    path = shutil.copy(runs / "runs/generator/last.pt", tmp_path)
    change(path, place, lambda number: number * 1024)
    if place.endswith("embed_dim"):
        change(path, "config.model.heads", lambda number: number * 1024)
    with pytest.raises(UserError, match="last.pt.*of another model than its weights"):
        load_generator(path)


@pytest.mark.parametrize("change_members", (
    lambda members: members["x/data.pkl"].replace(b"}", b"", 1),
    lambda members: members["x/data.pkl"][:-40]))
def test_a_pickle_that_ends_early(tmp_path, change_members):
    written = io.BytesIO()
    torch.save({"equimini": "tokenizer", "format": 1, "ema": {"w": torch.ones(3)}}, written)
    with zipfile.ZipFile(written) as archive:
        members = {f"x/{name.split('/', 1)[1]}": archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in {**members, "x/data.pkl": change_members(members)}.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="x.pt is"):
        checkpoint.load(tmp_path / "x.pt", "tokenizer")


@pytest.mark.parametrize("kind, place, value", (
    ("tokenizer", "step", "3"),
    ("tokenizer", "disc_optimizer", MISSING),
    ("generator", "optimizer.state", MISSING), ("generator", "config.run", []),
    ("generator", "optimizer.state", lambda old: {**old, 0: {"step": torch.tensor(1.0)}}),
    ("tokenizer", "optimizer.state", lambda old: {
        k: {**kept, "step": -1e9 * kept["step"]} for k, kept in old.items()}),
    ("generator", "optimizer.param_groups", lambda old: [{**group, "betas": 3} for group in old]),
    ("generator", "optimizer.param_groups", lambda old: [
        {**group, "betas": (0.9, 2.0)} for group in old])))
def test_a_resumed_run(runs, tmp_path, kind, place, value):
    shutil.copytree(runs / f"runs/{kind}", tmp_path / f"runs/{kind}")
    change(tmp_path / f"runs/{kind}/last.pt", place, value)
    assert re.search("last.pt|checkpoint's", mistake(f"train_{kind}.py", "--resume", "--steps", 7,
                                                     cwd=tmp_path))


@pytest.mark.parametrize("kind, place, value", (
    ("tokenizer", "ema", MISSING),
    ("tokenizer", "config.model.base_channels", lambda number: 4096 * number),
    ("generator", "config.model.head_width", lambda number: 4096 * number),
    ("generator", "config.model.layers", lambda number: 4096 * number)))
def test_a_run_goes_on_from_the_checkpoint_before(runs, tmp_path, kind, place, value):
    """What `load` sees is told before a model of that size is built."""
    shutil.copytree(runs / f"runs/{kind}", tmp_path / f"runs/{kind}")
    change(tmp_path / f"runs/{kind}/last.pt", place, value)
    assert "last.pt is damaged" in (said := call(f"train_{kind}.py", "--resume", "--steps", 7,
                                                 cwd=tmp_path))
    assert "continuing from the one before it" in said
    for older in (tmp_path / f"runs/{kind}").glob("last-*.pt"):
        older.unlink()
    change(tmp_path / f"runs/{kind}/last.pt", place, value)
    assert "last.pt is damaged" in mistake(f"train_{kind}.py", "--resume", "--steps", 8,
                                           cwd=tmp_path)


def test_a_log_loses_its_damaged_lines_alone(tmp_path):
    lines = b'{"step": 1}\n\xff\0\0\n[3]\n{"step": "x"}\n{"step": 2}\n{"step": 9}\n{"step": 3'
    (tmp_path / "log.jsonl").write_bytes(lines)
    with pytest.warns(UserWarning, match="3 damaged lines"):
        Log(tmp_path / "log.jsonl", 5)
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("name", ("mu", "arr_0"))
def test_an_array_whose_header_is_no_python(tmp_path, name):
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b"{(".ljust(118)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for each in {name, "sigma"} if name == "mu" else {name}:
            archive.writestr(f"{each}.npy", header)
    with pytest.raises(UserError, match="must be an .npz"):
        open_source(str(tmp_path / "x.npz"), "--reference", 8, DataConfig(), None)


def test_latents(runs, tmp_path):
    call("equimini.training.cache_latents", "--out", tmp_path / "l", "--images", 8, "--workers", 0,
         cwd=runs)
    tokenizer = load_tokenizer(runs / "runs/tokenizer/last.pt")
    meta, labels = json.loads((tmp_path / "l/meta.json").read_text()), {"train": np.arange(8) % 2}
    cases = {"labels.npz": [b"", labels, {"train": np.full(8, 99)}, {"train": np.array(["a"] * 8)}],
             "meta.json": [b"{", b"\xff", b"3", b"{}", json.dumps({**meta, "classes": 1}).encode()],
             "train-00000.npy": [b"", (tmp_path / "l/train-00000.npy").read_bytes()[:-8],
                                 *(np.zeros((8, 1, 4, 1)[:n], np.float32) for n in (3, 4))]}
    for name, contents in cases.items():
        path = tmp_path / "l" / name
        before = path.read_bytes()
        for content in contents:
            with open(path, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    (np.savez(file, **content) if isinstance(content, dict) else
                     np.save(file, content))
            with pytest.raises(UserError, match=f"{tmp_path}/l"):
                for split in ("train", "val"):
                    CachedLatents(str(tmp_path / "l"), split, tokenizer, 0)
        path.write_bytes(before)
    (tmp_path / "l/val-00000.labels").write_bytes(b"[1, \xff")
    assert "val-00000.labels" in mistake("equimini.training.cache_latents", "--out", tmp_path / "l",
                                         "--images", 8, "--workers", 0, cwd=runs)


def test_a_plan(tmp_path):
    for content in (b"", b"\xff", b"3", b"[1]"):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(UserError, match="plan.json is damaged"):
            claim(tmp_path, {"a": 1}, "samples", "choose another --out")


def test_a_strip(tmp_path):
    row = np.dtype([("token", "f4", 2), ("pixels", "u1", (4, 2, 3))])
    History(tmp_path, row).edit(0, 0, np.zeros(2, row))
    path = tmp_path / "history.db"
    content = path.read_bytes()
    for damage in (b"x" * 100 + content[100:], content[:70_000], content[:-40] + b"x" * 40):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="history.db (is damaged|holds no strip)"):
            History(tmp_path, row)


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """A token file, t.pt, and a scroll, s."""
    folder = tmp_path_factory.mktemp("drawn")
    for more in ("--count 1 --save-tokens t.pt", "--scroll 6 --out s --tile-columns 4"):
        call("sample.py", "--checkpoint", runs / "runs/generator/last.pt", "--steps", 1,
             "--classes", 0, *more.split(), cwd=folder)
    return folder


@pytest.mark.parametrize("name, value", (
    ("tokens", lambda x: x.to_sparse()), ("labels", lambda x: x.to_sparse()),
    ("seeds", lambda x: x - 9), ("options", 3),
    ("tokens", lambda x: torch.zeros(1).expand(1, 2**30, x.shape[2]))))
def test_a_token_file(runs, drawn, tmp_path, name, value):
    path = shutil.copy(drawn / "t.pt", tmp_path)
    change(path, name, value)
    with pytest.raises(UserError, match="t.pt is damaged"):
        open_picture(path, load_generator(runs / "runs/generator/last.pt"))


def test_a_token_file_in_several_parts(runs, drawn, tmp_path):
    """Python's zipfile.is_zipfile raises for it."""
    data = bytearray((drawn / "t.pt").read_bytes())
    data[data.rindex(b"PK\6\7") + 16] = 2  # disks, in the locator of the list of members
    (tmp_path / "t.pt").write_bytes(data)
    with pytest.raises(UserError, match="t.pt is damaged"):
        open_picture(str(tmp_path / "t.pt"), load_generator(runs / "runs/generator/last.pt"))


@pytest.mark.parametrize("place, value", (
    ("sampler", MISSING), ("sampler.column", "x"), ("sampler.column", 5), ("sampler.last", None),
    ("sampler.column", float), ("decoder.columns", float), ("decoder.start", float),
    ("done", float), ("done", 2**40),
    ("sampler.cache", lambda cache: cache[:-1]), ("decoder.start", -10**9),
    ("decoder.tokens", None),
    ("decoder.tokens", lambda x: x[:, :, :1]), ("rest", lambda x: x[:, :, :4]), ("done", "x"),
    ("settings", 3), ("settings.steps", [])))
def test_a_scroll(runs, drawn, tmp_path, place, value):
    shutil.copytree(drawn / "s", tmp_path / "s")
    change(tmp_path / "s/state.pt", place, value)
    said = mistake("sample.py", "--checkpoint", runs / "runs/generator/last.pt", "--steps", 1,
                   "--classes", 0, *"--scroll 8 --out s --tile-columns 4 --resume".split(),
                   cwd=tmp_path)
    assert re.search("state.pt|checkpoint's|lacks tile-00000", said)


def test_texts_and_switches_of_a_configuration():
    for kind, given in ((SamplingOptions, {"solver": 3}), (DataConfig, {"data": None}),
                        (type(GENERATOR), {"keep_images": "no"})):
        assert issubclass(kind, Checked)
        with pytest.raises(ValueError, match="must be (text|true or false|one of)"):
            kind(**given)
