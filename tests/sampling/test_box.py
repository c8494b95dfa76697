"""The models in the box, equimini/assets: what everybody sees first."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from equimini import load_generator
from equimini.utils import checkpoint
from tests.helpers.scripts import ROOT, call, invoke, mistake
from tests.tools.test_checkpoint import texts

SIDE = 128  # pixels of a square
# tests/known.png was drawn with python sample.py and these arguments
KNOWN = ("--checkpoint scenes --count 1 --cfg 3 --cfg-schedule constant --solver midpoint --steps 10 "
         "--device cpu --out").split()


def squares(path) -> np.ndarray:
    """The pictures on a labelled sheet with one square in every row, (classes, SIDE, SIDE, 3)."""
    sheet = np.asarray(Image.open(path)).astype(int)
    return np.stack([sheet[y:y + SIDE, -SIDE - 2:-2] for y in range(2, len(sheet), SIDE + 2)])


def alike(drawn: np.ndarray, known: np.ndarray) -> bool:
    """Whether they agree to float32's rounding.

    On the machine that drew tests/known.png, with 1 and 2 threads, weights laid out by oneDNN or
    not, SSE, AVX2 and AVX-512 kernels, values 0 to 255 were within 0.002 of those computed in
    float64, so that about one in 10,000 was rounded to the next integer.  Ten times that error
    makes it one in 1,000; the bound is one in 100, and no value off by more than 1.  One step of
    the solver fewer changes every twentieth value.
    """
    off = abs(drawn - known)
    return off.max() <= 1 and (off > 0).mean() <= 0.01


@pytest.fixture
def draw(tmp_path):
    """Draws as tests/known.png was drawn, but for the arguments that follow."""
    def drawn(*changed):
        invoke("sample.py", *KNOWN, "new.png", *changed, cwd=tmp_path)
        return squares(tmp_path / "new.png")
    return drawn


def test_a_known_picture(draw):
    known = squares(ROOT / "tests/known.png")
    drawn = draw()
    assert alike(drawn, known), (abs(drawn - known).max(), (drawn != known).mean())
    assert not alike(draw("--steps", 9), known)  # all the rest changes more than that
    assert not alike(draw("--seed", 1), known)
    for i in range(len(known)):  # classes that changed places
        assert not alike(np.roll(known, 1, 0)[i], known[i])


@pytest.mark.slow
def test_without_arguments_squares_and_panoramas_are_drawn(tmp_path):
    said = call("sample.py", cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["panorama.png", "samples.png"]
    sheets = {n: np.asarray(Image.open(tmp_path / n)) for n in ("samples.png", "panorama.png")}
    assert {len(sheet) for sheet in sheets.values()} == {6 * (SIDE + 2) + 2}  # six classes
    panoramas = sheets["panorama.png"][:, -2 - 8 * SIDE:-2]  # 8 times wider than trained on
    assert sheets["samples.png"].shape[1] - sheets["panorama.png"].shape[1] == 7 * 2  # 8 squares
    for i in range(6):
        light = panoramas[(SIDE + 2) * i + 2:(SIDE + 2) * (i + 1)].astype(float).mean(2)
        assert light.std(0).mean() > 10 and (light < 250).mean() > 0.5  # something is there
    # the command that it prints draws the same, alone
    printed = [line for line in said.splitlines() if line.startswith("python sample.py --count")]
    assert ["samples.png" in printed[0], "panorama.png" in printed[1]] == [True, True]
    invoke(*shlex.split(printed[1])[1:], "--out", "again.png", cwd=tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), sheets["panorama.png"])


def test_how_to_draw_may_be_said(tmp_path, capsys):
    invoke("sample.py", "--steps", 1, "--solver", "euler", "--seed", 3, cwd=tmp_path)
    said = capsys.readouterr().out
    assert said.count("1 evaluation of the head") == 2 and said.count("--seed 3") == 2
    assert (tmp_path / "samples.png").exists() and (tmp_path / "panorama.png").exists()


def test_any_argument_works_with_the_boxed_model(tmp_path):
    invoke("sample.py", "--classes", "sea:6,forest:6", "--steps", 1, "--singles", "one", "--count",
           1, cwd=tmp_path)
    assert [Image.open(p).size for p in (tmp_path / "one").iterdir()] == [(12 * 8, SIDE)]
    assert not (tmp_path / "panorama.png").exists()


def test_the_boxed_files_are_small_and_hold_no_path():
    paths = [checkpoint.BOX / f"{name}.pt" for name in checkpoint.IN_THE_BOX]
    assert all(p.stat().st_size <= 15e6 for p in paths)
    assert sum(p.stat().st_size for p in paths) <= 30e6
    for path, kind in zip(paths, ("generator", "tokenizer", "generator")):
        assert not [t for t in texts(checkpoint.load(path, kind)) if "/" in t or "\\" in t]
    assert {"forest", "sea"} < set(load_generator("scenes").classes)
    assert (checkpoint.BOX / "README.md").is_file()


@pytest.mark.skipif(not (ROOT / "equimini").is_dir(), reason="equimini itself is installed")
def test_an_installed_copy_has_the_model(tmp_path):
    """What `pip install .` copies, without the compiled kernels."""
    words = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib",
             str(tmp_path / "lib")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "EQUIMINI_BUILD": "none"})
    boxed = {p.name for p in checkpoint.BOX.iterdir()}
    assert {p.name for p in (tmp_path / "lib/equimini/assets").iterdir()} == boxed
    assert len(boxed) == 4


def test_training_starts_from_the_boxed_model(picture_folder, tmp_path):
    said = call("train_generator.py", "--init-from", "scenes", "--data", picture_folder, "--steps",
                1, "--batch-size", 2, "--workers", 0, "--preview-steps", 1, "--lr", 0,
                "--val-images", 2, cwd=tmp_path)
    assert "starting from the weights of scenes; new classes: cat, dog, eel" in said
    tuned, boxed = load_generator(tmp_path / "runs/generator/last.pt"), load_generator("scenes")
    assert tuned.classes == ["cat", "dog", "eel"]
    for name in ("latent_mean", "latent_std"):
        assert (getattr(tuned.tokenizer, name) == getattr(boxed.tokenizer, name)).all()
    pairs = zip(tuned.generator.head.parameters(), boxed.generator.head.parameters())
    assert all((a == b).all() for a, b in pairs)


def test_a_copy_without_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BOX", tmp_path)
    said = mistake("sample.py", cwd=tmp_path)
    assert "came without the model scenes-mean-flow" in said and "--checkpoint" in said


@pytest.mark.parametrize("own, spins", (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                        ({"OMP_WAIT_POLICY": "active"}, "None")))
def test_how_threads_wait_is_said_before_torch_starts_unless_it_was_said(own, spins):
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run(
        [sys.executable, "-c", "import equimini, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), "
         "'torch' in sys.modules)"], cwd=ROOT, env={**rest, **own}, capture_output=True, text=True)
    assert said.stdout.split() == [spins, "False"]
    script = (ROOT / "sample.py").read_text()
    assert script.index("from equimini import") < script.index("import torch")


@pytest.mark.parametrize("asked, said", (
    ("--columns 20", "1.5 throughout"), ("--columns 20 --cfg 2", "2 throughout"),
    ("--columns 20 --checkpoint scenes", "2 throughout"), ("--columns 16", "1.06 at column 0 to 2"),
    ("--scroll 20 --out walk", "1.5 throughout"), ("--continue-from a.png --columns 4", "1.5 thr"),
    ("--continue-from a.pt --columns 2", "3 throughout")))
def test_long_pictures_take_a_smaller_scale_unless_told_otherwise(tmp_path, asked, said):
    """At 2 those of the box's default model drift, and turn to stripes within a scroll."""
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    drawn = "--classes sea --steps 1 --count 1"
    if "a.pt" in asked:  # whose own scale is the default
        call("sample.py", *drawn.split(), "--cfg", 3, "--save-tokens", "a.pt", cwd=tmp_path)
    words = drawn.replace("--count 1", "") if "--scroll" in asked else drawn
    assert f"guidance: {said}" in call("sample.py", *words.split(), *asked.split(), cwd=tmp_path)
