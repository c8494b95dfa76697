"""Columns and the tokenizer."""

import math

import pytest
import torch
import torch.nn.functional as F

from equimini.autoencoder import Downsample, Tokenizer, Upsample, add_noise, noise_variance
from equimini.columnize import columnize, rasterize, reflect_pad


def test_columnize_puts_channel_c_row_h_at_index_c_times_rows_plus_h():
    x = torch.randn(2, 3, 4, 5)
    columns = columnize(x)
    assert columns.shape == (2, 12, 5)
    for c in range(3):
        for h in range(4):
            assert torch.equal(columns[:, c * 4 + h], x[:, c, h])
    assert torch.equal(rasterize(columns, rows=4), x)


@pytest.mark.parametrize("size", (2, 3, 5))
@pytest.mark.parametrize("dim, pad", ((-1, (1, 1, 0, 0)), (-2, (0, 0, 1, 1))))
def test_reflect_pad_equals_torchs(dim, pad, size):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=layout)
        x.requires_grad_()
        assert torch.equal(reflect_pad(x, dim), F.pad(x, pad, mode="reflect"))
        assert torch.autograd.gradcheck(lambda x: reflect_pad(x, dim), x)


def test_shortcuts_are_group_averaged_unshuffle_and_repeated_shuffle():
    x = torch.randn(2, 8, 6, 4)
    down, up = Downsample(8), Upsample(8)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
    unshuffled = F.pixel_unshuffle(x, 2).unflatten(1, (8, 4)).mean(2)
    torch.testing.assert_close(down(x), unshuffled)
    assert torch.equal(up(x), F.pixel_shuffle(x.repeat_interleave(4, 1), 2))


@pytest.mark.parametrize("columns", (2, 3, 8, 19))
def test_any_width_from_two_columns_up(tokenizer, columns):
    x = torch.rand(2, 3, 32, 4 * columns) * 2 - 1
    tokens = tokenizer.encode(x)
    assert tokens.shape == (2, columns, 6)
    assert tokenizer.decode(tokens).shape == x.shape
    image, semantic = tokenizer.decode_with_semantics(tokens)
    torch.testing.assert_close(image, tokenizer.decode(tokens))
    assert semantic.shape == (2, 8, 8, columns)


@pytest.mark.parametrize("method, shape", (
    *(("encode", shape) for shape in ((1, 3, 32, 4), (1, 3, 32, 30), (1, 3, 28, 32), (3, 32, 32))),
    *(("decode", shape) for shape in ((1, 1, 6), (1, 4, 5), (4, 6)))))
def test_impossible_sizes_are_refused(tokenizer, method, shape):
    text = {"encode": "image", "decode": "tokens must be"}[method]
    with pytest.raises(ValueError, match=text):
        getattr(tokenizer, method)(torch.zeros(shape))


def test_statistics_start_unmeasured_and_normalize_inverts(tokenizer):
    assert not Tokenizer(tokenizer.config).has_statistics
    assert tokenizer.has_statistics
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(tokenizer.normalize(tokens), (tokens - 0.5) / 2)
    torch.testing.assert_close(tokenizer.denormalize(tokenizer.normalize(tokens)), tokens)


def test_noise_has_one_clamped_sigma_per_image_and_the_stated_variance():
    draw = torch.Generator().manual_seed(0)
    n, noise = 200_000, 2.5
    sigma = torch.randn(n, generator=draw)
    ones = add_noise(torch.zeros(n, 1, 1), noise, sigma, torch.ones(n, 1, 1)).flatten()
    torch.testing.assert_close(ones, (sigma * noise / 0.8).clamp(-noise, noise))
    second = ones.double().square()
    error = 5 * second.std().item() / math.sqrt(n)  # five standard errors
    assert abs(second.mean().item() - noise_variance(noise)) < error
    two = add_noise(torch.zeros(2, 3, 4), 1.0, torch.tensor([0.1, -0.2]), torch.ones(2, 3, 4))
    assert two.flatten(1).std(1).eq(0).all() and two[0, 0, 0] != two[1, 0, 0]
