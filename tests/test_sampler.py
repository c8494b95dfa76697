"""Drawing columns: against the literal sampler, guidance, seeds, prefixes."""

import copy
import inspect

import pytest
import torch

from equimini import sampler
from equimini.bench.sample import literal
from equimini.inference import prepared
from equimini.sampler import (ColumnSampler, guidance_scale, guided, sample_columns,
                              sample_tokens)

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


@pytest.mark.parametrize("change, name", (
    (dict(seeds=[1, 2]), "seeds"), (dict(seeds=[1, 2, -1]), "seeds"), (dict(columns=0), "columns"),
    (dict(labels=torch.tensor([0, 1, 3])), "labels"), (dict(steps=0), "steps"),
    (dict(solver="rk4"), "solver must be one of euler, midpoint, heun"),
    (dict(time_shift=0.0), "time_shift"), (dict(cuda_graphs=True), "cuda_graphs")))
def test_bad_arguments_are_named(generator, change, name):
    arguments = dict(labels=LABELS, columns=4, seeds=SEEDS) | change
    with pytest.raises(ValueError, match=name):
        next(sample_columns(generator, **arguments))
