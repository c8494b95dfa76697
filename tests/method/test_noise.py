"""Draws that depend on their key alone: not on the batch, the thread, or when they are made."""

import gc
import threading
import weakref
import zlib

import numpy as np
import pytest
import torch

from equimini import noise
from equimini.noise import _rows, cores, normal, rng, uniform
from equimini.training.generator_trainer import Prefetcher


def rngs(places):
    return [rng("test", 3, i) for i in places]


@pytest.mark.parametrize("draw", (normal, uniform))
@pytest.mark.parametrize("shape", ((), (0,), (5,), (3, 4)))
def test_rows_do_not_depend_on_batch_or_threads(draw, shape, monkeypatch):
    whole = draw(shape, rngs(range(20)))
    assert whole.shape == (20, *shape) and whole.dtype == torch.float32
    assert torch.equal(draw(shape, rngs([7, 2])), whole[[7, 2]])
    monkeypatch.setattr(noise, "FEW", 0)
    seen = set()
    draws = np.random.Generator

    def noted(*args, **kwargs):
        seen.add(threading.get_ident())
        return getattr(draws, "standard_normal" if draw is normal else "random")(*args,
                                                                                     **kwargs)

    assert torch.equal(draw(shape, rngs(range(20))), whole)
    _rows(noted, (1,), rngs(range(2)))
    if cores() > 1:
        assert threading.get_ident() not in seen


def test_one_stream_goes_on_from_draw_to_draw():
    """As numpy would draw from it, one after the other."""
    r, = rngs([0])
    found = normal((3,), [r]), uniform((), [r]), normal((), [r])
    r, = rngs([0])
    expected = [r.standard_normal(3, dtype=np.float32), r.random(dtype=np.float32),
                r.standard_normal(dtype=np.float32)]
    for a, b in zip(found, expected):
        assert np.array_equal(a[0].numpy(), b)


def test_prefetching_gives_what_the_function_gives():
    calls = []

    def function(step, *more):
        calls.append((step, *more))
        return step * 100 + sum(more)

    prefetch = Prefetcher()
    for step, *more in ((4, 1), (5, 1), (6, 1), (6, 2), (9, 2), (10, 2), (10, 2)):
        assert prefetch(function, step, *more) == step * 100 + sum(more)
    prefetch.pool.shutdown()
    asked = [(4, 1), (5, 1), (6, 1), (7, 1), (6, 2), (7, 2), (9, 2), (10, 2), (11, 2), (10, 2),
             (11, 2)]
    assert sorted(calls) == sorted(asked)  # once each, but for what was not expected


def test_a_prefetched_error_is_raised_when_it_is_asked_for():
    prefetch = Prefetcher()
    assert prefetch(lambda step: 1 / (2 - step), 1) == 1
    with pytest.raises(ZeroDivisionError):
        prefetch(lambda step: 1 / (2 - step), 2)


def test_prefetching_does_not_keep_the_function_alive():
    """A trainer hands in a method of its own: it must not live as long as its memory's cycles."""
    class Owner:
        def __init__(self):
            self.prefetch = Prefetcher()

        def draw(self, step):
            return step

    owner = Owner()
    assert owner.prefetch(owner.draw, 1) == 1
    owner.prefetch.pool.shutdown()
    alive = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("key", ((), (0, 2**32 - 1), (3, 2**32), (2**40, 0)))
def test_keys_of_any_size_are_those_of_numpy(key):
    words = np.random.SeedSequence([zlib.crc32(b"x"), *key])
    expected = np.random.Generator(np.random.Philox(words)).integers(2**60, size=4)
    assert (rng("x", *key).integers(2**60, size=4) == expected).all()
