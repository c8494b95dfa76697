"""python -m equimini.show tokens: the strip, the animation, the shift test."""

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.show import tokens as show
from equimini.utils.errors import UserError
from tests.conftest import SMALL_TOKENIZER


def test_tokens_are_revealed_from_left_to_right(tokenizer):
    tokens = torch.randn(1, 6, 6)
    frames = show.reveal(tokenizer, tokens, seed=3)
    assert frames.shape == (7, 3, 32, 24)
    torch.testing.assert_close(frames[-1:], tokenizer.decode(tokens), rtol=1e-4, atol=1e-4)
    again = show.reveal(tokenizer, tokens, seed=3, batch=2)
    torch.testing.assert_close(frames, again, rtol=1e-4, atol=1e-4)
    other = show.reveal(tokenizer, tokens, seed=4)
    assert not torch.allclose(frames[0], other[0]) and torch.allclose(frames[-1], other[-1])
    start = show.reveal(tokenizer, torch.randn(1, 6, 6), seed=3)
    torch.testing.assert_close(frames[0], start[0])  # nothing of the picture yet


def test_the_shift_test_compares_the_same_columns():
    class Columns:  # a perfectly equivariant "tokenizer": a column's token is its mean colour
        config, latent_std = SMALL_TOKENIZER, torch.full((3,), 2.0)

        def encode(self, image):
            return image.unflatten(3, (-1, SMALL_TOKENIZER.f)).mean((2, 4)).mT

    image = torch.rand(1, 3, 32, 9 * SMALL_TOKENIZER.f)
    for k in (1, 2, 4):
        found = show.shift_test(Columns(), image, k)
        assert found.shape == (9 - 2 * k,) and found.max() < 1e-6
    a = torch.zeros(4, 3)
    assert show.distance(a, a + 1, torch.full((3,), 2.0)).tolist() == [0.5] * 4


@pytest.mark.parametrize("suffix", (".webp", ".gif"))
def test_the_command(saved_tokenizer, picture_folder, tmp_path, suffix, capsys):
    out, moving = tmp_path / "strip.png", tmp_path / f"moving{suffix}"
    image = picture_folder / "cat/0.png"  # 40 x 70 pixels: 56 wide at a height of 32
    show.main(["--checkpoint", str(saved_tokenizer), "--image", str(image), "--out", str(out),
               "--animation", str(moving), "--pictures", "4", "--shifts", "1,3,20"])
    sheet = Image.open(out)
    assert sheet.height >= 2 * 32 and sheet.width > 4 * 56
    with Image.open(moving) as frames:
        assert frames.n_frames == 15 and frames.size == (56, 32)
    text = capsys.readouterr().out
    assert "14 tokens" in text and "k = 1" in text and "k = 3" in text and "k = 20" not in text
    rows = [line.split() for line in text.splitlines() if line[:6].strip().isdigit()]
    assert [int(r[0]) for r in rows] == list(range(1, 13))
    assert all(np.isfinite(float(v)) for r in rows for v in r[1:])


@pytest.mark.parametrize("arguments, text", (
    ("--image pictures/cat/0.png --out x.jpg", ".png"),
    ("--image pictures/cat/0.png --animation x.mp4", ".webp"),
    ("--image nowhere.png", "nowhere.png"), ("", "nothing"),
    ("--image pictures/cat/0.png --checkpoint none.pt", "none.pt")))
def test_mistakes(saved_tokenizer, picture_folder, arguments, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text):
        show.main(["--checkpoint", "t.pt", *arguments.split()])
