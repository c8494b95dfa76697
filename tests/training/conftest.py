"""Archives and settings that several tests of the data share."""

import io
import json
import tarfile
import warnings
import zipfile

import pytest

from equimini.training.data import load_data
from equimini.training.options import RunConfig
from tests.conftest import SMALL_TOKENIZER


def run(data, **options) -> RunConfig:
    return RunConfig(data=str(data), **{"out": "", "workers": 0, **options})


def load(data, **options):
    """Training set, validation set and classes, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_data(run(data, **options), SMALL_TOKENIZER)


@pytest.fixture
def tar(picture_folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(picture_folder, ".")
    return tmp_path / "x.tar"


def add(archive, name, data, **fields):
    """Add a member to a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def stylegan(path, pictures, labels=(), table=None):
    """A zip or tar as dataset_tool.py of StyleGAN and EDM lays it out, but three pictures a folder.

    table: in place of the labels' in dataset.json.
    """
    names = [f"{i // 3:05d}/img{i:08d}.png" for i in range(len(pictures))]
    table = table or json.dumps({"labels": list(zip(names, labels))}).encode()
    content = [*zip(names, pictures), ("dataset.json", table)]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content:
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in content:
                add(archive, name, data)
    return path
