"""The 2-D baselines through the scripts: squares are drawn, and what needs columns is refused."""

import pytest
from PIL import Image

from tests.helpers.scripts import GENERATOR, TOKENIZER, call, mistake


@pytest.fixture(scope="module", params=(("grid", 4), ("positions", 16)), ids=lambda of: of[0])
def trained(request, tmp_path_factory):
    """A folder with a tokenizer of this layout and its generator, and the number of tokens."""
    folder, (layout, tokens) = tmp_path_factory.mktemp(request.param[0]), request.param
    call("train_tokenizer.py", *TOKENIZER, "--multipliers", "1,1,1,2", "--layout", layout,
         "--steps", 4, cwd=folder)
    call("train_generator.py", *GENERATOR, "--window", tokens, "--steps", 2, cwd=folder)
    return folder, tokens


DRAWN = ("sample.py", "--checkpoint", "runs/generator/last.pt", "--steps", 1, "--classes", "sea")


def test_squares_are_drawn_and_called_by_their_size(trained):
    folder, tokens = trained
    for width in ([], ["--width", 32], ["--columns", tokens]):
        said = call(*DRAWN, "--count", 1, "--singles", "one", *width, cwd=folder)
        assert "1 picture of 32x32 pixels" in said
        assert Image.open(next((folder / "one").iterdir())).size == (32, 32)
    assert "2 pictures of 32x32" in call(*DRAWN, "--count", 2, "--npz", "two.npz", cwd=folder)


@pytest.mark.parametrize("asked", (
    ["--columns", 20], ["--width", 64], ["--lead-in", 2], ["--scroll", 40, "--out", "long"],
    ["--ring"], ["--edit", "square.png", "--resample", "5"],
    ["--continue-from", "square.png", "--columns", 4]), ids=lambda words: words[0])
def test_what_needs_columns_is_refused(trained, asked):
    folder, _ = trained
    Image.new("RGB", (32, 32)).save(folder / "square.png")
    assert "are no columns (layout " in mistake(*DRAWN, *asked, cwd=folder)


def test_what_shows_columns_needs_them(trained):
    folder, _ = trained
    last = "runs/generator/last.pt"
    for program in (["equimini.page"], ["equimini.show", "drift"], ["equimini.show", "seams"],
                    ["equimini.experiments", "fits"]):
        assert "are no columns" in mistake(*program, "--checkpoint", last, cwd=folder)
    assert "makes no columns" in mistake("equimini.show", "tokens", "--checkpoint", last, "--image",
                                       "square.png", cwd=folder)
