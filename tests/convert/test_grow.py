"""Growing a tokenizer: images of twice the height from the same tokens."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from equimini import load_generator
from equimini.autoencoder import Tokenizer
from equimini.convert.grow import grow, half_size, imitate, token_error
from equimini.sampling.options import SamplingOptions
from tests.conftest import SMALL_TOKENIZER, randomize
from tests.helpers.scripts import TOKENIZER, TRAINED, call, mistake

FLAT = torch.linspace(-0.9, 0.9, 4)[:, None, None, None].expand(4, 3, 64, 64)


def test_it_begins_as_the_old_one_on_images_without_detail(tokenizer):
    """There neighbourhoods of any size look alike: tokens and (repeated) pixels are the same."""
    new = grow(tokenizer)
    assert new.config.f == 2 * tokenizer.config.f and new.config.rows == tokenizer.config.rows
    torch.testing.assert_close(new.encode(FLAT), tokenizer.encode(FLAT[..., ::2, ::2]))
    assert token_error(new, tokenizer, FLAT) < 1e-10
    torch.testing.assert_close(new.latent_std, tokenizer.latent_std)


def test_its_images_begin_as_the_old_ones_with_repeated_pixels(tokenizer):
    tokens = torch.randn(2, 5, tokenizer.config.token_channels)
    old, new = (F.avg_pool2d(t.decode(tokens), size)
                for t, size in ((tokenizer, 8), (grow(tokenizer), 16)))
    assert (old - new).std() < 0.3 * old.std()


@pytest.mark.parametrize("change", [
    {"multipliers": (2, 2, 4)}, {"layout": "grid", "image_size": 16, "attention_rows": (4,)},
    {"semantic_channels": 0}], ids=str)
def test_it_grows_tokenizers_of_all_kinds(change):
    old = randomize(Tokenizer(dataclasses.replace(SMALL_TOKENIZER, **change)))
    old.set_statistics(0.0, 1.0)
    size = 2 * old.config.image_size
    new = grow(old)
    tokens = new.encode(torch.rand(1, 3, size, size) * 2 - 1)
    assert tokens.shape == (1, old.config.columns, old.config.token_channels)
    assert new.decode(tokens).shape == (1, 3, size, size)


def test_half_size_is_what_pillow_makes():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC))
    ours = half_size(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    got = ((ours[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(got - small).max() <= 1


def test_the_encoder_learns_the_old_tokens(tokenizer):
    images = (F.interpolate(torch.rand(8, 3, 8, 8), size=64, mode="bilinear") * 255).byte()
    x = images / 127.5 - 1
    new = grow(tokenizer)
    before = token_error(new, tokenizer, x).item()
    decoder = {k: v.clone() for k, v in new.decoder.state_dict().items()}
    imitate(new, tokenizer, [(images, None)] * 40, 2e-3)
    assert token_error(new, tokenizer, x) < before / 4
    assert all(torch.equal(v, decoder[k]) for k, v in new.decoder.state_dict().items())


@pytest.mark.slow
def test_a_grown_generator_draws_the_same_tokens_twice_as_high(runs):
    said = call("equimini.convert.grow", TRAINED[1], *"--data synthetic --workers 0 --steps 3 "
                "--batch-size 4 --out grown/g.pt".split(), cwd=runs)
    assert "64 pixels" in said and "grown/g-tokenizer.pt" in said
    old, new = (load_generator(runs / p) for p in (TRAINED[1], "grown/g.pt"))
    tokens = [g.sample_tokens([1], 6, [0], SamplingOptions(steps=2)) for g in (old, new)]
    assert torch.equal(*tokens)
    assert new.sample([1], columns=6, steps=2).shape[2:] == (64, 48)
    call("train_tokenizer.py", *TOKENIZER[12:], *"--finetune-decoder grown/g-tokenizer.pt --steps 3 "
         "--perceptual none --out stage2".split(), cwd=runs)
    call("equimini.convert.pack", "grown/g.pt", "--tokenizer", "stage2/last.pt", "--out",
         "packed.pt", cwd=runs)
    assert load_generator(runs / "packed.pt").tokenizer.config.image_size == 64


def test_a_checkpoint_of_a_tokenizer_is_refused(saved_tokenizer, tmp_path):
    assert "generator" in mistake("equimini.convert.grow", saved_tokenizer, "--out", "g.pt",
                                  cwd=tmp_path)
