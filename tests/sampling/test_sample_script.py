"""sample.py and equimini.show, run as a user runs them."""

import shutil
import signal
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.scripts import TRAINED, call, command, mistake, start


def test_a_scroll_is_interrupted_resumed_and_prolonged(runs):
    """SIGTERM leaves a scroll that opens; resumed and prolonged it is the one drawn at once."""
    options = [*TRAINED, "--classes", "sea:30,forest:20", "--steps", 2, "--seed", 5,
               "--tile-columns", 16]
    call("sample.py", *options, "--scroll", 120, "--out", "once", cwd=runs)
    process = start(command("sample.py", *options, "--scroll", 100_000, "--out", "cut"), runs,
                    runs / "cut/state.pt")
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in output
    assert "Traceback" not in output
    shutil.copy(runs / "runs/generator/last.pt", runs / "mine.pt")
    call("sample.py", *options, "--scroll", 70, "--out", "short", "--checkpoint", "mine.pt",
         cwd=runs)
    assert "begun with --seed 5, not 6" in mistake(
        "sample.py", "--scroll", 120, "--out", "short", "--resume", "--seed", 6, cwd=runs)
    call("sample.py", "--scroll", 120, "--out", "short", "--resume", cwd=runs)
    for path in sorted((runs / "once").iterdir()):
        if path.suffix == ".png":  # the page names the checkpoint
            assert path.read_bytes() == (runs / "short" / path.name).read_bytes(), path.name
    final = torch.load(runs / "cut/state.pt", weights_only=True)["done"]
    for tile in sorted((runs / "cut").glob("tile-*.png"))[:7]:  # the full ones of "once"
        picture = np.asarray(Image.open(tile))  # the end of the scroll is there and opens, too
        if int(tile.stem[-6:]) < final:
            assert np.array_equal(picture, np.asarray(Image.open(runs / "once" / tile.name)))


def test_samples_for_other_evaluators(runs):
    """--npz holds the pictures of the sheet, of the classes in turn, whatever the batch."""
    what = [*TRAINED, "--classes", "sea,forest", "--count", 3, "--steps", 2, "--lead-in", 1]
    call("sample.py", *what, "--singles", "alone", "--out", "alone.png", cwd=runs)
    call("sample.py", *what, "--npz", "alone.npz", "--batch-size", 4, cwd=runs)
    with np.load(runs / "alone.npz") as file:
        pictures, labels = file["arr_0"], file["arr_1"]
    names = sorted((runs / "alone").iterdir(), key=lambda path: path.stem[-6:])
    assert labels.tolist() == [int(path.stem[5:9]) for path in names] and len(set(labels)) == 2
    for picture, path in zip(pictures, names, strict=True):
        assert abs(picture.astype(int) - np.asarray(Image.open(path))).max() <= 1


def test_pictures_are_edited_and_continued(runs):
    call("sample.py", *TRAINED, "--classes", "sea", "--count", 2, "--steps", 2, "--save-tokens",
         "two.pt", "--show-steps", "steps.png", "--out", "two.png", "--singles", "two", cwd=runs)
    assert Image.open(runs / "steps.png").width > 9 * 32  # nine moments, side by side
    said = call("sample.py", *TRAINED, "--edit", "two.pt", "--pick", 1, "--resample", "5-6",
                "--out", "edited.png", "--save-tokens", "edited.pt", cwd=runs)
    assert "2 of them drawn with 2 evaluations" in said  # --steps 2 comes from the token file
    before = np.asarray(Image.open(runs / "two" / "class0002_seed000001.png")).astype(int)
    after = np.asarray(Image.open(runs / "edited.png")).astype(int)
    assert abs(after[:, :3 * 4] - before[:, :3 * 4]).max() <= 1
    assert (after[:, 5 * 4:7 * 4] != before[:, 5 * 4:7 * 4]).mean() > 0.1
    assert torch.load(runs / "edited.pt", weights_only=True)["seeds"].tolist() == [
        [1] * 5 + [2] * 2 + [1]]
    call("sample.py", *TRAINED, "--continue-from", "edited.png", "--classes", "forest:4,sea:8",
         "--columns", 12, "--steps", 2, "--count", 3, "--out", "wider.png", "--singles", "wider",
         "--show-steps", "grown.png", cwd=runs)
    names = sorted(p.name for p in (runs / "wider").iterdir())
    assert names == ["seed000000.png", "seed000001.png", "seed000002.png"]
    wider = np.asarray(Image.open(runs / "wider" / names[0]))
    assert wider.shape == (32, 20 * 4, 3)
    assert np.array_equal(wider[:, :6 * 4], np.asarray(Image.open(runs / "edited.png"))[:, :6 * 4])
    call("sample.py", *TRAINED, "--edit", "edited.pt", "--resample", 2, "--redraw-later", "--out",
         "x.png", cwd=runs)


def test_a_ring_and_a_picture_continued_to_the_left(runs):
    how = ["--classes", "sea", "--steps", 1, "--solver", "midpoint", "--fit", 2]
    said = call("sample.py", *how, "--count", 1, "--columns", 18, "--ring", "--save-tokens",
                "ring.pt", "--singles", "rings", "--out", "rings.png", cwd=runs)
    assert "1 picture of 144x128" in said
    photo = runs / "rings" / "class0004_seed000000.png"
    call("sample.py", *how, "--continue-from", photo, "--columns", 6, "--ring", "--out",
         "closed.png", cwd=runs)
    call("sample.py", *how[:-2], "--continue-left-from", photo, "--columns", 6, "--out",
         "left.png", "--save-tokens", "left.pt", cwd=runs)
    before, closed, left = (np.asarray(Image.open(path)) for path in (
        photo, runs / "closed.png", runs / "left.png"))
    assert closed.shape == left.shape == (128, 192, 3)
    assert np.array_equal(left[:, -128:], before[:, -128:])  # beyond two mixed columns
    assert np.array_equal(closed[:, 16:128], before[:, 16:128])
    assert not np.array_equal(closed[:, :16], before[:, :16])  # mixed with what goes before them
    call("sample.py", *how, "--edit", "ring.pt", "--ring", "--resample", "16,17,0", "--pick", 0,
         "--out", "again.png", "--save-tokens", "again.pt", cwd=runs)
    old, new = (torch.load(runs / name, weights_only=True)["tokens"] for name in ("ring.pt", "again.pt"))
    assert (old == new).all(2)[0].tolist() == [False] + [True] * 15 + [False] * 2
    saved = torch.load(runs / "left.pt", weights_only=True)
    assert saved["seeds"].tolist() == [[0] * 6 + [-1] * 18]


def test_pictures_of_what_a_model_does(runs):
    said = call("equimini.show", "seams", "--columns", 40, "--count", 2, "--steps", 1, cwd=runs)
    assert "(default)" in said
    call("equimini.show", "drift", "--columns", 20, "--count", 2, "--steps", 1,
         "--positions", "hold,grow", "--temperature", 1.1, "--lead-in", 2, "--out",
         "drift", cwd=runs)
    drawn = {"token.png"} if find_spec("matplotlib") else set()  # plots are left out without it
    assert drawn | {"pictures.png"} <= {p.name for p in (runs / "drift").iterdir()}


@pytest.mark.parametrize("arguments, text", (
    (["--scroll", "9", "--edit", "x.png"], "not both"),
    (["--scroll", "9", "--columns", "9"], "--columns does not go with --scroll"),
    (["--resume"], "--resume goes with --scroll"),
    (["--npz", "a.npz", "--singles", "b"], "--singles does not go with --npz"),
    (["--npz", "a.png"], "--npz must end in .npz"),
    (["--npz", "a.npz", "--scroll", "9"], "give --scroll or --npz, not both"),
    (["--scroll", "9", "--resume", "--out", "y"], "no scroll to resume"),
    (["--scroll", "9", "--out", "y"], "lengths in columns"),  # all classes
    (["--scroll", "9", "--classes", "sea:8,forest:8", "--out", "y"], "add up to 16"),
    (["--scroll", "1", "--classes", "sea", "--out", "y"], "at least 2"),
    (["--classes", "sea:9", "--columns", "8"], "add up to 9"),
    (["--classes", "sea:x"], "from 1 up"),
    (["--resample", "5"], "--resample goes with --edit"),
    (["--edit", "x.png"], "--edit needs --resample"),
    (["--edit", "none.png", "--resample", "5"], "no file none.png"),
    (["--edit", "samples.txt", "--resample", "5"], "no file samples.txt"),
    (["--edit", "runs/generator/last.pt", "--resample", "5"], "holds a generator"),
    (["--edit", "runs/generator/log.jsonl", "--resample", "5"], "cannot be read"),
    (["--edit", "runs/generator/previews/0000006.png", "--resample", "5000"],
     "--resample takes columns 0 to"),
    (["--edit", "runs/generator/previews/0000006.png", "--resample", "5"],
     "--classes"),
    (["--continue-from", "runs/generator/previews/0000006.png", "--columns", "3",
      "--classes", "sea,forest"], "lengths in columns"),
    (["--continue-left-from", "runs/generator/previews/0000006.png", "--classes", "sea"],
     "without mirrored pictures"),  # the built-in data has none
    (["--continue-left-from", "none.png"], "no file none.png"),
    (["--continue-left-from", "x.png", "--continue-from", "x.png"], "not both"),
    (["--continue-left-from", "x.png", "--ring"], "--ring does not go with --continue-left-from"),
    (["--edit", "x.png", "--resample", "5", "--ring", "--redraw-later"], "a ring has none"),
    (["--edit", "x.png", "--resample", "5", "--fit", "0"], "fit must be at least 1, got 0"),
    (["--edit", "x.png", "--resample", "5", "--fit", "4", "--redraw-later"], "--fit chooses"),
    (["--continue-from", "x.png", "--fit", "4"], "--fit chooses"),
    (["--fit", "4"], "--fit chooses"),
    (["--scroll", "9", "--ring"], "--ring does not go with --scroll"),
    (["--ring", "--show-steps", "x.png"], "--show-steps"),
    (["--save-tokens", "/proc/x/y.pt"], "/proc/x"),
    (["--show-steps", "x.gif"], ".png")))
def test_mistakes_end_in_one_clear_error(runs, arguments, text):
    assert text in mistake("sample.py", *TRAINED, *arguments, cwd=runs)
