"""The commands of docs/data.md, as the page has them, on small archives made by the real tools."""

import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.scripts import GENERATOR, ROOT, TOKENIZER, call
from tests.training.conftest import stylegan

PAGE = (ROOT / "docs/data.md").read_text()
ROWS = dict(re.findall(r"^\| (.+?) \| (`python train_.+`) \|$", PAGE, re.MULTILINE))
WNIDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


def pictures(folder, classes, ending=".jpg", each=4):
    """folder/CLASS/CLASS_0.jpg, …"""
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.random.default_rng((k, i)).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{i}{ending}")
    return folder


def tool(cwd, *words):
    if not shutil.which(words[0]):
        pytest.skip(f"no {words[0]}")
    subprocess.run(words, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def folder(here):
    pictures(here / "my/pictures", ("cat", "dog"))
    return ["cat", "dog"]


def imagenet(here):
    pictures(here / "train", WNIDS, ".JPEG")
    for name in WNIDS:
        tool(here / "train" / name, "tar", "-cf", f"../{name}.tar", *(
            p.name for p in sorted((here / "train" / name).iterdir())))
    tool(here / "train", "tar", "-cf", "../ILSVRC2012_img_train.tar", *(f"{n}.tar" for n in WNIDS))
    (here / "LOC_synset_mapping.txt").write_text("".join(f"{k} {v}\n" for k, v in WNIDS.items()))
    return ["tench", "goldfish"]


def tar(here):
    pictures(here / "top", ("cat", "dog"))
    tool(here, "tar", "-cf", "my.tar", "top")
    return ["cat", "dog"]


def zipped(here):
    pictures(here / "top", ("cat", "dog"))
    tool(here / "top", "zip", "-qr", "../my.zip", ".")
    return ["cat", "dog"]


def shards(here):
    webdataset = pytest.importorskip("webdataset")
    content = [p.read_bytes() for p in sorted(pictures(here / "x", ("a",)).rglob("*.jpg"))]
    (here / "shards").mkdir()
    for k in range(1024):
        with webdataset.TarWriter(str(here / f"shards/train-{k:06d}.tar")) as writer:
            writer.write({"__key__": f"sample{k:06d}", "jpg": content[k % 4], "cls": k % 3})
    (here / "names.txt").write_text("cat\ndog\neel\n")
    return ["cat", "dog", "eel"]


def edm(here):
    found = sorted(pictures(here / "x", ("a", "b"), ".png").rglob("*.png"))
    stylegan(here / "imagenet-256x256.zip", [p.read_bytes() for p in found],
             [i % 3 for i in range(len(found))])
    return ["0", "1", "2"]


def parquet(here):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    (here / "data").mkdir()
    found = sorted(pictures(here / "x", ("a", "b")).rglob("*.jpg"))
    features = {"image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": ["goldfish", "crane"]}}
    for k in range(2):
        rows = pyarrow.table({"image": [{"bytes": p.read_bytes(), "path": p.name}
                                        for p in found[k::2]], "label": [0, 1, 0, 1]})
        write_table(rows.replace_schema_metadata({"huggingface": json.dumps(
            {"info": {"features": features}})}), here / f"data/train-{k:05d}-of-00002.parquet")
    return ["goldfish", "crane"]


MAKERS = dict(zip(ROWS, (folder, imagenet, tar, shards, zipped, edm, parquet), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[maker.__name__ for maker in MAKERS.values()])
def test_both_commands_of_a_source(row, tmp_path):
    classes = MAKERS[row](tmp_path)
    first, second = re.findall("`(.+?)`", ROWS[row])
    for line, small in ((first, TOKENIZER), (second, GENERATOR)):
        python, script, *options = shlex.split(line)
        assert python == "python"
        call(script, *options, *small, "--steps", 3, cwd=tmp_path)
    assert torch.load(tmp_path / "runs/g/last.pt", weights_only=True)["classes"] == classes
