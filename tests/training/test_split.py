"""Which pictures are held out, class names and numbers, and folders as people have them."""

import dataclasses
import shutil
import warnings

import pytest
from PIL import Image

from equimini.noise import rng
from equimini.training.data import count_images, load_data, report_pictures
from equimini.training.index import open_source
from equimini.training.options import RunConfig
from equimini.training.split import as_trained, check_split
from equimini.utils import checkpoint
from equimini.utils.command_line import config_from_dict
from equimini.utils.errors import UserError
from tests.conftest import SMALL_TOKENIZER
from tests.training.conftest import load, run


def names(data):
    return {data.source.name(int(i)) for i in data.indices}


@pytest.fixture
def many(tmp_path):
    """Two classes of 100 pictures."""
    for label in ("a", "b"):
        (tmp_path / "many" / label).mkdir(parents=True)
        for i in range(100):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "many" / label / f"{i}.png")
    return tmp_path / "many"


def test_what_is_held_out_stays_so_whatever_comes_or_goes(many):
    train, val, _ = load(many, val_fraction=0.25)
    assert 200 / 4 - 5 * 6.2 < len(val) < 200 / 4 + 5 * 6.2  # sigma of 200 throws at 1/4
    assert not names(train) & names(val)
    for i in (0, 3, 50):
        (many / "a" / f"{i}.png").unlink()
        shutil.copy(many / "b/1.png", many / "b" / f"new{i}.png")
    later_train, later_val, _ = load(many, val_fraction=0.25)
    assert not names(later_val) & names(train) and not names(later_train) & names(val)
    larger = load(many, val_fraction=0.4)[1]
    assert names(later_val) < names(larger)
    assert names(load(many, val_fraction=0.25, seed=7)[1]) == names(later_val)


def test_runs_begun_before_hold_out_by_order(many):
    old = config_from_dict(RunConfig, {"data": str(many), "seed": 3})  # no field for it
    assert old.split == "order" and RunConfig().split == "name"
    order = rng("split", 3).permutation(200)
    train, val, _ = load_data(old, SMALL_TOKENIZER)
    assert val.indices.tolist() == sorted(order[:10].tolist())
    assert train.indices.tolist() == sorted(order[10:].tolist()) and count_images(old) == 190


def test_old_runs_see_hidden_folders_and_no_empty_ones(picture_folder):
    (picture_folder / "empty").mkdir()
    shutil.copytree(picture_folder / "cat", picture_folder / ".ipynb_checkpoints")
    assert load(picture_folder, split="order")[2] == [".ipynb_checkpoints", "cat", "dog", "eel"]
    assert load(picture_folder)[2] == ["cat", "dog", "eel", "empty"]


def test_resuming_with_other_pictures_held_out_is_refused(many):
    before = run(many, val_fraction=0.1)
    check_split(before, run(many, val_fraction=0.1, seed=5))
    with pytest.raises(UserError, match="--val-fraction 0.2.*has 0.1"):
        check_split(before, run(many, val_fraction=0.2))
    with pytest.raises(UserError, match="--split order"):
        check_split(before, run(many, val_fraction=0.1, split="order"))
    old = run(many, split="order")
    with pytest.raises(UserError, match="--seed 5"):
        check_split(old, run(many, split="order", seed=5))


@pytest.mark.parametrize("split", ("name", "order"))
def test_others_take_the_training_s_split_from_its_checkpoint(many, tmp_path, split):
    trained = dataclasses.asdict(run(many, val_fraction=0.1, split=split, seed=4))
    if split == "order":
        del trained["split"]  # as before there was a choice
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, "tokenizer", {"config": {"run": trained}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_trained(run(many), path)
    assert (found.split, found.val_fraction) == (split, 0.1)
    assert found.seed == (4 if split == "order" else 0)
    with pytest.warns(UserWarning, match="--val-fraction 0.3 holds out other.*0.1"):
        assert as_trained(run(many, val_fraction=0.3), path).val_fraction == 0.3
    assert as_trained(run(many), str(tmp_path / "none.pt")) == run(many)


@pytest.mark.parametrize("split", ("name", "order"))
def test_of_a_few_pictures_one_that_can_be_read_is_held_out(tmp_path, split):
    for i in range(14):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    val = load(tmp_path, val_fraction=0.001, split=split)[1]
    broken = tmp_path / next(iter(names(val)))
    assert len(val) == 1
    broken.write_bytes(b"no picture")
    train, val, _ = load(tmp_path, val_fraction=0.001, split=split)
    assert len(train) + len(val) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert val[0, 0][0].shape == (3, 32, 32) and train[0, 0][0].shape == (3, 32, 32)


def test_no_index_is_left_beside_a_small_source(picture_folder, tmp_path):
    (tmp_path / "out").mkdir()
    load(picture_folder, out=str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_two_pictures_are_one_of_each(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    for fraction in (0.001, 0.5):
        train, val, _ = load(tmp_path, val_fraction=fraction)
        assert len(train) == len(val) == 1
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="at least two"):
        load(tmp_path)


def test_empty_classes_keep_their_number_and_hidden_folders_are_none(picture_folder):
    for folder in ("bat", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (picture_folder / folder).mkdir()
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copy(picture_folder / "cat/0.png", picture_folder / folder / "0.png")
    (picture_folder / "cat" / "._0.png").write_bytes(b"finder")
    with pytest.warns(UserWarning, match="1 classes without a picture.*bat"):
        train, val, classes = load_data(run(picture_folder), SMALL_TOKENIZER)
    assert classes == ["bat", "cat", "dog", "eel"] and len(train) + len(val) == 12
    assert set(train.labels.tolist()) == {1, 2, 3}


def test_a_class_in_which_nothing_can_be_read_is_named(picture_folder, tmp_path, capsys):
    for path in (picture_folder / "dog").iterdir():
        path.write_bytes(b"no picture")
    (picture_folder / "cat/3.png").write_bytes(b"no picture")
    train, val, _ = load(picture_folder, val_fraction=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(len(train)):
            _, label, _ = train[0, i]
            own = train.source.name(int(train.indices[i])).split("/")[0]
            assert train.source.classes[label] == (own if own != "dog" else "eel")  # the next
    report_pictures([train, val], tmp_path)
    assert "1 classes have no picture that can be read: dog" in capsys.readouterr().out


def test_links_to_folders_are_followed_and_end(picture_folder, tmp_path):
    plain = [open_source(str(picture_folder)).name(i) for i in range(12)]
    (picture_folder / "cat" / "up").symlink_to(picture_folder)  # a folder that it lies in
    (picture_folder / "dog" / "self").symlink_to(picture_folder / "dog")
    (picture_folder / "above").symlink_to(tmp_path)
    (picture_folder / "eel" / "twice").symlink_to(picture_folder / "hen")
    (picture_folder / "eel" / "once").symlink_to(picture_folder / "hen")
    (picture_folder / "hen").symlink_to(picture_folder / "dog")  # a class of its own
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "back").symlink_to(picture_folder / "cat")
    shutil.copy(picture_folder / "cat/0.png", tmp_path / "far/0.png")
    (picture_folder / "fox").symlink_to(tmp_path / "far")
    source = open_source(str(picture_folder))
    dogs = [f"{there}/{i}.png" for there in ("eel/once", "fox/back", "hen") for i in range(4)]
    found = [source.name(i) for i in range(len(source))]
    assert sorted(found) == sorted([*plain, "fox/0.png", *dogs])
    assert source.classes == ["cat", "dog", "eel", "fox", "hen"]
    assert sorted(n for n, _ in source.left_out.values()) == [1, 6]
    side = dict(zip(found, source.hashes.tolist()))  # a picture is held out by all its names
    assert {side[f"{there}/0.png"] for there in ("eel/once", "hen", "dog")} == {side["dog/0.png"]}
    assert side["fox/back/0.png"] == side["cat/0.png"] != side["fox/0.png"]


def test_pictures_that_nothing_reads_are_counted_and_named(picture_folder):
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (picture_folder / "cat" / name).write_bytes(b"x")
    with pytest.warns(UserWarning) as caught:
        load_data(run(picture_folder), SMALL_TOKENIZER)
    said = "\n".join(str(w.message) for w in caught)
    assert ".heic: files that nothing here reads: 2, for example cat/a.heic" in said
    assert ".txt" in said


def test_train_and_val_are_no_classes(picture_folder, tmp_path):
    for name in ("train", "val"):
        shutil.copytree(picture_folder, tmp_path / "both" / name)
    with pytest.raises(UserError, match="--data .*train and the other as --val-data .*val"):
        load(tmp_path / "both")
    train, val, classes = load(tmp_path / "both/train", val_data=str(tmp_path / "both/val"))
    assert classes == ["cat", "dog", "eel"] and len(train) == len(val) == 12
    shutil.rmtree(tmp_path / "both/val/cat")  # numbers are those of --data
    assert set(load(tmp_path / "both/train",
                    val_data=str(tmp_path / "both/val"))[1].labels.tolist()) == {1, 2}


@pytest.mark.parametrize("text, name", (
    ("tabby\ngolden retriever\neel\n", "list.txt"),
    ('["tabby", "golden retriever", "eel"]', "list.json"),
    ('{"dog": "golden retriever, hound", "cat": "tabby", "eel": "eel"}', "words.json"),
    ('{"0": ["cat", "tabby"], "1": ["dog", "golden retriever"], "2": ["eel", "eel"]}', "i.json")))
def test_class_names(picture_folder, tmp_path, text, name):
    (tmp_path / name).write_text(text)
    train, _, classes = load(picture_folder, class_names=str(tmp_path / name))
    assert classes == ["tabby", "golden retriever", "eel"]
    assert train.source.folders == ["cat", "dog", "eel"]


def test_class_names_by_wnid(picture_folder, tmp_path):
    (picture_folder / "cat").rename(picture_folder / "n02012849")
    (picture_folder / "dog").rename(picture_folder / "n03126707")
    shutil.rmtree(picture_folder / "eel")
    (tmp_path / "words.txt").write_text("n03126707 crane\nn02012849 crane, bird\nn00000001 x\n")
    assert load(picture_folder, class_names=str(tmp_path / "words.txt"))[2] == [
        "crane (n02012849)", "crane (n03126707)"]
    (tmp_path / "words.txt").write_text("n03126707 crane\nn00000001 x\n")
    with pytest.raises(UserError, match="no name for 1 of the classes, n02012849"):
        load(picture_folder, class_names=str(tmp_path / "words.txt"))
    (tmp_path / "words.txt").write_text("one name\n")
    with pytest.raises(UserError, match="has 1 names, the data 2 classes"):
        load(picture_folder, class_names=str(tmp_path / "words.txt"))
