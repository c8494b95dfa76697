"""Batches of samples as .npz: what is written is what numpy and ADM's reader find."""

import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from equimini.utils.errors import UserError
from equimini.utils.npz import map_array, open_npz, write_samples

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), np.uint8)


def written(path, n=7):
    with write_samples(path, n, 4, 6) as add:
        for k in range(0, 7, 3):
            add(PIXELS[k:k + 3], range(k, min(k + 3, 7)))
    return path


def as_adm_reads(path, name):
    """The header and the stream of numbers that its evaluator takes from the archive."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, kind = np.lib.format.read_array_header_1_0(member)
        assert not fortran
        return np.frombuffer(member.read(), kind).reshape(shape)


def test_a_written_batch_is_read_by_others(tmp_path):
    path = written(tmp_path / "a.npz")
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], PIXELS) and file["arr_1"].tolist() == [*range(7)]
    assert np.array_equal(as_adm_reads(path, "arr_0"), PIXELS)
    assert isinstance(map_array(path, "arr_0"), np.memmap)
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_of_others_are_mapped_or_read(tmp_path):
    for k, save in enumerate((np.savez, np.savez_compressed)):
        save(tmp_path / f"{k}.npz", arr_0=PIXELS, other=np.zeros(3))
        found = map_array(tmp_path / f"{k}.npz", "arr_0")
        assert np.array_equal(found, PIXELS) and isinstance(found, np.memmap) == (k == 0)
    np.savez(tmp_path / "f.npz", arr_0=np.asfortranarray(PIXELS))
    assert np.array_equal(map_array(tmp_path / "f.npz", "arr_0"), PIXELS)


def test_a_wrong_number_of_pictures_leaves_no_file(tmp_path):
    for n in (6, 8):
        with pytest.raises(ValueError, match="pictures"):
            written(tmp_path / "a.npz", n)
    with pytest.raises(ValueError, match="uint8"):
        with write_samples(tmp_path / "a.npz", 1, 4, 6) as add:
            add(PIXELS[:1].astype(float), [0])
    with pytest.raises(UserError, match="cannot write"):
        written(tmp_path / "none" / "a.npz")
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_number(tmp_path):
    picture = np.zeros((64, 64, 64, 3), np.uint8)  # 0.8 MB
    tracemalloc.start()
    with write_samples(tmp_path / "a.npz", 64 * 64, 64, 64) as add:
        for _ in range(64):
            add(picture, [0] * 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 50e6 and peak < 4e6


def test_a_damaged_map_is_an_error_of_a_kind_that_callers_know(tmp_path):
    path = written(tmp_path / "a.npz")
    data = bytearray(path.read_bytes())
    data[26:28] = struct.pack("<H", 60000)  # the length of the first name
    path.write_bytes(data)
    with pytest.raises((OSError, ValueError, zipfile.BadZipFile)):
        map_array(path, "arr_0")
    path.write_bytes(data[:100])
    with pytest.raises(UserError, match="--x: the file is cut short"):
        open_npz(path, "--x")


def test_a_zip_of_a_version_to_come_is_told(tmp_path):
    """Zipfile has an error of its own for what an entry says is needed to read it."""
    data = bytearray(written(tmp_path / "a.npz").read_bytes())
    data[data.index(b"PK\1\2") + 6] = 109
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(UserError, match="option: the file is cut short or damaged .*version 10.9"):
        open_npz(tmp_path / "b.npz", "option")
