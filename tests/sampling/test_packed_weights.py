"""Generators packed for sampling: layouts of weights, bf16, static buffers."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from equimini import sampler
from equimini.generator import Generator
from equimini.sampler import ColumnSampler, column_noise, sample_tokens
from equimini.sampling import few_rows, packed_weights
from equimini.sampling.cuda_graphs import GraphedColumn, GraphedStep, StaticCall
from equimini.sampling.nodes import chebyshev
from equimini.sampling.options import SamplingOptions
from equimini.sampling.packed_weights import LastPacked, PackedLinear, packed

LABELS = torch.tensor([0, 2, 1])
SEEDS = [3, 4, 5]


@pytest.mark.parametrize("rows", (1, 2, 7, 300))
@pytest.mark.parametrize("onednn", (True, False))  # False: as on a GPU, or without oneDNN
@torch.no_grad()
def test_packed_linear(rows, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(packed_weights, "packs", lambda weight: False)
    linear, x = nn.Linear(37, 53), torch.randn(2, rows, 37)
    truth = (x.double() @ linear.weight.double().T + linear.bias.double())
    size = x.abs() @ linear.weight.abs().T + linear.bias.abs()  # of the terms that are summed
    for dtype, roundings in ((torch.float32, 39), (torch.bfloat16, 5)):
        y = PackedLinear(linear, dtype)(x)
        assert y.dtype == torch.float32
        # float32: 38 sums at worst, and the bias; bf16: x, w, bias, the result, and float32's sums
        unit = torch.finfo(dtype).eps / 2
        assert ((y - truth).abs() <= roundings * unit * size).all()


@torch.no_grad()
def test_a_packed_copy_leaves_the_original_alone(generator):
    before, names = copy.deepcopy(generator.state_dict()), str(generator)
    generator.train()
    ready = packed(generator)
    assert not ready.training and all(m.training for m in generator.modules())
    assert str(generator) == names
    assert isinstance(ready, Generator) and ready.no_class is generator.no_class
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="precision must be one of float32, bf16"):
        packed(generator, "fp8")


@torch.no_grad()
def test_a_packed_copy_is_kept_until_a_weight_changes(generator):
    keep = LastPacked()
    first = keep(generator, "float32")
    assert keep(generator, "float32") is first
    assert keep(generator, "bf16") is not first
    before = sample_tokens(keep(generator, "float32"), LABELS, 1, SEEDS, steps=1)
    generator.head.x_out.weight.mul_(2.0)
    after, plain = (sample_tokens(g, LABELS, 1, SEEDS, steps=1)
                    for g in (keep(generator, "float32"), generator))
    torch.testing.assert_close(after, plain)
    assert not torch.allclose(before, after, atol=0.1)


@pytest.mark.parametrize("precision", ("float32", "bf16"))
@pytest.mark.parametrize("write", ("fused AdamW", "data", "one bit"))
def test_weights_that_were_written_unseen_are_packed_again(generator, precision, write):
    """torch does not count these changes; a column is drawn from the new weights all the same."""
    keep, weight = LastPacked(), generator.head.x_out.weight
    keep(generator, precision)
    if write == "fused AdamW":
        optimizer = torch.optim.AdamW(generator.parameters(), lr=0.1, fused=True)
        generator.head.x_out(torch.ones(24)).sum().backward()
        optimizer.step()
    elif write == "data":
        weight.data.add_(0.1)
    else:
        weight.data.view(torch.int32)[0, 0] ^= 1
    after, fresh = (sample_tokens(g, LABELS, 1, SEEDS, steps=1)
                    for g in (keep(generator, precision), packed(generator, precision)))
    assert torch.equal(after, fresh)
    if write == "one bit":
        assert keep.copy is not keep(generator, "bf16" if precision == "float32" else "float32")


def test_a_model_that_has_sampled_is_copied_and_saved(model, tmp_path):
    before = model.sample([0], steps=1)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                 torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin.sample([0], steps=1), before)


@pytest.mark.parametrize("how", ("C++", "oneDNN", "plain"))
def test_bf16_deviates_as_bf16_should(generator, how, monkeypatch):
    """Unit roundoff 2⁻⁹ per product, carried through some 30 layers and 5 columns."""
    if how != "C++":
        monkeypatch.setattr(few_rows, "compiled", lambda: False)
    if how == "plain":
        monkeypatch.setattr(packed_weights, "packs", lambda weight: False)
    exact = sample_tokens(generator, LABELS, 5, SEEDS, cfg=2.0, steps=8)
    drawn = sample_tokens(packed(generator, "bf16"), LABELS, 5, SEEDS, cfg=2.0, steps=8)
    assert drawn.dtype == torch.float32
    deviation = (drawn - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 2**-12 < deviation < 30 * 2**-9


def rerun(function, buffers):
    """Stands in for a CUDA graph: replaying fills the same outputs from the same buffers."""
    outputs = function(*buffers)

    def replay():
        for kept, new in zip(outputs, function(*buffers)):
            kept.copy_(new)

    return replay, outputs


def test_static_calls_copy_in_and_out():
    call = StaticCall(lambda a, b: [a + b, a * b], rerun)
    x, y = torch.ones(3), torch.arange(3.0)
    total, product = call(x, y)
    kept = total.clone(), [b.data_ptr() for b in call.buffers]
    call(2 * x, y)
    assert torch.equal(total, kept[0]) and torch.equal(product, y)  # earlier results stay
    assert [b.data_ptr() for b in call.buffers] == kept[1]
    assert torch.equal(call(torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))


def test_graphs_are_kept_for_the_same_options_and_weights(generator):
    made, keep = iter(range(9)), LastPacked()

    def graphs(options):
        keep(generator, "float32")
        return keep.graphed(options, lambda: next(made))

    assert [graphs(options) for options in (1, 1, 2, 2)] == [0, 0, 1, 1]
    generator.no_class.data.add_(1)
    assert graphs(2) == 2


@torch.no_grad()
def test_static_buffers_draw_the_same_columns(generator):
    """What a CUDA graph replays, called over the same buffers without a graph."""
    plain_draw = ColumnSampler(generator.head, 4)
    steps = (functools.partial(generator, max_position=4), GraphedStep(generator, 4, rerun))
    draws = (plain_draw, GraphedColumn(plain_draw, rerun))
    labels = torch.tensor([0, 1, 0, 1])
    context = generator.encode_classes(labels, torch.tensor([False, False, True, True]))
    noise = torch.randn(7, 2, 6)
    drawn = []
    for step, draw in zip(steps, draws):
        z, cache, columns = context.z0, [], []
        for i in range(7):
            columns.append(draw(z[:, -1], noise[i], 1 + i / 5))
            z = step(columns[-1][:, None].repeat(2, 1, 1), context, i, cache)
        drawn.append(torch.stack(columns))
    assert steps[1].call.buffers  # they were in use
    torch.testing.assert_close(*drawn)


@torch.no_grad()
def test_nodes(generator, monkeypatch):
    """Interpolation is exact for polynomials, close for the head, and left out for few times."""
    times = torch.linspace(0, 1, 7, dtype=torch.float64)
    at, weights = chebyshev(times, 5)
    powers = torch.arange(5)
    torch.testing.assert_close(weights @ at[:, None] ** powers, times[:, None] ** powers)
    z, noise = torch.randn(6, generator.config.embed_dim), column_noise(SEEDS, 0, 6)
    monkeypatch.setattr(sampler, "PRODUCT_ROWS", 18)  # 3 times together
    options = functools.partial(SamplingOptions, solver="euler")
    for model in (generator, packed(generator)):
        exact, near, nearer, few, as_many = (
            options(steps=steps, nodes=n).column_sampler(model.head)(z, noise, 2.0) for steps, n in
            ((20, 0), (20, 4), (20, 16), (6, 0), (6, 6)))
        torch.testing.assert_close(nearer, exact, rtol=1e-4, atol=1e-5)
        assert torch.equal(few, as_many) and not torch.equal(exact, near)
