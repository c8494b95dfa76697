"""Archives made by the tools that people make them with, against the folder of the same files."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.training import archives, index
from equimini.training.data import ImageFolder
from equimini.training.index import open_source
from equimini.training.split import part
from tests.helpers.scripts import TOKENIZER, call
from tests.training.conftest import load
from tests.training.test_scripts import records

LONG = "cat/" + 40 * "long " + "é.png"  # more than the 100 bytes of a tar's header


@pytest.fixture
def root(picture_folder):
    """Three classes, one of them with a long name in it, and an empty one."""
    shutil.copy(picture_folder / "cat/0.png", picture_folder / LONG)
    (picture_folder / "bat").mkdir()
    return picture_folder


def everything(source):
    return [(source.name(i), source.classes[source.labels[i]], source.read(i),
             int(source.hashes[i])) for i in range(len(source))]


TAR_OF_TARS = ("cd pictures; for c in *; do tar -cf ../$c.tar -C $c .; done; cd ..; "
               "tar -cf x.tar ???.tar")  # a class per tar, as ImageNet comes


@pytest.mark.parametrize("tool, command", (
    ("tar", "tar --format=gnu -cf x.tar -C pictures ."), ("tar", "tar --format=gnu -cf x.tar pictures"),
    ("tar", "tar --format=pax -cf x.tar -C pictures ."), ("tar", "tar --format=pax -cf x.tar pictures"),
    ("tar", TAR_OF_TARS), ("zip", "cd pictures && zip -qr -0 ../x.zip ."),
    ("zip", "cd pictures && zip -qr -9 ../x.zip ."),
    (sys.executable, f"{sys.executable} -m zipfile -c x.zip pictures")))
def test_an_archive_of_a_folder_is_the_same_data(root, tmp_path, tool, command):
    """Names, classes, bytes and hashes; and what training sees."""
    if not shutil.which(tool):
        pytest.skip(f"no {tool}")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    archive, = tmp_path.glob("x.*")
    folder, found = open_source(str(root)), open_source(str(archive))
    assert folder.classes == found.classes == ["bat", "cat", "dog", "eel"]
    assert everything(found) == everything(folder) and len(found) == 13
    views = [ImageFolder(*part(source), 32, 32, 0, augment=True) for source in (folder, found)]
    for key in ((0, 0), (1, 5), (2, 12)):
        (x, *rest), (y, *same) = (view[key] for view in views)
        assert torch.equal(x, y) and rest == same


def shards(tmp_path, samples, per=2):
    """WebDataset shards train-000000.tar, … written by the webdataset package."""
    wds = pytest.importorskip("webdataset")
    for k in range(0, len(samples), per):
        with wds.TarWriter(str(tmp_path / f"train-{k // per:06d}.tar")) as writer:
            for sample in samples[k:k + per]:
                writer.write(sample)
    return str(tmp_path / f"train-{{000000..{(len(samples) - 1) // per:06d}}}.tar")


def picture(i):
    """Bytes of a picture; lossless WebP, JPEG or PNG in turn, as the shards' extensions."""
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, ("png", "jpeg", "webp")[i % 3])
    return file.getvalue()


def pixels(i):
    return np.full((32, 32, 3), i, np.uint8)


def test_webdataset_shards(tmp_path):
    labels = [3, 0, 11, 3, 0]
    samples = [{"__key__": f"a/{i:04d}.x", ("png", "jpg", "webp")[i % 3]: picture(i),
                **({"cls": k} if i % 2 else {"json": {"label": k, "text": "y"}})}
               for i, k in enumerate(labels)]
    source = open_source(shards(tmp_path, samples))
    assert len(source.classes) == 12 and len(source) == 5 and not source.left_out
    found = {source.name(i): int(source.labels[i]) for i in range(5)}
    assert found["3/a/0000.x.png"] == 3 and found["11/a/0002.x.webp"] == 11
    for i in range(5):
        number = int(source.name(i).split("/")[-1][:4])
        image = Image.open(io.BytesIO(source.read(i)))
        assert abs(int(np.asarray(image.convert("RGB"))[0, 0, 0]) - number) < 3


def test_webdataset_texts_several_pictures_and_missing_labels(tmp_path):
    samples = [{"__key__": "0", "png": pixels(1), "seg.png": pixels(2), "cls": "dog"},
               {"__key__": "1", "left.png": pixels(3), "cls": "cat"},
               {"__key__": "2", "png": pixels(4)}]
    source = open_source(shards(tmp_path, samples))
    assert source.classes == ["cat", "dog"]
    assert [source.name(i) for i in range(2)] == ["cat/1.left.png", "dog/0.png"]
    assert source.left_out == {"pictures without a label, left out": [1, "2.png"]}


def test_one_key_in_two_shards_loses_nothing(tmp_path):
    samples = [{"__key__": f"{i % 2}", "png": pixels(i), "cls": 0} for i in range(6)]
    source = open_source(shards(tmp_path, samples))
    assert len(source) == 6 and len({source.name(i) for i in range(6)}) == 6
    (reason, (count, _)), = source.left_out.items()
    assert "several archives" in reason and count == 4
    assert len({source.read(i) for i in range(6)}) == 6


@pytest.mark.parametrize("struct", (True, False))
def test_parquet(root, tmp_path, struct, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    folder = open_source(str(root))
    names = ["eel", "bat", "dog", "cat"]  # the schema's order, not the alphabet's
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    content = [folder.read(i) for i in range(13)]
    paths = [folder.name(i).split("/")[1] for i in range(13)]
    images = [{"bytes": b, "path": p} for b, p in zip(content, paths)] if struct else content
    table = pyarrow.table({"image": images, "label": [names.index(folder.classes[k])
                                                      for k in folder.labels]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})})
    for k in range(2):
        parquet.write_table(table.slice(7 * k, 7), tmp_path / f"x-{k}.parquet", row_group_size=3)
    source = open_source(str(tmp_path / "x-{0,1}.parquet"))
    assert source.classes == names and len(source) == 13
    pairs = {(source.read(i), source.classes[source.labels[i]]) for i in range(13)}
    assert pairs == {(content[i], folder.classes[folder.labels[i]]) for i in range(13)}
    if struct:
        assert {source.name(i).split("/")[1] for i in range(13)} == set(paths)
    groups, read = [], archives.read_group  # in the order of the rows each is read once
    monkeypatch.setattr(archives, "read_group", lambda *g: groups.append(g[1]) or read(*g))
    monkeypatch.setattr(archives, "GROUP_BYTES", 0)
    source = open_source(source.path)
    for i in np.lexsort((source.arrays["offsets"], source.arrays["volumes"])):
        source.read(int(i))
    assert groups == [0, 1, 2, 0, 1]
    monkeypatch.setattr(archives, "GROUP_BYTES", 2**30)  # and if there is room, in any order
    for i in range(39):
        source.read(i * 5 % 13)
    assert len(groups) == 5 + 4


def test_a_later_member_replaces_an_earlier_one_as_it_does_unpacked(root, tar):
    with tarfile.open(tar, "a") as archive:
        archive.add(root / "dog/1.png", "./cat/0.png")
    source = open_source(str(tar))
    assert len(source) == 13 and source.read(0) == (root / "dog/1.png").read_bytes()
    assert "replaces" in next(iter(source.left_out))


@pytest.fixture
def keeping(monkeypatch):
    """Keep the index of small sources, and put a search down after every picture."""
    monkeypatch.setattr(index, "SMALL", 0)
    monkeypatch.setattr(index, "PAUSE", 0)


def settle(path, seconds=10):
    """Make it look as if it had been there for a while."""
    then = path.stat().st_mtime - seconds
    for p in (path, *path.rglob("*")):
        os.utime(p, (then, then))


def test_the_index_is_kept_shared_and_made_anew_when_the_source_changes(root, tmp_path, keeping,
                                                                        monkeypatch):
    settle(root)
    first = open_source(str(root), tmp_path / "index")
    monkeypatch.setattr(index, "build", lambda *_: pytest.fail("searched again"))
    again = open_source(str(root), tmp_path / "index")
    assert everything(again) == everything(first)
    sent = pickle.dumps(again)  # as to a loader process that is not forked
    assert len(sent) < 2000 and everything(pickle.loads(sent)) == everything(first)
    monkeypatch.undo()
    monkeypatch.setattr(index, "SMALL", 0)
    shutil.copy(root / "cat/0.png", root / "eel/new.png")
    assert len(open_source(str(root), tmp_path / "index")) == 14
    when = (root / "eel").stat().st_mtime_ns
    (root / "eel/new.png").unlink()
    os.utime(root / "eel", ns=(when, when))  # as if in the same tick of the file system's clock
    assert len(open_source(str(root), tmp_path / "index")) == 13


def test_a_search_that_was_interrupted_is_taken_up(root, tar, tmp_path, keeping, monkeypatch):
    settle(tar)
    before, seen = index.scan_tar, []

    def interrupted(*args):
        for k, place in enumerate(before(*args)):
            seen.append(args[2])
            if len(seen) == 9:
                raise KeyboardInterrupt
            yield place

    monkeypatch.setattr(index, "scan_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_source(str(tar), tmp_path / "index")
    (tmp_path / f"index/.x.part.npz.{2**22 + 1}.tmp").touch()  # as of a search that was killed
    found = open_source(str(tar), tmp_path / "index")
    assert seen[0] == 0 < seen[-1]  # not from the first byte
    assert everything(found) == everything(open_source(str(root)))
    assert [path.suffix for path in (tmp_path / "index").iterdir()] == [".npz"]


def test_commands_keep_an_index_in_their_output_folder(tar, tmp_path, keeping):
    (tmp_path / "out").mkdir()
    train, val, _ = load(tar, out=str(tmp_path / "out"))
    assert list((tmp_path / "out/index").glob("*.npz"))
    assert len(train) + len(val) == 12 and train.source.kept


def test_training_from_a_tar_and_resumed_is_that_from_the_folder(root, tar, tmp_path, keeping):
    logs = {}
    for name, data, steps in (("folder", root, (2,)), ("tar", tar, (1, 2))):
        options = [*TOKENIZER, "--discriminator", "none", "--data", data, "--out",
                   tmp_path / name, "--workers", 1]
        for i, count in enumerate(steps):
            call("train_tokenizer.py", *options, "--steps", count, *["--resume"] * (i > 0),
                 cwd=tmp_path)
        logs[name] = {r["step"]: r["loss"] for r in records(tmp_path / name / "log.jsonl")
                      if "loss" in r}
    assert logs["tar"] == logs["folder"] and 2 in logs["tar"]
    config = torch.load(tmp_path / "tar/last.pt", weights_only=True)["config"]["run"]
    assert config["split"] == "name" and config["val_fraction"] == 0.05
