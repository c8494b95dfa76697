"""Archives that are damaged, locked, or hold what cannot be used: one sentence each."""

import shutil
import subprocess
import tarfile
import zipfile

import pytest

from equimini.training.index import open_source
from equimini.utils.errors import UserError
from tests.training.conftest import add, stylegan

ZIP = pytest.mark.skipif(not shutil.which("zip"), reason="no zip")


def found(path, **options):
    """How many pictures, and the counts of what was left out."""
    source = open_source(str(path), **options)
    return len(source), sorted(count for count, _ in source.left_out.values())


@ZIP
@pytest.mark.parametrize("command", ("zip -qr x.zip .", "zip -q0r x.zip .", "zip -qr - . | cat > x.zip",
                                     "zip -q0r - . | cat > x.zip"))
def test_of_a_zip_cut_short_whole_members_are_used_if_asked(picture_folder, command):
    subprocess.run(command, shell=True, cwd=picture_folder, check=True)
    path = picture_folder / "x.zip"
    whole = open_source(str(path))
    content = {whole.name(i): whole.read(i) for i in range(12)}
    with zipfile.ZipFile(path) as archive:
        last = archive.infolist()[-1].header_offset
    path.write_bytes(path.read_bytes()[:last + 200])
    with pytest.raises(UserError, match="cut short.* 11 pictures.*--allow-truncated"):
        open_source(str(path))
    source = open_source(str(path), truncated=True)
    assert len(source) == 11 and source.left_out
    assert all(source.read(i) == content[source.name(i)] for i in range(11))


@ZIP
@pytest.mark.parametrize("end", (None, -10))
def test_a_zip_with_a_password(picture_folder, end):
    subprocess.run("zip -qr -P secret x.zip cat/0.png", shell=True, cwd=picture_folder, check=True)
    path = picture_folder / "x.zip"
    path.write_bytes(path.read_bytes()[:end])
    for truncated in (False, True):
        with pytest.raises(UserError, match="password"):
            open_source(str(path), truncated=truncated)


@pytest.mark.parametrize("name", ("x.zip", "x.tar", "x.parquet"))
@pytest.mark.parametrize("content", (b"", b"<html>not found</html>"))
def test_nothing_to_use_is_said_in_one_sentence(tmp_path, name, content):
    if name == "x.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    for truncated in (False, True):
        with pytest.raises(UserError, match="is damaged: (?!.*allow-truncated).*copy it again$"):
            open_source(str(tmp_path / name), truncated=truncated)


@pytest.mark.parametrize("kind", (".zip", ".tar", "folder"))
def test_labels_of_dataset_json(picture_folder, tmp_path, kind):
    picture = (picture_folder / "cat/0.png").read_bytes()
    path = stylegan(tmp_path / f"x{kind.replace('folder', '.zip')}", 6 * [picture],
                    (2, 0, -1, 10**30, 10))
    if kind == "folder":
        zipfile.ZipFile(path).extractall(path := tmp_path / "folder")
    source = open_source(str(path))
    assert source.classes == [str(k) for k in range(11)]
    assert [(source.name(i), label, source.read(i)) for i, label in enumerate(source.labels)] == [
        (f"{k}/{i // 3:05d}/img{i:08d}.png", k, picture) for k, i in ((0, 1), (10, 4), (2, 0))]
    assert found(path) == (3, [1, 2])  # one without a label, two out of range


def test_dataset_json_without_labels_of_others_and_lost(picture_folder, tmp_path):
    pictures, path = 6 * [(picture_folder / "cat/0.png").read_bytes()], tmp_path / "x.zip"
    stylegan(path, pictures, table=b'{"labels": null}')
    assert open_source(str(path)).classes == ["0"] and found(path) == (6, [])
    path.write_bytes(path.read_bytes()[:5 * len(pictures[0])])
    source = open_source(str(path), truncated=True)  # whose folders are no classes
    assert source.classes == ["0"] and any("labels" in reason for reason in source.left_out)
    stylegan(path, pictures, table=b'{"version": 1}')
    assert open_source(str(path)).classes == ["00000", "00001"] and found(path) == (6, [1])
    for table, words in ((b"{", "damaged"), (b'{"labels": [["x", 1.5]]}', "1.5"),
                         (b'{"labels": 5}', "damaged"), (b'{"labels": [["x", [0, 1]]]}', "vectors")):
        with pytest.raises(UserError, match=words):
            open_source(str(stylegan(path, pictures, table=table)))


def test_of_a_tar_of_tars_the_undamaged_ones_are_used(picture_folder, tmp_path):
    for path in picture_folder.iterdir():
        with tarfile.open(tmp_path / f"{path.name}.tar", "w") as inner:
            inner.add(path, ".")
    whole = (tmp_path / "cat.tar").read_bytes()
    (tmp_path / "cat.tar").write_bytes(whole[:30_000])
    with tarfile.open(tmp_path / "all.tar", "w") as outer:
        for name in ("cat", "dog", "eel"):
            outer.add(tmp_path / f"{name}.tar", f"top/{name}.tar")
    with pytest.raises(UserError, match=r"all\.tar is damaged: top/cat\.tar inside it: it is cut"):
        open_source(str(tmp_path / "all.tar"))
    count, left_out = found(tmp_path / "all.tar", truncated=True)
    assert 8 < count < 12 and left_out == [1]
    content = (tmp_path / "all.tar").read_bytes()
    (tmp_path / "all.tar").write_bytes(content[:len(whole) + 20_000])  # within dog.tar
    assert set(open_source(str(tmp_path / "all.tar"), truncated=True).classes) == {"cat", "dog"}


@pytest.mark.parametrize("header", (b"12 size=-1024\n", b"9 size=ab\n", b"9size\n"))
def test_headers_that_make_no_sense(tmp_path, header):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        add(archive, "x", header, type=b"x")
        add(archive, "cat/0.png", b"12345")
    with pytest.raises(UserError, match="byte 0 is no member of a tar"):
        open_source(str(tmp_path / "x.tar"))


def test_bytes_behind_the_end_of_a_tar_are_noticed(tar):
    tar.write_bytes(2 * tar.read_bytes())
    assert found(tar) == (12, [1])


def test_a_few_odd_labels_among_numbers(picture_folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for i, label in enumerate((b"3", b"0", b"n/a", b"9" * 5000, b"2", b"")):
            add(archive, f"{i}.png", (picture_folder / "cat/0.png").read_bytes())
            add(archive, f"{i}.cls", label)
    assert found(tmp_path / "x.tar") == (3, [1, 1, 2])  # the empty .cls is no label, and counted
    assert open_source(str(tmp_path / "x.tar")).classes == ["0", "1", "2", "3"]


def test_names_with_backslashes_in_a_zip_of_windows(picture_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat\\0.png", "dog\\0.png", "..\\0.png"):
            info = zipfile.ZipInfo(name)
            info.create_system = 0
            archive.writestr(info, (picture_folder / "cat/0.png").read_bytes())
    assert open_source(str(tmp_path / "x.zip")).classes == ["cat", "dog"]
    assert found(tmp_path / "x.zip") == (2, [1])


IMAGE = {"bytes": b"x", "path": "0.png"}


@pytest.mark.parametrize("images, labels, expected", (
    ([IMAGE] * 4, [0, None, 2, -1], (2, [1, 1])),
    ([IMAGE] * 4, [0.0, None, float("nan"), 10.0], (2, [2])),
    ([IMAGE] * 4, [[0, 1]] * 4, "no single values but list"),
    ([{"bytes": None, "path": "0.png"}] * 4, [0] * 4, "no column that holds.*image holds none"),
    (["http://x"] * 4, [0] * 4, "no column that holds the bytes.*image, label")))
def test_parquet(tmp_path, images, labels, expected):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    if isinstance(images[0], dict):
        images = pyarrow.array(images, pyarrow.struct([("bytes", "binary"), ("path", "string")]))
    table = pyarrow.table({"image": images, "label": labels})
    table = table.replace_schema_metadata({"huggingface": "{not JSON"})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    if isinstance(expected, tuple):
        assert found(tmp_path / "a.parquet") == expected
        shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
        (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
        with pytest.raises(UserError, match="nothing of it can be read.*--allow-truncated"):
            found(tmp_path / "{b,a}.parquet")
        assert found(tmp_path / "{b,a}.parquet", truncated=True)[0] == expected[0]
    else:
        with pytest.raises(UserError, match=expected):
            open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("cut", (0.7, 0.97, "header", "end"))
def test_a_tar_cut_short(tar, cut):
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    last = max(members, key=lambda m: m.offset)
    size = {"header": last.offset + 100, "end": last.offset_data + -(-last.size // 512) * 512}
    content = tar.read_bytes()
    tar.write_bytes(content[:size.get(cut) or int(cut * last.offset_data)])
    with pytest.raises(UserError, match="cut short.*--allow-truncated"):
        open_source(str(tar))
    source = open_source(str(tar), truncated=True)
    whole = [m for m in members if m.isfile() and m.offset_data + m.size <= tar.stat().st_size]
    assert len(source) == len(whole) > 5
    assert "damaged" in next(iter(source.left_out))


def test_a_tar_with_rubbish_in_the_middle(tar):
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        start = archive.getmembers()[5].offset
    content[start:start + 512] = b"x" * 512
    tar.write_bytes(content)
    with pytest.raises(UserError, match="no member of a tar"):
        open_source(str(tar))


def test_members_that_are_no_files_or_lead_outside(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("cat/0.png", "../up.png", "/root.png", "cat/a/../../../b.png"):
            add(archive, name, b"12345")
        add(archive, "cat/link.png", b"", type=tarfile.SYMTYPE, linkname="0.png")
    source = open_source(str(tmp_path / "x.tar"))
    assert len(source) == 1
    assert sorted(n for n, _ in source.left_out.values()) == [1, 3]


def test_a_packed_tar_other_files_and_missing_shards(tar, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tar, "x")
    (tmp_path / "x.txt").write_text("hello")
    for name, text in (("x.tar.gz", "gzip"), ("x.txt", "no archive"), ("{a,b}.tar", "1 more"),
                       ("none-*.tar", "does not exist")):
        with pytest.raises(UserError, match=text):
            open_source(str(tmp_path / name))
    with pytest.raises(UserError, match=r"\*\.tar'"):  # a folder of archives
        (tmp_path / "only").mkdir()
        shutil.move(tar, tmp_path / "only/x.tar")
        open_source(str(tmp_path / "only"))
