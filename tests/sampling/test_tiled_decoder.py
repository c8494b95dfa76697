"""Decoding on overlapping windows."""

import pytest
import torch

from equimini.sampling.tiled_decoder import TiledDecoder, Windows, decode_windows

SIZES = [Windows(8, 4, 1), Windows(8, 4, 2), Windows(6, 2, 1), Windows(9, 4, 1), Windows(16, 8, 3)]


def local(tokens):
    """A decoder without global layers, 3 pixels per column; it reaches one column far."""
    x = torch.cat((tokens[:, 1:2], tokens, tokens[:, -2:-1]), 1)
    y = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:])[..., :1].mT  # (B, 1, N)
    return y[:, None].repeat_interleave(3, -1).repeat(1, 3, 2, 1)


@pytest.mark.parametrize("windows", SIZES, ids=str)
def test_a_local_decoder_gives_the_same_as_in_one_piece(windows):
    for n in range(2, 40):
        tokens = torch.randn(2, n, 5, dtype=torch.float64)
        torch.testing.assert_close(decode_windows(local, tokens, 3, windows), local(tokens))


@pytest.mark.parametrize("windows", SIZES, ids=str)
def test_columns_one_by_one_give_the_same_pixels_from_bounded_memory(windows):
    tokens = torch.randn(1, 53, 5)
    decoder, pixels = TiledDecoder(local, 3, windows), []
    for x in tokens.split(1, 1):
        pixels += decoder.push(x)
        assert decoder.tokens.untyped_storage().nbytes() <= windows.length * 5 * 4
        assert decoder.tail is None or decoder.tail.untyped_storage().nbytes() <= (
            windows.overlap * 3 * 3 * 2 * 4)
    whole = decode_windows(local, tokens, 3, windows)
    assert torch.equal(torch.cat((*pixels, decoder.finish()), -1), whole)


def test_every_window_has_its_full_length_where_the_picture_has(tokenizer):
    seen = []
    decode = lambda t: seen.append(t.shape[1]) or tokenizer.decode(t)  # noqa: E731
    decode_windows(decode, torch.randn(1, 45, 6), 4, Windows(16, 4, 1))
    assert seen == [16] * 4
    seen.clear()
    decode_windows(decode, torch.randn(1, 9, 6), 4, Windows(16, 4, 1))
    assert seen == [9]


@torch.no_grad()
def test_up_to_one_window_a_global_decoder_gives_the_same_too(model):
    tokens = torch.randn(2, model.windows.length, 6)
    assert torch.equal(model.decode(tokens), model.decode_whole(tokens))


def test_a_fade_goes_evenly_from_one_window_to_the_next():
    calls = iter((0.0, 1.0, 2.0))  # each window is of one colour
    flat = lambda t: torch.full((1, 3, 1, 2 * t.shape[1]), next(calls))  # noqa: E731
    windows = Windows(8, 4, 1)
    row = decode_windows(flat, torch.zeros(1, 14, 1), 2, windows)[0, 0, 0]
    assert len(row) == 28 and (row.diff() >= 0).all() and row.diff().max() < 0.5
    assert (row[:10] == 0).all() and row[14:18].eq(1).all() and row[22:].eq(2).all()
    weights = windows.fade(2)
    torch.testing.assert_close(weights + weights.flip(0), torch.ones(4))


@pytest.mark.parametrize("sizes", ((8, 5, 1), (8, 4, 3), (1, 0, 0), (8, -1, 0)))
def test_windows_that_leave_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="windows"):
        Windows(*sizes)
