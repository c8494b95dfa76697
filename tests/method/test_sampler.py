"""Drawing columns: against the literal sampler, guidance, seeds, prefixes."""

import copy
import inspect

import pytest
import torch

from equimini import sampler
from equimini.bench.sample import literal
from equimini.sampler import (ColumnSampler, SamplerState, column_noise, guidance_scale, guided,
                              sample_columns, sample_tokens)
from equimini.sampling.packed_weights import prepared

LABELS = torch.tensor([0, 2, 1])
SEEDS = [3, 4, 5]


def errors(generator, drawn, *arguments):
    """RMS errors of `drawn` and of the literal float32 sampler, against the literal in float64."""
    truth = literal(copy.deepcopy(generator).double(), *arguments)
    slow = literal(generator, *arguments)
    return [(x - truth).square().mean().sqrt().item() for x in (drawn, slow)]


@pytest.mark.parametrize("schedule", ("linear", "constant"))
@pytest.mark.parametrize("rows", (1, 20, 256))  # one step at a time; three (not a divisor); all
def test_fast_sampler_equals_the_literal_one(generator, schedule, rows, monkeypatch):
    """It may err four times as much as the literal one, whose sums only have another order."""
    monkeypatch.setattr(sampler, "PRODUCT_ROWS", rows)
    for ready in (generator, prepared(generator)):
        drawn = sample_tokens(ready, LABELS, 8, SEEDS, cfg=2.5, schedule=schedule, steps=7)
        fast, slow = errors(generator, drawn, LABELS, 8, SEEDS, 2.5, schedule, 7)
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
    assert [guidance_scale(i, 4, 3.0) for i in range(4)] == [1.5, 2.0, 2.5, 3.0]
    assert [guidance_scale(i, 4, 3.0, "constant") for i in range(4)] == [3.0] * 4
    assert guidance_scale(2, 7, 1.0) == 1.0
    with pytest.raises(ValueError, match="schedule"):
        guidance_scale(0, 4, 3.0, "cosine")


def test_guided_velocity_endpoints():
    v = torch.randn(6, 5)
    torch.testing.assert_close(guided(v, 1.0), v[:3])
    assert torch.equal(guided(v, 0.0), v[3:])


def test_scale_one_is_exactly_the_conditional_branch(generator):
    calls = []
    inner = generator.head.velocity
    generator.head.velocity = lambda x, m: calls.append(len(x)) or inner(x, m)
    drawn = sample_tokens(generator, LABELS, 5, SEEDS, cfg=1.0, steps=3)
    assert calls == [3] * 15  # the null branch did not run
    slow = literal(generator, LABELS, 5, SEEDS, 1.0, "constant", 3)
    torch.testing.assert_close(drawn, slow, rtol=1e-4, atol=1e-4)


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


def test_a_prefix_is_continued_as_if_it_had_been_drawn(generator):
    options = dict(cfg=2.0, steps=4)
    whole = sample_tokens(generator, LABELS, 9, SEEDS, **options)
    rest = sample_tokens(generator, LABELS, 9, SEEDS, prefix=whole[:, :5], **options)
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)
    assert len(list(sample_columns(generator, LABELS, 9, SEEDS, prefix=whole[:, :5]))) == 4


def test_guidance_reaches_its_full_scale_and_stays(generator):
    assert [guidance_scale(i, 2, 3.0) for i in range(4)] == [2.0, 3.0, 3.0, 3.0]
    long = sample_tokens(generator, LABELS, 9, SEEDS, cfg=2.0, steps=3, guidance_columns=4)
    other = sample_tokens(generator, LABELS, 6, SEEDS, cfg=2.0, steps=3, guidance_columns=4)
    assert torch.equal(long[:, :6], other)  # the length plays no part


def test_columns_are_drawn_under_their_own_class(generator):
    options = dict(cfg=2.0, schedule="constant", steps=3)
    plain = sample_tokens(generator, LABELS, 8, SEEDS, **options)
    classes = LABELS[:, None].repeat(1, 8)
    assert torch.equal(sample_tokens(generator, classes, 8, SEEDS, **options), plain)
    classes[:, 5:] = (LABELS[:, None] + 1) % 3
    turned = sample_tokens(generator, classes, 8, SEEDS, **options)
    assert torch.equal(turned[:, :5], plain[:, :5])
    assert (turned[:, 5] != plain[:, 5]).any(-1).all()
    # z of the turning column is that of the new class over the old class's past
    with torch.no_grad():
        cache, contexts = [], [generator.encode_classes(c) for c in (LABELS, (LABELS + 1) % 3)]
        for i in range(4):
            generator(plain[:, i:i + 1], contexts[0], i, cache)
        z = generator(plain[:, 4:5], contexts[1], 4, cache)[:, 0]
    one = sample_tokens(generator, classes, 8, SEEDS, cfg=1.0, steps=3, prefix=plain[:, :5])
    draw = ColumnSampler(generator.head, steps=3)
    with torch.no_grad():
        expected = draw(z, column_noise(SEEDS, 5, generator.channels), 1.0)
    torch.testing.assert_close(one[:, 5], expected)


def test_a_given_column_and_a_drawn_one_leave_the_same_to_the_last_bit(generator):
    options = dict(cfg=2.0, steps=4)
    whole = sample_tokens(generator, LABELS, 9, SEEDS, **options)
    rest = sample_tokens(generator, LABELS, 9, SEEDS, prefix=whole[:, :5], **options)
    assert torch.equal(rest, whole)
    again = sample_tokens(generator, LABELS, 9, SEEDS, prefix=whole, redraw=[3, 4], **options)
    assert torch.equal(again, whole)


def test_columns_drawn_again_leave_the_others_alone(generator):
    options = dict(cfg=2.0, steps=4)
    whole = sample_tokens(generator, LABELS, 9, SEEDS, **options)
    new = [seed + 10 for seed in SEEDS]
    kept = sample_tokens(generator, LABELS, 9, new, prefix=whole, redraw=[3, 4], **options)
    same = [(kept[:, i] == whole[:, i]).all().item() for i in range(9)]
    assert same == [i not in (3, 4) for i in range(9)]
    later = sample_tokens(generator, LABELS, 9, new, prefix=whole, redraw=range(3, 9), **options)
    assert torch.equal(later[:, :5], kept[:, :5]) and (later[:, 5:] != whole[:, 5:]).any()
    assert len(list(sample_columns(generator, LABELS, 9, new, prefix=whole, redraw=[4]))) == 1


def test_a_saved_state_goes_on_to_the_last_bit_and_does_not_grow(generator):
    options = dict(cfg=2.0, schedule="constant", steps=3)
    whole = sample_tokens(generator, LABELS, 12, SEEDS, **options)
    state, sizes = SamplerState(), []
    for _ in sample_columns(generator, LABELS, 12, SEEDS, state=state, **options):
        sizes.append(sum(x.numel() for pair in state.cache for x in pair))
        if state.column == 7:
            kept = copy.deepcopy(state)
    assert sizes[3:] == sizes[3:4] * 9
    rest = list(sample_columns(generator, LABELS, 12, SEEDS, state=kept, **options))
    assert torch.equal(torch.stack(rest, 1), whole[:, 7:])


def test_temperature_scales_the_noise(generator):
    """Column 0, whose z does not depend on noise, is the one drawn from scaled noise."""
    options = {"solver": "midpoint", "steps": 3}
    noise = column_noise(SEEDS, 0, generator.channels)
    z = generator.encode_classes(LABELS).z0[:, 0]
    with torch.no_grad():
        expected = ColumnSampler(generator.head, **options)(z, 0.9 * noise, 1.0)
    drawn = sample_tokens(generator, LABELS, 4, SEEDS, cfg=1.0, temperature=0.9, **options)
    plain = sample_tokens(generator, LABELS, 4, SEEDS, cfg=1.0, **options)
    assert torch.equal(drawn[:, 0], expected) and not torch.equal(drawn[:, 0], plain[:, 0])


def test_held_positions(generator):
    free = sample_tokens(generator, LABELS, 10, SEEDS, cfg=1.0, steps=3)
    held = sample_tokens(generator, LABELS, 10, SEEDS, cfg=1.0, steps=3, hold=4)
    # column i follows from the token at position i − 1: 5 is the last one with a position up to 4
    assert torch.equal(held[:, :6], free[:, :6]) and (held[:, 6] != free[:, 6]).any()
    with torch.no_grad():  # beyond the limit, no place can be told from another
        tokens, context = torch.randn(3, 6, generator.channels), generator.encode_classes(LABELS)
        near, far = (generator(tokens, context, p, hold=4) for p in (20, 10_000))
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
        assert (generator(tokens, context, 20) - generator(tokens, context, 30)).abs().max() > 1e-3


@pytest.mark.parametrize("change, name", (
    (dict(seeds=[1, 2]), "seeds"), (dict(seeds=[1, 2, -1]), "seeds"), (dict(columns=0), "columns"),
    (dict(labels=torch.tensor([0, 1, 3])), "labels"), (dict(steps=0), "steps"),
    (dict(solver="rk4"), "solver must be one of euler, midpoint, heun"),
    (dict(time_shift=0.0), "time_shift"), (dict(temperature=-1.0), "temperature"),
    (dict(cuda_graphs=True), "cuda_graphs")))
def test_bad_arguments_are_named(generator, change, name):
    arguments = dict(labels=LABELS, columns=4, seeds=SEEDS) | change
    with pytest.raises(ValueError, match=name):
        next(sample_columns(generator, **arguments))
