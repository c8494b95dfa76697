"""Cached latents against encoding the pictures at every step."""

import json
from collections import Counter

import numpy as np
import torch
from PIL import Image

from equimini.training.cache_latents import CacheConfig, CachedLatents, Views, encode_split
from equimini.training.data import load_data
from equimini.training.options import RunConfig
from equimini.utils.checkpoint import tokenizer_hash
from equimini.utils.images import to_float

EPOCHS = 80


def cache(tokenizer, folder, out, **options):
    """Write a cache of the pictures in `folder`; returns the data sets that read the pictures."""
    cfg = CacheConfig(data=str(folder), out=str(out), workers=0, **options)
    train, val, classes = load_data(cfg, tokenizer.config)
    out.mkdir()
    labels = {split: encode_split(tokenizer, data, split, cfg, out, torch.device("cpu"))
              for split, data in (("train", train), ("val", val))}
    np.savez(out / "labels.npz", **labels)
    (out / "meta.json").write_text(json.dumps({"tokenizer": tokenizer_hash(tokenizer),
                                               "classes": classes}))
    return train, val


def draws(data, index, tokenizer=None):
    """How often each distinct item comes up for one picture over the epochs."""
    counts, found = Counter(), []
    for epoch in range(EPOCHS):
        x, label, _ = data[epoch, index]
        x = tokenizer.encode(to_float(x)[None])[0] if tokenizer else x
        known = next((i for i, y in enumerate(found) if torch.allclose(x, y, atol=1e-4)), None)
        if known is None:
            known = len(found)
            found.append(x)
        counts[known] += 1
    return found, counts, label


@torch.no_grad()
def test_both_ways_train_the_same_distribution(tokenizer, tmp_path):
    """Square pictures: each of two mirror images with probability 1/2, whichever way."""
    (tmp_path / "data").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    train, _ = cache(tokenizer, tmp_path / "data", tmp_path / "cache")
    cached = CachedLatents(str(tmp_path / "cache"), "train", tokenizer, seed=0)
    assert len(cached) == len(train) == 3
    for index in range(3):
        (one, p, label), (other, q, same) = draws(train, index, tokenizer), draws(cached, index)
        assert len(one) == len(other) == 2 and label == same
        order = [0, 1] if torch.allclose(one[0], other[0], atol=1e-4) else [1, 0]
        for a, b in enumerate(order):
            torch.testing.assert_close(one[a], other[b], atol=1e-4, rtol=1e-4)
        five_sigma = 5 * (EPOCHS / 4) ** 0.5  # of a fair coin thrown EPOCHS times
        assert all(abs(n - EPOCHS / 2) < five_sigma for n in (*p.values(), *q.values()))


@torch.no_grad()
def test_stored_crops_are_spread_as_random_crops_are(tokenizer, tmp_path):
    """A ramp from black to white tells where each crop lies: uniformly over its room."""
    (tmp_path / "data").mkdir()
    ramp = np.repeat(np.arange(96, dtype=np.uint8)[None, :, None] * 2, 32, 0).repeat(3, 2)
    for i in range(2):
        Image.fromarray(ramp).save(tmp_path / "data" / f"{i}.png")
    train, _, _ = load_data(RunConfig(data=str(tmp_path / "data")), tokenizer.config)
    views, _ = Views(train, range(1), 0, crops=64, augment=True)[0]
    lefts = views[::2, 0, 0, 0].long() // 2  # the unmirrored ones
    assert torch.equal(views[1::2], views[::2].flip(3))
    assert lefts.min() >= 0 and lefts.max() <= 64 and len(lefts.unique()) > 30
    sigma = 64 / 12 ** 0.5 / len(lefts) ** 0.5
    assert abs(lefts.double().mean() - 32) < 5 * sigma
