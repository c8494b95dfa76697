"""Columns that fit on both sides, rings, and pictures continued to the left."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equimini.experiments.fits import exact_log_likelihood
from equimini.generator import Generator, RealEquivariant
from equimini.sampling.edit import Tokens, decode_ring, extend, mirror, paste, resample
from equimini.sampling.fit import choice, draw_end, fill_gap, log_likelihoods, reach, stream_near
from equimini.sampling.options import SamplingOptions
from equimini.utils.errors import UserError
from tests.conftest import SMALL_GENERATOR, randomize

HOW = SamplingOptions(cfg=2.0, steps=3)


class GaussianHead(torch.nn.Module):
    """The best velocity for tokens from N(z, 0.3²)."""

    def embed_time(self, t):
        return t[..., None]

    def modulations(self, time, z):
        return time, z

    def velocity(self, x, modulations):
        t, z = modulations
        off = (x - (1 - t) * z) / ((1 - t) ** 2 * 0.09 + t ** 2)
        return t * off - (z + (1 - t) * 0.09 * off)  # E(ε | x_t) − E(x | x_t)

    def forward(self, x, t, z):
        return self.velocity(x, (t[..., None], z))


@pytest.fixture
def drawn(model) -> Tokens:
    labels = torch.tensor([[0] * 12 + [2] * 4])
    tokens = torch.stack(list(model.draw(labels, [4], HOW)), 1)
    return Tokens(tokens, labels, torch.full((1, 16), 4), {"steps": 3})


def test_likelihoods_are_those_of_a_gaussian():
    """Eq. 8, weighted by (1−t)/t, has the differences of log p between contexts; the flow has
    log p itself."""
    draw = torch.Generator().manual_seed(0)
    z, x = 0.2 * torch.randn(5, 32, generator=draw), 0.3 * torch.randn(32, generator=draw)
    true = -(x - z).square().sum(1) / 0.18
    found = log_likelihoods(GaussianHead(), z, x, 3, 7)
    slope = ((found - found.mean()) * (true - true.mean())).sum() / (true - true.mean()).square().sum()
    assert 0.8 < slope < 1.05  # LOGIT leaves out the ends
    assert (found.argsort() == true.argsort()).all()
    level = true - 32 * math.log(0.3 * math.sqrt(2 * math.pi))
    exact = exact_log_likelihood(GaussianHead(), z, x.expand(5, -1), 200)
    torch.testing.assert_close(exact, level, atol=0.05, rtol=0)


def test_one_candidate_is_what_was_drawn_before(model, drawn):
    """Bit for bit, and the stream may begin as late as `reach` says."""
    stream = model.stream(drawn.labels[:, 0].expand(2), [5, 6], 16, HOW)
    for i in range(12):
        stream.feed(drawn.tokens[:, i].expand(2, -1))
    expected = stream.draw()
    one = resample(model, drawn, [12], [5, 6], HOW, [(0, 0)], fit=1)
    assert torch.equal(one.tokens[:, 12], expected)
    stream = stream_near(model, 12, drawn.tokens, drawn.labels[0], [5], HOW)
    for i in range(stream.column, 12):
        stream.feed(drawn.tokens[:, i])
    found, _ = draw_end(model, stream, 0, drawn.labels[0, :1], drawn.tokens[0, :0], HOW, 3, 16)
    distance = (found[:, 0] - expected[0]).abs().amax(1)
    assert distance[0] < 1e-5 < distance[1:].min()  # candidate 0 has the same noise


@pytest.mark.parametrize("kind", (Generator, RealEquivariant))
def test_a_column_plays_a_part_as_far_as_it_reaches(kind, tokenizer):
    generator = randomize(kind(SMALL_GENERATOR, 3, 6)).eval()
    a = torch.randn(1, 16, 6)
    b = a.clone()
    b[:, 3] += 1
    far, labels = reach(generator.config), torch.tensor([0])
    if kind is RealEquivariant:  # its configuration says so
        far = SMALL_GENERATOR.window - 1
    same = torch.isclose(generator.predict(a, labels), generator.predict(b, labels), atol=1e-6)
    assert not same[0, 3 + far].all() and same[0, 3 + far + 1:].all() and same[0, :4].all()


def test_a_candidate_is_chosen_by_weight():
    taken = [int(choice(torch.tensor([0.0, math.log(3), -50]), seed, 2)) for seed in range(2000)]
    assert abs(np.mean(taken) - 0.75) < 0.04 and 2 not in taken
    assert choice(torch.zeros(4), 1, 2) == choice(torch.zeros(4), 1, 2)


def test_fits_are_reproducible_and_keep_the_rest(model, drawn):
    columns = [3, 4, 9]
    a, b = (resample(model, drawn, columns, [7, 8], HOW, fit=5) for _ in range(2))
    assert torch.equal(a.tokens, b.tokens) and (a.tokens[0] != a.tokens[1]).any()
    kept = [i for i in range(16) if i not in columns]
    assert torch.equal(a.tokens[:, kept], drawn.tokens[:, kept].expand(2, -1, -1))
    assert a.seeds[:, columns].tolist() == [[7] * 3, [8] * 3] and a.tokens.isfinite().all()
    alone = resample(model, drawn, columns, [8], HOW, fit=5)
    assert torch.equal(alone.tokens[0], a.tokens[1])
    last = resample(model, drawn, [15], [7], HOW, fit=5)  # nothing follows
    assert torch.equal(last.tokens, resample(model, drawn, [15], [7], HOW).tokens)


def test_a_long_gap_differs_at_its_end_only(model, drawn):
    one, chosen = (resample(model, drawn, range(2, 10), [7], HOW, fit=k).tokens[0]
                   for k in (1, 9))
    assert torch.equal(one[:6], chosen[:6]) and (one[6:10] != chosen[6:10]).any(1).all()


def test_a_better_fit_is_found(model, drawn):
    """The kept side is more likely, the more candidates there are."""
    def likelihood(picture):
        z = model.generator.predict(picture.tokens, picture.labels[:, 0])
        return sum(float(log_likelihoods(model.generator.head, z[:, j], picture.tokens[0, j], 99, j))
                   for j in range(6, 10))

    one, many = ([likelihood(resample(model, drawn, [5], [seed], HOW, fit=k)) for seed in range(9)]
                 for k in (1, 12))
    assert np.mean(many) > np.mean(one)


def test_a_ring_keeps_the_picture_and_looks_at_its_beginning(model, drawn):
    ring = extend(model, drawn, 3, [7], HOW, fit=4, ring=True)
    assert torch.equal(ring.tokens[:, :16], drawn.tokens) and ring.tokens.shape[1] == 19
    strip = torch.cat((drawn.tokens, torch.full((1, 2, 6), torch.nan), drawn.tokens[:, :4]), 1)
    found = []
    for n, is_ring in ((18, True), (22, False)):  # its beginning follows it in either
        tokens, labels = strip[:, :n].clone(), torch.zeros(n, dtype=torch.long)
        [*fill_gap(model, tokens, labels, range(16, 18), [3], HOW, 4, is_ring)]
        found.append(tokens[:, :18])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fit", (1, 3))
def test_columns_of_a_ring_see_both_sides_of_its_ends(model, drawn, fit):
    """Drawn again across the ends, they are what is drawn at the end of the turned picture."""
    found = resample(model, drawn, [0, 1, 14, 15], [7], HOW, [(1, 1), (2, 3)], fit=fit, ring=True)
    turned = Tokens(*(x.roll(-2, 1) for x in (drawn.tokens, drawn.labels, drawn.seeds)))
    expected = resample(model, turned, range(12, 16), [7], HOW,
                        [(0, 12), (2, 2), (1, 1), (2, 1)], fit=fit, ring=True)
    for x, y in zip((found.tokens, found.labels, found.seeds),
                    (expected.tokens, expected.labels, expected.seeds)):
        assert torch.equal(x, y.roll(2, 1))
    assert torch.equal(found.tokens[:, 2:14], drawn.tokens[:, 2:14])
    for columns in ([3, 5], range(16)):
        with pytest.raises(UserError, match="neighbouring columns of a ring, such as 5,6 or 14-15"):
            resample(model, drawn, columns, [7], HOW, ring=True)


def test_a_ring_is_decoded_around_its_ends(model, drawn):
    assert decode_ring(model, drawn.tokens).shape == (1, 3, 32, 64)
    local = SimpleNamespace(columns=8, tokenizer=SimpleNamespace(config=SimpleNamespace(f=1)))
    tokens = torch.arange(24.0).reshape(1, 24, 1)

    def blurred(x):  # over three columns
        padded = torch.nn.functional.pad(x.transpose(1, 2), (1, 1), "replicate")
        return torch.nn.functional.avg_pool1d(padded, 3, 1)[:, :, None]

    around = torch.cat((tokens[:, -1:], tokens, tokens[:, :1]), 1)
    torch.testing.assert_close(decode_ring(local, tokens, blurred), blurred(around)[..., 1:-1])
    drifts = decode_ring(local, tokens, lambda x: torch.arange(x.shape[1] * 1.0).expand(1, 3, 1, -1))
    assert abs(drifts[0, 0, 0, 0] - drifts[0, 0, 0, -1]) < 2 and drifts[0, 0, 0, 8] == 16
    kept, new = torch.zeros(1, 3, 2, 24), torch.ones(1, 3, 2, 24)
    row = paste(kept, new, torch.arange(12) == 11, 2, fade=1, ring=True)[0, 0, 0]
    assert row[22:].eq(1).all() and 0 < row[0] < 1 and row[2:20].eq(0).all()


def test_the_picture_in_a_mirror(model, drawn):
    pixels = model.decode(drawn.tokens)
    seen = mirror(model, drawn, pixels)
    assert seen.labels.tolist() == [[2] * 4 + [0] * 12]
    encoded = model.tokenizer.normalize(model.tokenizer.encode(pixels.flip(3)))
    assert torch.equal(seen.tokens, encoded)
    assert extend(model, seen, 2, [1], HOW).labels[0, -2:].tolist() == [0, 0]
    model.mirrored = False
    with pytest.raises(UserError, match="without mirrored pictures"):
        mirror(model, drawn, pixels)
