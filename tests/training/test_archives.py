"""Archives made by the tools that people make them with, against the folder of the same files."""

import io
import json
import os
import pickle
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.training import archives, index
from equimini.training.data import ImageFolder, load_data
from equimini.training.index import open_source
from equimini.training.options import RunConfig
from equimini.training.split import part
from equimini.utils.errors import UserError
from tests.conftest import SMALL_TOKENIZER
from tests.helpers.scripts import TOKENIZER, call

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


def check_same(root, archive):
    """Names, classes, bytes and hashes; and what training sees."""
    folder, found = open_source(str(root)), open_source(str(archive))
    assert folder.classes == found.classes == ["bat", "cat", "dog", "eel"]
    assert everything(found) == everything(folder) and len(found) == 13
    views = [ImageFolder(*part(source), 32, 32, 0, augment=True) for source in (folder, found)]
    for key in ((0, 0), (1, 5), (2, 12)):
        (x, *rest), (y, *same) = (view[key] for view in views)
        assert torch.equal(x, y) and rest == same


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar")
@pytest.mark.parametrize("form", ("gnu", "pax"))
def test_tar(root, tmp_path, form):
    for name, place in (("flat", ["-C", root, "."]), ("top", ["-C", tmp_path, "pictures"])):
        path = tmp_path / f"{name}.tar"
        subprocess.run(["tar", f"--format={form}", "-cf", path, *place], check=True)
        check_same(root, path)


def test_tar_of_a_class_per_tar_as_imagenet_comes(root, tmp_path):
    with tarfile.open(tmp_path / "ILSVRC.tar", "w") as outer:
        for folder in sorted(root.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for path in folder.iterdir():
                    inner.add(path, path.name)
            outer.add(tmp_path / f"{folder.name}.tar", f"{folder.name}.tar")
    check_same(root, tmp_path / "ILSVRC.tar")


@pytest.mark.skipif(not shutil.which("zip"), reason="no zip")
@pytest.mark.parametrize("level", ("-0", "-9"))
def test_zip_made_by_zip(root, tmp_path, level):
    subprocess.run(["zip", "-qr", level, tmp_path / "x.zip", "."], cwd=root, check=True)
    check_same(root, tmp_path / "x.zip")


@pytest.mark.parametrize("method", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
def test_zip_made_by_python(root, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for path in root.rglob("*"):
            archive.write(path, path.relative_to(root))
    check_same(root, tmp_path / "x.zip")


def stylegan(path, root, labels):
    """A zip as dataset_tool.py of StyleGAN and EDM writes it."""
    pictures = sorted(root.rglob("*.png"))[:4]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        names = [f"00000/img{i:08d}.png" for i in range(4)]
        for name, picture in zip(names, pictures):
            archive.writestr(name, picture.read_bytes())
        pairs = labels and [[name, label] for name, label in zip(names, labels)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))


def test_zip_of_stylegan_and_edm(root, tmp_path):
    stylegan(tmp_path / "x.zip", root, [2, 0, 10, 2])
    source = open_source(str(tmp_path / "x.zip"))
    assert source.classes == [str(k) for k in range(11)]
    assert {source.name(i): int(label) for i, label in enumerate(source.labels)} == {
        f"{k}/00000/img{i:08d}.png": k for i, k in enumerate((2, 0, 10, 2))}
    stylegan(tmp_path / "none.zip", root, None)
    assert open_source(str(tmp_path / "none.zip")).labels.tolist() == [0] * 4
    stylegan(tmp_path / "vectors.zip", root, [[0, 1]] * 4)
    with pytest.raises(UserError, match="vectors"):
        open_source(str(tmp_path / "vectors.zip"))


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


@pytest.fixture
def tar(root, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(root, ".")
    return tmp_path / "x.tar"


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
    run = RunConfig(data=str(tar), out=str(tmp_path / "out"), workers=0)
    train, val, classes = load_data(run, SMALL_TOKENIZER)
    assert list((tmp_path / "out/index").glob("*.npz"))
    assert len(train) + len(val) == 13 and train.source.kept


def test_training_from_a_tar_and_resumed_is_that_from_the_folder(root, tar, tmp_path, keeping):
    logs = {}
    for name, data, steps in (("folder", root, (2,)), ("tar", tar, (1, 2))):
        options = [*TOKENIZER, "--discriminator", "none", "--data", data, "--out",
                   tmp_path / name, "--workers", 1]
        for i, count in enumerate(steps):
            call("train_tokenizer.py", *options, "--steps", count, *["--resume"] * (i > 0),
                 cwd=tmp_path)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    assert logs["tar"] == logs["folder"] and 2 in logs["tar"]
    config = torch.load(tmp_path / "tar/last.pt", weights_only=True)["config"]["run"]
    assert config["split"] == "name" and config["val_fraction"] == 0.05
