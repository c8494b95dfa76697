"""Folders of pictures, the built-in data, and the order of batches."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.training.data import (Batches, ImageFolder, fixed_loader, report_pictures,
                                    training_loader)
from equimini.training.index import open_source
from equimini.training.split import part
from equimini.utils.errors import UserError
from equimini.utils.images import load_image, printable, read_rgb, to_float
from tests.training.conftest import load, run


def test_folder_gives_classes_a_split_and_crops_of_the_right_size(picture_folder):
    train, val, classes = load(picture_folder, val_fraction=0.25)
    assert classes == ["cat", "dog", "eel"]
    assert len(train) + len(val) == 12 and len(val) > 0
    assert not {*train.indices.tolist()} & {*val.indices.tolist()}
    image, label, index = train[0, 5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and index == 5
    assert f"/{classes[label]}/" in train.where(5)
    assert load(picture_folder, width=80)[0][0, 0][0].shape == (3, 32, 80)


def test_crop_and_flip_are_a_function_of_epoch_and_index(picture_folder):
    train, val, _ = load(picture_folder)
    views = [train[epoch, 2][0] for epoch in range(12)]
    assert torch.equal(views[3], train[3, 2][0])
    assert len({v.numpy().tobytes() for v in views}) > 3
    assert torch.equal(val[0, 0][0], val[7, 0][0])  # held-out pictures are not augmented


def test_flat_folder_is_one_class_also_with_a_flat_val_data(picture_folder):
    assert load(picture_folder / "cat")[2] == ["cat"]
    _, val, classes = load(picture_folder / "cat", val_data=str(picture_folder / "dog"))
    assert classes == ["cat"] and len(val) == 4


def test_data_that_cannot_be_used(picture_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, options, text in (
            ("nowhere", {}, "does not exist"), ("empty", {}, "no image"),
            ("pictures", {"width": 30}, "--width"),
            ("pictures", {"val_data": str(picture_folder / "cat")}, "val-data")):
        with pytest.raises(UserError, match=text):
            load(tmp_path / folder, **options)
    Image.new("RGB", (40, 40)).save(picture_folder / "loose.png")
    with pytest.raises(UserError, match="loose.png"):
        load(picture_folder)


def everything(data, workers=0):
    return [batch[0] for batch in fixed_loader(data, 2, len(data), workers)]


@pytest.mark.parametrize("workers", (0, 2))
def test_files_that_cannot_be_read_are_replaced_counted_and_listed(picture_folder, tmp_path,
                                                                   capsys, workers):
    bad = [picture_folder / "cat" / "1.png", picture_folder / "eel" / "new\nline \udcff.png",
           picture_folder / "dog" / "0.PNG"]
    bad[0].write_bytes(bad[0].read_bytes()[:100])  # cut short
    bad[1].write_bytes(b"")
    bad[2].write_bytes(b"<html>not found</html>")
    train = ImageFolder(*part(open_source(str(picture_folder))), 32, 32, 0, augment=True)
    with warnings.catch_warnings(record=True) as caught:  # those of this process
        warnings.simplefilter("always")
        images = everything(train, workers) + everything(train, workers)
    assert len(torch.cat(images)) == 2 * 14
    assert sorted(train.unreadable()) == sorted(map(printable, bad))
    if workers == 0:
        named = [str(w.message) for w in caught]
        assert len(named) == 3 and any("1.png" in text for text in named)
        assert not any("\n" in text for text in named)
    report_pictures([train], tmp_path)
    assert "3 files could not be read" in capsys.readouterr().out
    listed = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 3 and str(bad[0]) in listed


def test_small_pictures_are_scaled_up_and_counted(tmp_path, capsys):
    for i, size in enumerate(((9, 7), (200, 20), (31, 64), (32, 32), (64, 48))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{i}.png")
    data = ImageFolder(*part(open_source(str(tmp_path))), 32, 32, seed=0, augment=False)
    with pytest.warns(UserWarning, match="scaled up") as caught:
        assert all(x.shape[1:] == (3, 32, 32) for x in everything(data))
    assert data.scaled_up() == 3 and len(caught) == 1
    report_pictures([data], tmp_path)
    assert capsys.readouterr().out.startswith("3 pictures are smaller")


def test_a_picture_that_claims_a_thousand_million_pixels_is_not_read(picture_folder):
    header = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        check = zlib.crc32(kind + data)
        header += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    (picture_folder / "cat" / "0.png").write_bytes(header)
    data = ImageFolder(*part(open_source(str(picture_folder))), 32, 32, seed=0, augment=False)
    with pytest.warns(UserWarning, match="decompression bomb"):
        everything(data)
    assert data.unreadable() == [str(picture_folder / "cat" / "0.png")]


@pytest.mark.parametrize("workers", (0, 2))
def test_pictures_kept_in_memory_are_the_same(picture_folder, workers, capsys):
    (picture_folder / "cat" / "1.png").write_bytes(b"")
    plain, kept = (ImageFolder(*part(open_source(str(picture_folder))), 32, 48, 0, augment=True)
                   for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept.keep_in_memory(1, workers)
        assert len(kept.kept) == 11 and not capsys.readouterr().out
        keys = [(epoch, i) for epoch in range(3) for i in range(12)]
        assert all(torch.equal(plain[key][0], kept[key][0]) for key in keys)
        plain.keep_in_memory(0.001, workers)  # less than one piece: nothing fits
    assert not plain.kept and "0 of 12 pictures fit" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ("L", "RGBA", "LA", "P", "CMYK", "1", "I;16"))
def test_picture_modes_become_rgb_with_white_behind(tmp_path, mode):
    grey = np.full((40, 50), 51200 if mode == "I;16" else 200,
                   np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(grey)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(0)
    elif mode != "I;16":
        image = image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    pixels = np.asarray(load_image(path, 40))
    assert pixels.shape == (40, 50, 3)
    expected = 255 if mode in ("RGBA", "LA") else 200
    if mode != "1":
        assert abs(pixels.astype(int) - expected).max() <= 1


def test_exif_rotation_and_scaling(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (60, 20), "red").save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg", 30).size == (10, 30)
    assert load_image(tmp_path / "x.jpg", 32, 32).size == (32, 96)  # the crop just fits


def test_exif_orientation_beside_an_odd_tag(tmp_path):
    tags = (0x103, 4, 70_000), (0x112, 3, 6)  # a 32-bit number where 16 are expected
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    Image.new("RGB", (60, 20), "red").save(tmp_path / "x.jpg", exif=exif)
    assert read_rgb(tmp_path / "x.jpg").size == (20, 60)


@pytest.mark.parametrize("top", (1, 1.02, 255, 1023, 4095, 65535))
def test_pictures_of_many_bits_or_floating_point_numbers(tmp_path, top):
    values = np.linspace(0, top, 40 * 50).reshape(40, 50)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    if top >= 255:
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "whole.png")
    for path in tmp_path.iterdir():
        found = np.asarray(load_image(path, 40)).astype(int)[..., 0]
        # whole numbers are cut; a little above one is taken as up to one, and is not black
        limit = 1 if path.suffix == ".png" else 6 if top == 1.02 else 0.51
        assert abs(found - values * (255 / top)).max() <= limit


def test_a_picture_of_no_numbers(tmp_path):
    Image.fromarray(np.full((40, 50), np.nan, np.float32)).save(tmp_path / "bad.tif")
    with pytest.raises(ValueError, match="NaN"):
        load_image(tmp_path / "bad.tif", 40)


@pytest.mark.parametrize("kind", ("synthetic", "synthetic-object"))
def test_built_in_data(kind):
    train, val, classes = load(kind)
    assert len(classes) >= 3
    image, label, _ = train[0, 4]
    assert image.shape == (3, 32, 32) and label == 4 % len(classes)
    assert torch.equal(image, train[1, 4][0])
    assert not any(torch.equal(image, val[0, i][0]) for i in range(16))


def test_batches_are_permutations_that_resume_anywhere():
    whole = list(Batches(10, 4, seed=3, start=0, stop=10))
    flat = [key for batch in whole for key in batch]
    orders = [[i for e, i in flat if e == epoch] for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(map(tuple, orders))) == 4  # each epoch has its own
    assert list(Batches(10, 4, seed=3, start=6, stop=10)) == whole[6:]
    assert list(Batches(10, 4, seed=4, start=0, stop=10)) != whole


def test_loaders(picture_folder):
    train, val, _ = load(picture_folder)
    images, labels, indices = next(iter(training_loader(train, 5, run(""), 2, 4)))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    again = next(iter(training_loader(train, 5, run("", workers=1), 2, 4)))
    assert torch.equal(images, again[0]) and torch.equal(indices, again[2])
    fixed = [batch[2].tolist() for batch in fixed_loader(train, 4, 6)]
    assert [len(f) for f in fixed] == [4, 2] and len(set(sum(fixed, []))) == 6
    x = to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == [-1, 1]
