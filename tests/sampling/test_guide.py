"""Guidance by another generator: the plain sampler's columns, wherever columns are drawn."""

import copy
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch

from equimini.sampler import (ColumnSampler, Guidance, column_noise, sample_plainly,
                              sample_tokens)
from equimini.sampling.commands import SampleConfig, resumed_scroll
from equimini.sampling.cuda_graphs import GraphedColumn, GraphedStep
from equimini.sampling.edit import Tokens, resample
from equimini.sampling.guide import Guide, GuidedSampler, GuidedStream
from equimini.sampling.image_generator import load_guide
from equimini.sampling.options import SamplingOptions
from equimini.sampling.packed_weights import packed
from equimini.sampling.scroll import load_state, scroll
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_content
from equimini.utils.errors import UserError
from tests.conftest import SMALL_GENERATOR, randomize, small_generator
from tests.sampling.test_packed_weights import rerun

OTHER = dict(layers=2, embed_dim=16, window=4, head_width=16, head_depth=1)  # sizes of its own
LABELS, SEEDS = torch.tensor([0, 2, 1]), [3, 4, 5]
HOW = SamplingOptions(cfg=2.0, cfg_schedule="constant", steps=2)


@torch.no_grad()
def plainly(generator, guide, labels, columns, seeds, cfg, schedule, steps):
    """`sample_plainly`, the guide drawing without a class."""
    tokens, zero = generator.no_class.new_zeros(len(labels), 0, 6), torch.zeros(len(labels))
    for i in range(columns):
        s = Guidance(cfg, schedule, columns).scale(i)
        padded = torch.cat((tokens, tokens.new_zeros(len(labels), 1, 6)), 1)
        z = generator.predict(padded, labels, zero.bool())[:, i]
        z_guide = guide.predict(padded, labels, zero == 0)[:, i]
        x = column_noise(seeds, i, 6).to(tokens)
        for k in range(steps, 0, -1):
            t = tokens.new_full((len(labels),), k / steps)
            cond, uncond = generator.head(x, t, z), guide.head(x, t, z_guide)
            x = x - (uncond + s * (cond - uncond)) / steps
        tokens = torch.cat((tokens, x[:, None]), 1)
    return tokens


@pytest.fixture
def guide():
    return small_generator(**OTHER)


@pytest.fixture
def guided(model, guide, tmp_path):
    """The model, its options with a guide, and the guide's file."""
    file = tmp_path / "guide.pt"
    model.tokenizer.set_statistics(0.1, 1.3)  # float16 holds neither
    checkpoint.save(file, "generator", {
        "config": {"model": asdict(replace(SMALL_GENERATOR, **OTHER))}, "ema": guide.state_dict(),
        "classes": model.classes, "tokenizer": tokenizer_content(model.tokenizer)})
    return model, replace(HOW, guide=str(file))


def stream_of(generator, guide, guidance, labels=LABELS, seeds=SEEDS, steps=3):
    sampler = GuidedSampler(ColumnSampler(generator.head, steps), ColumnSampler(guide.head, steps))
    return GuidedStream(Guide(guide, len(labels)), generator, labels, seeds, sampler, guidance)


def statistics(tokenizer):
    return tokenizer.latent_mean, tokenizer.latent_std


def columns_of(stream, n):
    return torch.stack([stream.draw() for _ in range(n)], 1)


@pytest.mark.parametrize("schedule", ("linear", "constant"))
def test_it_equals_the_plain_sampler(generator, guide, schedule):
    arguments = LABELS, 8, SEEDS, 2.5, schedule, 7
    truth = plainly(copy.deepcopy(generator).double(), copy.deepcopy(guide).double(), *arguments)
    slow = (plainly(generator, guide, *arguments) - truth).square().mean().sqrt()
    guidance = Guidance(2.5, schedule, 8)
    for one, other in ((generator, guide), (packed(generator), packed(guide))):
        drawn = columns_of(stream_of(one, other, guidance, steps=7), 8)
        assert (drawn - truth).square().mean().sqrt() <= 4 * slow < 1e-4
    alone = sample_plainly(generator, *arguments)
    assert (alone - truth).square().mean().sqrt() > 0.1


def test_by_itself_it_is_plain_guidance(generator):
    drawn = columns_of(stream_of(generator, generator, Guidance(2.0, "linear", 6), steps=4), 6)
    torch.testing.assert_close(drawn, sample_tokens(generator, LABELS, 6, SEEDS, cfg=2.0, steps=4),
                               rtol=1e-4, atol=1e-4)


def test_given_columns_and_states_leave_the_same_to_the_last_bit(generator, guide):
    guidance = Guidance(2.0, "constant")
    whole = columns_of(stream_of(generator, guide, guidance), 12)
    stream, resumed = (stream_of(generator, guide, guidance) for _ in range(2))
    for i in range(7):
        stream.feed(whole[:, i])
    resumed.load_state(copy.deepcopy(stream.state()))
    for one in (stream, resumed):
        assert torch.equal(columns_of(one, 5), whole[:, 7:])


def test_pictures_scrolls_and_edits_are_guided(guided, guide, tmp_path):
    model, how = guided
    labels = torch.tensor([0] * 20 + [2] * 20)
    whole = torch.stack(list(model.draw(labels[None], [7], how)), 1)
    by_hand = plainly(model.generator, guide, labels[:1], 8, [7], 2.0, "constant", 2)
    torch.testing.assert_close(whole[:, :8], by_hand, rtol=1e-4, atol=1e-4)  # then positions hold
    one = replace(how, cfg=1.0)
    assert torch.equal(model.sample(["cat"], options=one),
                       model.sample(["cat"], options=replace(HOW, cfg=1.0)))
    drawn = Tokens(whole, labels[None], torch.full((1, 40), 7))
    again = resample(model, drawn, range(25, 40), [7], how)  # from what it sees alone
    torch.testing.assert_close(again.tokens, whole, rtol=1e-4, atol=1e-4)
    fitted = resample(model, drawn, [5], [8], how, fit=3).tokens
    assert fitted.isfinite().all() and not torch.equal(fitted[:, 5], whole[:, 5])

    for name in "ab":
        (tmp_path / name).mkdir()
    scroll(model, labels, 7, tmp_path / "a", how, tile=8)
    scroll(model, labels, 7, tmp_path / "b", how, tile=8, stop=iter([False] * 9 + [True]).__next__)
    state = load_state(tmp_path / "b")
    scroll(model, labels, 7, tmp_path / "b", how, tile=8, resumed=state)
    tiles = sorted((tmp_path / "a").glob("tile-*.png"))
    assert len(tiles) == 5
    for tile in tiles:
        assert tile.read_bytes() == (tmp_path / "b" / tile.name).read_bytes()
    with pytest.raises(UserError, match="other weights"):
        scroll(model, labels, 7, tmp_path / "b", HOW, tile=8, resumed=state)
    model.guides[how.guide].generator.no_class.data += 1
    with pytest.raises(UserError, match="other weights"):
        scroll(model, labels, 7, tmp_path / "b", how, tile=8, resumed=state)


@torch.no_grad()
def test_static_buffers_draw_the_same_columns(generator, guide):
    """What CUDA graphs replay, called over the same buffers without a graph."""
    drawn = []
    for wrap in (False, True):
        sampler = GuidedSampler(ColumnSampler(generator.head, 3), ColumnSampler(guide.head, 3))
        steps = [GraphedStep(g, 4, rerun) if wrap else None for g in (generator, guide)]
        stream = GuidedStream(Guide(guide, 3, 4, steps[1]), generator, LABELS, SEEDS,
                              GraphedColumn(sampler, rerun) if wrap else sampler, Guidance(2.0), 4,
                              steps[0])
        drawn.append(columns_of(stream, 8))
    assert all(step.call.buffers for step in steps)
    torch.testing.assert_close(*drawn)


def test_a_scroll_finds_its_guide_in_another_place(guided, tmp_path):
    model, how = guided
    scroll(model, torch.zeros(4, dtype=torch.int64), 7, tmp_path, how, tile=8,
           settings=asdict(SampleConfig(scroll=4)) | asdict(how))
    _, options, _ = resumed_scroll(tmp_path, Namespace(guide="moved.pt"))
    assert options == replace(how, guide="moved.pt")


def test_guides_that_do_not_serve(guided, tmp_path):
    model, how = guided
    assert model.guide(how.guide) is model.guide(how.guide)
    model.tokenizer.set_statistics(*(x.half() for x in statistics(model.tokenizer)))
    load_guide(how.guide, model.tokenizer)  # a packed generator, a guide that is not
    model.tokenizer.set_statistics(0.5, 2.5)
    with pytest.raises(UserError, match="another tokenizer's tokens"):
        load_guide(how.guide, model.tokenizer)
    with pytest.raises(UserError, match="no checkpoint nowhere.pt"):
        model.sample(["cat"], guide="nowhere.pt")
    head = randomize(small_generator(objective="mean-flow")).head
    with pytest.raises(UserError, match="what its head was trained with"):
        SamplingOptions(guide="x.pt").resolved(head)
