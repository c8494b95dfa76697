"""Token files; pictures that are changed and continued."""

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.sampling.class_schedule import parse_schedule, schedule_labels
from equimini.sampling.edit import (UNKNOWN, Tokens, extend, load_tokens, next_seed, open_picture,
                                    parse_columns, paste, resample, save_tokens)
from equimini.sampling.options import SamplingOptions
from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from equimini.utils.images import to_uint8

HOW = SamplingOptions(cfg=2.0, steps=3)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def drawn(model) -> Tokens:
    """Two pictures of ten columns, the second one turning from cat to eel."""
    labels = torch.tensor([[0] * 10, [0] * 6 + [2] * 4])
    tokens = torch.stack(list(model.draw(labels, [4, 9], HOW)), 1)
    return Tokens(tokens, labels, torch.tensor([[4] * 10, [9] * 10]), {"steps": 3})


@pytest.fixture
def photo(tmp_path):
    """70 x 64 pixels: scaled to a height of 32 it has 35 pixels, 8 columns and a rest of 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_token_files_come_back_as_they_were(model, drawn, tmp_path):
    save_tokens(tmp_path / "a.pt", model, drawn)
    back = load_tokens(tmp_path / "a.pt", model)
    assert torch.equal(back.tokens, drawn.tokens) and torch.equal(back.labels, drawn.labels)
    assert torch.equal(back.seeds, drawn.seeds) and back.options == drawn.options
    content = torch.load(tmp_path / "a.pt", weights_only=True)  # plain tensors and values
    assert content["classes"] == ["cat", "dog", "eel"] and content["equimini"] == "tokens"
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_wide_pictures_are_encoded_in_pieces(model, monkeypatch):
    x, widths = torch.randn(1, 3, 32, 4 * 150).clamp(-1, 1), []
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda x: widths.append(x.shape[3]) or encode(x))
    found = model.encode(x)
    assert found.shape[1] == 150 and widths == [4 * 72, 4 * 80, 4 * 30]
    for part, middle in ((x[..., 4 * 56:4 * 136], found[:, 64:128]),
                         (x[..., :256], model.encode(x[..., :256]))):
        tokens = model.tokenizer.normalize(encode(part))
        assert torch.equal(middle, tokens[:, -72:][:, :64])


def test_classes_of_a_token_file_are_found_by_name(model, drawn, tmp_path):
    save_tokens(tmp_path / "a.pt", model, drawn)
    model.classes = ["eel", "ape", "dog"]
    back = load_tokens(tmp_path / "a.pt", model)
    assert back.labels[1].tolist() == [UNKNOWN] * 6 + [0] * 4
    with pytest.raises(UserError, match="--classes"):
        resample(model, back[1], [2], [5], HOW)


def test_token_files_that_do_not_serve_are_refused(model, drawn, tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="no token file"):
        load_tokens(path, model)
    save_tokens(path, model, drawn)
    good = torch.load(path, weights_only=True)
    for change in ({"labels": good["labels"][:, 1:]}, {"tokens": good["tokens"] * torch.nan},
                   {"seeds": "none"}, {"labels": good["labels"] + 3}, {"classes": None},
                   *({"mirror": x} for x in (3, good["tokens"][:1], good["tokens"][:, :0],
                                             good["tokens"].repeat(1, 2, 1)))):
        checkpoint.save(path, "tokens", {**good, **change})
        with pytest.raises(UserError, match="do not fit together"):
            load_tokens(path, model)
    checkpoint.save(path, "generator", good)
    with pytest.raises(UserError, match="holds a generator"):
        load_tokens(path, model)
    save_tokens(path, model, drawn)
    model.tokenizer.set_statistics(0.0, 1.0)
    with pytest.raises(UserError, match="another tokenizer"):
        load_tokens(path, model)


def test_columns_of_a_token_file_drawn_again_with_their_own_seed_are_the_same(model, drawn):
    one = drawn[1]
    same = resample(model, one, [6, 7], [9], HOW)
    close(same.tokens, one.tokens)  # drawn alone and in a batch of two: equal to rounding
    assert torch.equal(same.tokens[:, :6], one.tokens[:, :6])
    assert torch.equal(same.seeds, one.seeds)
    seed = next_seed(one)
    other = resample(model, one, [6, 7], [seed, seed + 1], HOW)
    assert other.seeds[1].tolist() == [9] * 6 + [11] * 2 + [9] * 2
    kept = [0, 1, 2, 3, 4, 5, 8, 9]
    assert torch.equal(other.tokens[0, kept], one.tokens[0, kept])
    assert (other.tokens[:, 6:8] != one.tokens[:, 6:8]).any(-1).all()
    assert (other.tokens[0, 6:8] != other.tokens[1, 6:8]).any()
    later = resample(model, one, [6, 7, 8, 9], [seed], HOW)
    close(later.tokens[0, :8], other.tokens[0, :8])
    assert (later.tokens[0, 8:] != one.tokens[0, 8:]).any(-1).all()


def test_another_class_for_the_drawn_columns_only(model, drawn):
    changed = resample(model, drawn[0], [4, 5], [20], HOW, [(1, 0)])
    assert changed.labels[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_a_picture_is_continued_as_if_it_had_been_drawn(model, drawn):
    shorter = Tokens(drawn.tokens[:1, :7], drawn.labels[:1, :7], drawn.seeds[:1, :7])
    longer = extend(model, shorter, 3, [4], HOW)
    # ten columns are longer than the training pictures: guidance is constant either way
    close(longer.tokens, drawn.tokens[:1])
    turned = extend(model, shorter, 4, [4], HOW, [(1, 2), (2, 2)])
    assert turned.labels[0].tolist() == [0] * 7 + [1, 1, 2, 2]


def test_a_photograph_is_encoded_and_keeps_its_pixels(model, photo):
    with pytest.raises(UserError, match="--classes"):
        resample(model, open_picture(photo, model)[0], [2], [0], HOW)
    source, before = open_picture(photo, model)
    assert source.tokens.shape == (1, 8, 6) and before.shape == (1, 3, 32, 32)
    scaled = np.asarray(Image.open(photo).resize((35, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(to_uint8(before)[0], scaled[:, :32])
    assert np.array_equal(to_uint8(open_picture(photo, model, keep="right")[1])[0], scaled[:, 3:])
    drawn = resample(model, source, [5], [0], HOW, [(1, 0)])
    changed = torch.arange(8) == 5
    after = paste(before, model.decode(drawn.tokens), changed, f=4, fade=1)
    assert np.array_equal(to_uint8(after)[0, :, :16], scaled[:, :16])  # columns 0-3
    assert np.array_equal(to_uint8(after)[0, :, 28:], scaled[:, 28:32])  # column 7
    assert torch.equal(after[..., 20:24], model.decode(drawn.tokens)[..., 20:24])
    extend(model, source, 2, [0], HOW, [(1, 0)])


def test_pasting_goes_over_smoothly_and_leaves_the_rest():
    kept, drawn = torch.zeros(1, 3, 2, 40), torch.ones(1, 3, 2, 40)
    changed = torch.zeros(10, dtype=torch.bool)
    changed[[4, 7]] = True
    row = paste(kept, drawn, changed, f=4, fade=2)[0, 0, 0]
    assert row[:8].eq(0).all() and row[16:20].eq(1).all() and row[28:32].eq(1).all()
    assert row[8:16].diff().gt(0).all() and row[8] < 0.05 and row[15] > 0.95
    assert row[32:].diff().le(0).all() and row[39] < 0.05
    assert torch.equal(paste(kept, drawn, torch.zeros(10, dtype=torch.bool), 4), kept)


def test_files_that_are_no_pictures(model, drawn, photo, tmp_path):
    save_tokens(tmp_path / "two.pt", model, drawn)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (5, 32)).save(tmp_path / "narrow.png")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "two.pt").read_bytes()[:2000])
    for path, pick, text in ((tmp_path / "none.png", None, "no file"),
                             (tmp_path / "text.png", None, "cannot be read"),
                             (tmp_path / "narrow.png", None, "at least 2 columns"),
                             (tmp_path / "cut.pt", None, "damaged"),
                             (tmp_path / "two.pt", None, "--pick 0 to --pick 1"),
                             (tmp_path / "two.pt", 2, "--pick must be 0 to 1"),
                             (photo, 0, "--pick chooses"), (tmp_path, None, "no file")):
        with pytest.raises(UserError, match=text):
            open_picture(str(path), model, pick)
    source, pixels = open_picture(str(tmp_path / "two.pt"), model, 1)
    assert torch.equal(source.tokens, drawn.tokens[1:])
    torch.testing.assert_close(pixels, model.decode(drawn.tokens[1:]))


def test_lists_of_columns():
    assert parse_columns("5,6", 16) == [5, 6]
    assert parse_columns(" 9-11, 3,10", 16) == [3, 9, 10, 11]
    for text in ("16", "5,", "6-5", "-1", "a", "", "3-16", "1.5"):
        with pytest.raises(UserError, match="--resample takes columns 0 to 15"):
            parse_columns(text, 16)


def test_class_plans(model):
    def read(text):
        return parse_schedule(text, model.class_numbers, model.classes)

    assert read("cat, eel") == [(0, 0), (2, 0)] and read("1:3,cat:2") == [(1, 3), (0, 2)]
    assert schedule_labels(read("cat:3,eel:2"), 12).tolist() == [0, 0, 0, 2, 2] * 2 + [0, 0]
    assert schedule_labels(read("dog"), 3).tolist() == [1, 1, 1]
    model.classes = ["cat", "dog", "a:2"]
    assert read("a:2,cat") == [(2, 0), (0, 0)] and read("a:2:5,cat:1") == [(2, 5), (0, 1)]
    for text, message in (("cat:3,dog", "to every class"), ("cat:0", "from 1 up"),
                          ("cat:x", "from 1 up"), ("cow:3", "unknown class 'cow'"),
                          ("", "unknown class")):
        with pytest.raises(UserError, match=message):
            read(text)
    with pytest.raises(UserError, match="lengths in columns"):
        schedule_labels([(0, 0), (1, 0)], 8)
    with pytest.raises(UserError, match="add up to 9"):
        schedule_labels([(0, 5), (1, 4)], 8)
