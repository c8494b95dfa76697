"""Drawing columns: against the plain sampler, guidance, seeds, given columns, swapped parts."""

import copy
import inspect

import pytest
import torch

from equimini import sampler
from equimini.sampler import (ColumnSampler, Guidance, Solver, Stream, column_noise, sample_columns,
                              sample_plainly, sample_tokens)
from equimini.sampling.packed_weights import packed
from tests.conftest import small_generator

LABELS = torch.tensor([0, 2, 1])
SEEDS = [3, 4, 5]


@pytest.fixture
def real():
    return small_generator(real_equivariant=True)


@pytest.mark.parametrize("schedule", ("linear", "constant"))
@pytest.mark.parametrize("rows", (1, 20, 256))  # one step at a time; three (not a divisor); all
def test_fast_sampler_equals_the_plain_one(generator, real, schedule, rows, monkeypatch):
    """It may err four times as much as the plain one, whose sums only have another order."""
    monkeypatch.setattr(sampler, "PRODUCT_ROWS", rows)
    for plain, ready in ((generator, generator), (generator, packed(generator)), (real, real)):
        arguments = LABELS, 8, SEEDS, 2.5, schedule, 7
        truth = sample_plainly(copy.deepcopy(plain).double(), *arguments)
        drawn = sample_tokens(ready, LABELS, 8, SEEDS, cfg=2.5, schedule=schedule, steps=7)
        fast, slow = ((x - truth).square().mean().sqrt().item()
                      for x in (drawn, sample_plainly(plain, *arguments)))
        assert fast <= 4 * slow < 1e-4


def test_modulations_are_computed_once_per_time(generator, monkeypatch):
    """12 rows a product, 6 rows a step: two times in each, whatever the solver asks."""
    monkeypatch.setattr(sampler, "PRODUCT_ROWS", 12)
    asked, inner = [], generator.head.modulations
    generator.head.modulations = lambda time, z: asked.append(len(time)) or inner(time, z)
    for solver, times in (("euler", 5), ("midpoint", 10), ("heun", 6)):
        asked.clear()
        sample_tokens(generator, LABELS, 1, SEEDS, cfg=2.0, steps=5, solver=solver)
        assert sum(asked) == times and max(asked) == 2
    at = ColumnSampler(generator.head, 5).modulations(torch.zeros(6, 32))
    for t in (1.0, 0.8, 0.6, 0.4):
        at(t)
        assert len(inspect.getclosurevars(at).nonlocals["ready"]) <= 2  # memory is bounded


def test_guidance_schedules():
    assert [Guidance(3.0, "linear", 4).scale(i) for i in range(6)] == [1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert [Guidance(3.0, "constant", 4).scale(i) for i in range(4)] == [3.0] * 4
    assert Guidance(1.0, "linear", 7).scale(2) == 1.0
    with pytest.raises(ValueError, match="schedule"):
        Guidance(3.0, "cosine")


def test_scale_one_is_exactly_the_conditional_branch(generator):
    calls = []
    inner = generator.head.velocity
    generator.head.velocity = lambda x, m: calls.append(len(x)) or inner(x, m)
    drawn = sample_tokens(generator, LABELS, 5, SEEDS, cfg=1.0, steps=3)
    assert calls == [3] * 15  # the null branch did not run
    slow = sample_plainly(generator, LABELS, 5, SEEDS, 1.0, "constant", 3)
    torch.testing.assert_close(drawn, slow, rtol=1e-4, atol=1e-4)


def test_every_column_of_every_seed_has_noise_of_its_own():
    rows = torch.cat([column_noise(SEEDS, i, 6) for i in range(4)])
    assert len(rows.unique(dim=0)) == 4 * len(SEEDS)
    assert torch.equal(column_noise([SEEDS[1]], 3, 6), rows[10:11])


def test_an_image_does_not_depend_on_its_batch(generator):
    together = sample_tokens(generator, LABELS, 5, SEEDS, cfg=2.0, steps=5)
    for i in range(3):
        alone = sample_tokens(generator, LABELS[i:i + 1], 5, SEEDS[i:i + 1], cfg=2.0, steps=5)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


def test_a_longer_image_begins_with_the_shorter_one_under_constant_guidance(generator):
    options = dict(cfg=2.0, schedule="constant", steps=4)
    short = sample_tokens(generator, LABELS, 4, SEEDS, **options)
    long = sample_tokens(generator, LABELS, 11, SEEDS, **options)
    torch.testing.assert_close(long[:, :4], short)


def fill(generator, given, columns, seeds=SEEDS, draw=(), guidance=Guidance(2.0, "linear", 9),
         steps=4, **options):
    """`given` (B, P, C) fed into a stream, but for the columns in `draw`; then up to `columns`."""
    stream = Stream(generator, LABELS, seeds, ColumnSampler(generator.head, steps), guidance,
                    **options)
    for i in range(columns):
        if i < given.shape[1] and i not in draw:
            stream.feed(given[:, i])
            yield given[:, i]
        else:
            yield stream.draw()


def filled(*arguments, **options):
    return torch.stack(list(fill(*arguments, **options)), 1)


def test_columns_are_drawn_under_their_own_class(generator):
    plain = sample_tokens(generator, LABELS, 8, SEEDS, steps=3)
    classes, others = LABELS[:, None].repeat(1, 8), (LABELS + 1) % 3
    assert torch.equal(sample_tokens(generator, classes, 8, SEEDS, steps=3), plain)
    classes[:, 5:] = others[:, None]
    turned = sample_tokens(generator, classes, 8, SEEDS, steps=3)
    assert torch.equal(turned[:, :5], plain[:, :5])
    with torch.no_grad():  # the turning column's z is that of the new class over the old one's past
        cache, context = [], generator.encode_classes(LABELS)
        for i in range(4):
            generator(plain[:, i:i + 1], context, i, cache)
        z = generator(plain[:, 4:5], generator.encode_classes(others), 4, cache)[:, 0]
        expected = ColumnSampler(generator.head, 3)(z, column_noise(SEEDS, 5, 6), 1.0)
    torch.testing.assert_close(turned[:, 5], expected)
    assert (turned[:, 5] != plain[:, 5]).any(-1).all()


def test_a_given_column_and_a_drawn_one_leave_the_same_to_the_last_bit(generator, real):
    for model in (generator, real):
        whole = sample_tokens(model, LABELS, 9, SEEDS, cfg=2.0, steps=4)
        assert torch.equal(filled(model, whole[:, :5], 9), whole)
        assert torch.equal(filled(model, whole, 9, draw=[3, 4]), whole)


def test_columns_drawn_again_leave_the_others_alone(generator):
    whole = sample_tokens(generator, LABELS, 9, SEEDS, cfg=2.0, steps=4)
    new = [seed + 10 for seed in SEEDS]
    kept = filled(generator, whole, 9, new, draw=[3, 4])
    same = [(kept[:, i] == whole[:, i]).all().item() for i in range(9)]
    assert same == [i not in (3, 4) for i in range(9)]
    later = filled(generator, whole, 9, new, draw=range(3, 9))
    assert torch.equal(later[:, :5], kept[:, :5]) and (later[:, 5:] != whole[:, 5:]).any()


def test_a_saved_state_is_continued_to_the_last_bit_and_does_not_grow(generator):
    def begin():
        return Stream(generator, LABELS, SEEDS, ColumnSampler(generator.head, 3),
                      Guidance(2.0, "constant"))
    whole = sample_tokens(generator, LABELS, 12, SEEDS, cfg=2.0, schedule="constant", steps=3)
    stream, resumed, sizes = begin(), begin(), []
    while stream.column < 12:
        stream.draw()
        sizes.append(sum(x.numel() for pair in stream.cache for x in pair))
        if stream.column == 7:
            resumed.load_state(copy.deepcopy(stream.state()))
    assert sizes[3:] == sizes[3:4] * 9
    assert torch.equal(torch.stack([resumed.draw() for _ in range(5)], 1), whole[:, 7:])


class LinearHead(torch.nn.Module):
    """v = A·x + t·z: all that a head of one's own needs."""

    scales = None

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(6, 6, bias=False)

    def embed_time(self, t):
        return t[:, None]

    def modulations(self, time, z):
        return [(time * z[..., :6],)]

    def velocity(self, x, modulations):
        return self.a(x) + modulations[0][0]

    def pack(self, packer):
        packer.linears(self)


def test_another_head_and_another_solver(generator):
    """Swapped in: exact for v = t·z, as a step's integral of t is (t² − r²)/2 at the midpoint."""
    generator.head = LinearHead()
    torch.nn.init.zeros_(generator.head.a.weight)
    middle = Solver(lambda v, x, t, r: x + (r - t) * v(x, (t + r) / 2),
                    lambda t, r: ((t + r) / 2,))
    for model in (generator, packed(generator)):
        drawn = sample_tokens(model, LABELS, 4, SEEDS, steps=2, solver=middle)
        z = generator.encode_classes(LABELS).z0[:, 0, :6].detach()
        torch.testing.assert_close(drawn[:, 0], column_noise(SEEDS, 0, 6) - z / 2)


def test_temperature_scales_the_noise(generator):
    """Column 0, whose z does not depend on noise, is the one drawn from scaled noise."""
    options = {"solver": "midpoint", "steps": 3}
    z, noise = generator.encode_classes(LABELS).z0[:, 0], column_noise(SEEDS, 0, 6)
    with torch.no_grad():
        expected = ColumnSampler(generator.head, **options)(z, 0.9 * noise, 1.0)
    drawn, plain = (sample_tokens(generator, LABELS, 1, SEEDS, temperature=t, **options)[:, 0]
                    for t in (0.9, 1.0))
    assert torch.equal(drawn, expected) and not torch.equal(drawn, plain)


def test_held_positions(generator):
    free = sample_tokens(generator, LABELS, 10, SEEDS, cfg=1.0, steps=3)
    held = filled(generator, torch.zeros(3, 0, 6), 10, guidance=Guidance(), steps=3, max_position=4)
    # column i follows from the token at position i − 1: 5 is the last one with a position up to 4
    assert torch.equal(held[:, :6], free[:, :6]) and (held[:, 6] != free[:, 6]).any()
    with torch.no_grad():  # beyond the limit, no place can be told from another
        tokens, context = torch.randn(3, 6, generator.channels), generator.encode_classes(LABELS)
        near, far = (generator(tokens, context, p, max_position=4) for p in (20, 10_000))
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
        assert (generator(tokens, context, 20) - generator(tokens, context, 30)).abs().max() > 1e-3


@pytest.mark.parametrize("change, name", (
    (dict(seeds=[1, 2]), "seeds"), (dict(seeds=[1, 2, -1]), "seeds"),
    (dict(labels=torch.tensor([0, 1, 3])), "labels"), (dict(steps=0), "steps"),
    (dict(labels=torch.zeros(3, 5, dtype=torch.long)), "labels must be .B,. or .B, columns = 4"),
    (dict(solver="rk4"), "solver must be one of euler, midpoint, heun"),
    (dict(time_shift=0.0), "time_shift"), (dict(temperature=-1.0), "temperature")))
def test_bad_arguments_are_named(generator, change, name):
    arguments = dict(labels=LABELS, columns=4, seeds=SEEDS) | change
    with pytest.raises(ValueError, match=name):
        next(sample_columns(generator, **arguments))
