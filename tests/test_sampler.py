"""Euler steps, guidance, seeds, prefixes."""

import pytest
import torch

from equimini.sampler import (column_noise, euler, guidance_scale, guided, sample_columns,
                              sample_tokens)

LABELS = torch.tensor([0, 2, 1])
SEEDS = [3, 4, 5]


def literal(generator, labels, columns, seeds, cfg, schedule, steps):
    """The sampler without any cache: every column re-runs the transformer over all columns."""
    x = torch.zeros(len(labels), 0, generator.channels)
    none = torch.ones(len(labels), dtype=torch.bool)
    for i in range(columns):
        s = guidance_scale(i, columns, cfg, schedule)
        padded = torch.cat((x, torch.zeros(len(labels), 1, generator.channels)), 1)
        z_cond = generator.predict(padded, labels)[:, i]
        z_null = generator.predict(padded, labels, none)[:, i]
        eps = column_noise(seeds, i, generator.channels)
        for k in range(steps):
            t = torch.full((len(labels),), 1 - k / steps)
            v, v0 = generator.head(eps, t, z_cond), generator.head(eps, t, z_null)
            eps = eps - (v0 + s * (v - v0)) / steps
        x = torch.cat((x, eps[:, None]), 1)
    return x


@pytest.mark.parametrize("schedule", ("linear", "constant"))
@torch.no_grad()
def test_cached_sampler_equals_the_literal_one(generator, schedule):
    drawn = sample_tokens(generator, LABELS, 8, SEEDS, cfg=2.5, schedule=schedule, steps=7)
    slow = literal(generator, LABELS, 8, SEEDS, 2.5, schedule, 7)
    torch.testing.assert_close(drawn, slow, rtol=1e-4, atol=1e-4)


def test_euler_on_known_fields():
    x = torch.tensor([3.0, -1.0], dtype=torch.float64)
    constant = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(euler(lambda x, t: constant, x, 10), x - constant)
    times = []
    euler(lambda x, t: times.append(t) or x, x, 4)
    assert times == [1.0, 0.75, 0.5, 0.25]
    # dx/dt = x has the solution x(0) = x(1)/e; Euler's is x(1)·(1 − 1/n)^n
    torch.testing.assert_close(euler(lambda x, t: x, x, 50), x * (1 - 1 / 50) ** 50)


def test_euler_carries_noise_to_the_data_when_the_velocity_is_exact():
    """One data point x*: v = (x_t − x*)/t, and any number of steps ends on x*."""
    star, eps = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(euler(lambda x, t: (x - star) / t, eps, 9), star)


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
    inner = generator.head.forward
    generator.head.forward = lambda x, t, z: calls.append(len(x)) or inner(x, t, z)
    drawn = sample_tokens(generator, LABELS, 5, SEEDS, cfg=1.0, steps=3)
    assert set(calls) == {3}  # the null branch did not run
    with torch.no_grad():
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
    (dict(labels=torch.tensor([0, 1, 3])), "labels"), (dict(steps=0), "steps")))
def test_bad_arguments_are_named(generator, change, name):
    arguments = dict(labels=LABELS, columns=4, seeds=SEEDS) | change
    with pytest.raises(ValueError, match=name):
        next(sample_columns(generator, **arguments))
