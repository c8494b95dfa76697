"""The transformer, its cache, and the flow-matching loss."""

import pytest
import torch

from equimini.flow_head import FlowHead, time_embedding
from equimini.generator import Generator, SelfAttention, flow_matching_loss
from equimini.rope import rope_tables
from equimini.training.generator_trainer import weight_decay_groups
from tests.conftest import SMALL_GENERATOR, randomize, small_generator

LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("changes, reach", (
    ({}, SMALL_GENERATOR.layers * (SMALL_GENERATOR.window - 1)), ({"window": 99}, 99),
    ({"real_equivariant": True}, SMALL_GENERATOR.window - 2)))  # however many the layers
def test_each_output_depends_on_exactly_its_receptive_field(changes, reach):
    """z_i sees columns i−1 back to i−1−reach: never itself or later ones, never beyond."""
    tokens = torch.randn(1, 12, 6, requires_grad=True)
    z = small_generator(**changes).predict(tokens, LABELS[:1])
    for i in range(12):
        grad, = torch.autograd.grad(z[0, i].square().sum(), tokens, retain_graph=True,
                                    allow_unused=i == 0)
        seen = set() if grad is None else set(grad[0].abs().sum(1).nonzero().flatten().tolist())
        assert seen == set(range(max(0, i - 1 - reach), i)), i


def test_self_attention_does_not_see_absolute_position_but_the_model_does(generator):
    attention = randomize(SelfAttention(SMALL_GENERATOR)).eval()
    x = torch.randn(2, 9, 32)
    here, there = (attention(x, rope_tables(torch.arange(p, p + 9), 16))[0] for p in (0, 500))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    tokens = torch.randn(2, 9, 6)
    moved = generator.predict(tokens, LABELS, shift=5)
    unmoved = generator.predict(tokens, LABELS)
    assert (moved - unmoved).abs().max() > 1e-3  # through cross-attention
    assert torch.equal(moved[:, 0], unmoved[:, 0])  # z_0 is of the class tokens, without place


@pytest.mark.parametrize("window, chunks", ((3, [1] * 9), (3, [4, 1, 1, 3]), (3, [9]),
                                            (1, [1] * 9)))
def test_cached_equals_uncached(window, chunks):
    generator, tokens = small_generator(window=window), torch.randn(2, 9, 6)
    context = generator.encode_classes(LABELS)
    cache, parts, start = [], [], 0
    for chunk in tokens.split(chunks, 1):
        parts.append(generator(chunk, context, start, cache))
        start += chunk.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1), generator(tokens, context), rtol=1e-4,
                               atol=1e-5)
    assert all(k.shape[1] == window - 1 for k, _ in cache)


def test_dropped_labels_share_one_vector_and_others_keep_their_class(generator):
    tokens = torch.randn(1, 4, 6).repeat(3, 1, 1)
    labels, drop = torch.tensor([0, 1, 1]), torch.tensor([True, True, False])
    z = generator.predict(tokens, labels, drop)
    torch.testing.assert_close(z[0], z[1])
    torch.testing.assert_close(z[2], generator.predict(tokens[:1], labels[1:2])[0])
    assert (z[1] - z[2]).abs().max() > 1e-3


def test_loss_is_the_squared_error_of_the_velocity_on_the_straight_path(generator):
    m, b, n, c = 5, 2, 7, 6
    tokens, eps, u = torch.randn(b, n, c), torch.randn(m, b, n, c), torch.rand(m, b, n)
    t = (u * (1 - 1e-5) + 1e-5)[..., None]
    seen = {}

    def head(x_t, t_, z):
        seen.update(x_t=x_t, t=t_, z=z)
        return eps - tokens + torch.tensor(0.5)  # off by one half in every channel

    generator.head.forward = head
    loss = flow_matching_loss(generator, tokens, LABELS, u, eps)
    torch.testing.assert_close(loss, torch.full((b, n), 0.25))
    torch.testing.assert_close(seen["x_t"], t * eps + (1 - t) * tokens)
    torch.testing.assert_close(seen["t"], t[..., 0])
    torch.testing.assert_close(seen["z"], generator.predict(tokens, LABELS))
    assert seen["t"].min() >= 1e-5


def test_time_embedding_is_of_t_itself_with_cosines_first():
    t = torch.tensor([0.0, 0.25])
    e = time_embedding(t)
    assert e.shape == (2, 256)
    assert e[0, :128].eq(1).all() and e[0, 128:].eq(0).all()
    torch.testing.assert_close(e[1, [0, 128]], torch.stack((t[1].cos(), t[1].sin())))
    last = torch.tensor(0.25 * 10000 ** (-127 / 128))
    torch.testing.assert_close(e[1, 255], last.sin())


def test_fresh_head_is_the_zero_velocity_and_learns():
    head = FlowHead(6, 16, 24, 2)
    x, t, z = torch.randn(4, 6), torch.rand(4), torch.randn(4, 16)
    assert head(x, t, z).eq(0).all()
    head(x, t, z).sub(1).square().mean().backward()
    assert head.x_out.bias.grad.abs().sum() > 0


def test_one_z_serves_many_draws(generator):
    x, t, z = torch.randn(4, 2, 3, 6), torch.rand(4, 2, 3), torch.randn(2, 3, 32)
    one_by_one = torch.stack([generator.head(x[i], t[i], z) for i in range(4)])
    torch.testing.assert_close(generator.head(x, t, z), one_by_one)


def test_weight_decay_spares_vectors_and_the_flow_head(generator):
    decayed, free = (g["params"] for g in weight_decay_groups(generator, 0.02))
    names = {id(p): name for name, p in generator.named_parameters()}
    assert {"class_table.weight", "no_class", "class_embed", "x_in.weight"} <= {
        names[id(p)] for p in decayed}
    assert all(p.dim() == 1 or names[id(p)].startswith("head.") for p in free)
    assert all(p.dim() > 1 and not names[id(p)].startswith("head.") for p in decayed)
    assert len(decayed) + len(free) == len(names)


def test_initial_values(generator):
    fresh = Generator(SMALL_GENERATOR, 1000, 6)
    assert fresh.class_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(m.bias.eq(0).all() for m in fresh.modules() if isinstance(m, torch.nn.Linear))
    bound = (6 / (32 + 128)) ** 0.5
    largest = fresh.blocks[0].mlp[0].weight.abs().max().item()
    assert 0.98 * bound < largest <= bound  # Xavier-uniform
    assert fresh.head.blocks[0].ada.weight.eq(0).all() and fresh.head.x_out.weight.eq(0).all()


def test_dropout_acts_in_training_only(no_dropout, generator):
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(no_dropout.train().predict(tokens, LABELS),
                               no_dropout.eval().predict(tokens, LABELS))
    assert not torch.equal(generator.train().predict(tokens, LABELS),
                           generator.predict(tokens, LABELS))


@torch.no_grad()
def test_each_image_may_have_a_shift_of_its_own(generator):
    """Only cross-attention is shown it: self-attention sees differences, which no shift changes."""
    tokens, labels = torch.randn(3, 7, 6), torch.tensor([0, 1, 2])
    shifts = torch.tensor([0, 5, 11])
    together = generator.predict(tokens, labels, shift=shifts)
    for i, shift in enumerate(shifts.tolist()):
        alone = generator.predict(tokens[i:i + 1], labels[i:i + 1], shift=shift)
        torch.testing.assert_close(together[i:i + 1], alone)
    assert not torch.allclose(together, generator.predict(tokens, labels), atol=1e-3)
