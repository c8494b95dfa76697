"""Average velocities: their start, ways along a flow, and a linear flow whose solution is known."""

import math

import pytest
import torch
from torch import nn

from equimini.flow_head import FlowHead
from equimini.mean_flow import INTERVALS, MeanFlowHead, follow, guided, mean_flow_errors, ways
from equimini.sampler import Guidance, column_noise, sample_tokens
from equimini.sampling.options import SamplingOptions
from equimini.sampling.packed_weights import packed
from equimini.utils.errors import UserError
from tests.conftest import small_generator

RATE = 1.5  # of the linear velocity field v = RATE·x: x_r = x_t·exp(−RATE·(t − r))


@pytest.fixture
def heads():
    """A flow head with no zero weights, and a head of average velocities that begins as it."""
    torch.manual_seed(0)
    flow, mean = FlowHead(8, 12, 16, 2), MeanFlowHead(8, 12, 16, 2)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    mean.load_state_dict(flow.state_dict(), strict=False)
    return flow, mean


def test_it_begins_as_the_flow_head_to_the_bit(heads):
    flow, mean = heads
    x, z, t = torch.randn(5, 8), torch.randn(5, 12), torch.rand(5)
    v = flow(x, t, z)
    assert torch.equal(mean(x, t, z), v) and v.abs().max() > 0.1
    assert torch.equal(mean(x, t, z, t * torch.rand(5), 1 + 4 * torch.rand(5)), v)
    mean.recompute = True
    assert torch.equal(mean(x, t, z, t, 3 * t), v)


@pytest.mark.parametrize("r", (-0.1, 0.6))
def test_r_outside_of_0_to_t_is_an_error(heads, r):
    with pytest.raises(ValueError, match=r"r must lie in \[0, t\]"):
        heads[1].embed_time(torch.tensor([0.5]), torch.tensor([r]))


def test_guidance_is_that_of_both_branches(heads):
    flow, _ = heads
    x, z, t = torch.randn(5, 8), torch.randn(2, 5, 12), torch.rand(5)
    s = torch.tensor([1.0, 2, 3, 4, 5])
    cond, uncond = flow(x, t, z[0]), flow(x, t, z[1])
    v = guided(flow(x, t, z), s)
    assert torch.allclose(v, uncond + s[:, None] * (cond - uncond), atol=1e-5)
    assert torch.allclose(v[0], cond[0], atol=1e-6)


def test_guiding_z_is_guidance_to_the_second_order_of_a_small_difference(heads):
    flow = heads[0].double()
    x, z, t = (torch.rand(k, dtype=torch.float64) for k in ((50, 8), (50, 12), (50,)))
    d, s, errors = torch.randn_like(z), torch.full((50,), 3.0), []
    for h in (0.02, 0.01):
        both = torch.stack((z + h * d, z))
        v = flow(x, t, guided(both, s))
        cond, uncond = flow(x, t, both)
        exact = uncond + s[:, None] * (cond - uncond)
        errors.append((v - exact).abs().max().item())
    assert 3 < errors[0] / errors[1] < 5


def test_ways_are_the_whole_one_and_any_other_and_velocities():
    a, b = ways(torch.rand(4001, 3), 5)
    assert a.shape == b.shape == (4001, 3) and (a <= b).all() and a.max() == 4 and b.max() == 5
    assert (a[0] == 0).all() and (b[0] == 5).all()
    kinds = torch.stack((a, b))[:, 1:].flatten(1).unique(dim=1, return_counts=True)[1]
    assert len(kinds) == 20 and kinds.min() > 450  # 600 expected, standard deviation 24
    a, b = ways(torch.full((2, 1), 1 - 2**-24), 5)  # the largest float32 that is drawn
    assert (a[1], b[1]) == (4, 5)


def test_following_a_linear_flow_is_of_second_order():
    x, errors = torch.ones(1, 1, dtype=torch.float64), []
    for n in (8, 16):
        times = torch.linspace(1, 0, n + 1, dtype=torch.float64)[:, None]
        points, velocities = follow(lambda x, t: RATE * x, x, times)
        assert torch.equal(velocities, RATE * points[:-1])
        errors.append((points[-1] - math.exp(-RATE)).abs().item())
    assert 3.5 < errors[0] / errors[1] < 4.5


class Linear(nn.Module):
    """u = x·p(r, t), p of degree 4 with trained coefficients: close to what a linear flow needs."""

    def __init__(self):
        super().__init__()
        self.powers = [(i, j) for i in range(5) for j in range(5 - i)]
        self.weights = nn.Parameter(torch.zeros(len(self.powers), dtype=torch.float64))

    def forward(self, x, t, z, r, s):
        p = torch.stack([t**i * r**j for i, j in self.powers], -1) @ self.weights
        return x * p[..., None]


def test_after_training_one_evaluation_solves_a_linear_flow():
    """And the average velocity fulfils MeanFlow's identity v = u + (t − r)·du/dt."""
    torch.manual_seed(0)
    student, (b, n, c) = Linear(), (40, 5, 3)
    z = torch.zeros(2, b, n, 1, dtype=torch.float64)
    u, more = (torch.rand(k, b, n, dtype=torch.float64) for k in (8, INTERVALS))
    eps = torch.randn(b, n, c, dtype=torch.float64)

    def teacher(x, t, z):
        return RATE * x

    def loss():
        return mean_flow_errors(student, [(teacher, z[0]), (teacher, z[1])], z, u, eps,
                                more)[0].mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    start = loss().item()
    optimizer.step(closure)
    assert start > 0.1 and loss().item() < 2e-5  # what the midpoint rule misses is 1e-5
    x, one = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    drawn = x - student(x, one, None, 0 * one, one)
    assert (drawn - math.exp(-RATE) * x).abs().max() < 0.01 * x.abs().max()

    t, r, v, h = 0.7 * one, 0.3 * one, RATE * x, 1e-5
    ahead, here, behind = (student(x + k * v, t + k, None, r, one) for k in (h, 0, -h))
    du = (ahead - behind) / (2 * h)
    assert (here + 0.4 * du - v).abs().max() < 0.05 * v.abs().max()


@torch.no_grad()
def test_a_generator_draws_columns_in_any_number_of_evaluations():
    """The steps are x ← x − (t − r)·u, of z at the column's guidance; packed as well."""
    generator = small_generator(objective="mean-flow")
    labels, seeds, head = torch.tensor([0, 2]), [5, 6], generator.head

    def context(tokens, i, s):
        cond, uncond = (generator.predict(tokens, labels, torch.tensor([drop, drop]))[:, i]
                        for drop in (False, True))
        return uncond + s * (cond - uncond)

    for steps in (1, 3):
        drawn = sample_tokens(generator, labels, 4, seeds, cfg=3.0, steps=steps, solver="mean-flow")
        s = Guidance(3.0, "linear", 4).scale(2)
        z, x, s = context(drawn, 2, s), column_noise(seeds, 2, 6), torch.full((2,), s)
        for t in torch.linspace(1, 0, steps + 1)[:-1].expand(2, -1).T:
            x = x - head(x, t, z, t - 1 / steps, s) / steps
        torch.testing.assert_close(drawn[:, 2], x, rtol=1e-4, atol=1e-5)
        again = sample_tokens(packed(generator), labels, 4, seeds, cfg=3.0, steps=steps,
                              solver="mean-flow")
        torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-5)
    plain = sample_tokens(generator, labels, 4, seeds, cfg=3.0, steps=2, solver="euler")
    z, x = context(plain, 3, 3.0), column_noise(seeds, 3, 6)
    for t in (torch.ones(2), torch.full((2,), 0.5)):
        x = x - head(x, t, z, None, torch.full((2,), 3.0)) / 2
    torch.testing.assert_close(plain[:, 3], x, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_the_head_is_said_in_one_sentence(heads):
    flow, mean = heads
    with pytest.raises(UserError, match="mean-flow needs a head of average velocities"):
        SamplingOptions(solver="mean-flow").resolved(flow)
    with pytest.raises(UserError, match="--cfg must be 1 to 5"):
        SamplingOptions(cfg=5.5).resolved(mean)
    with pytest.raises(UserError, match="--nodes is for solvers that follow velocities"):
        SamplingOptions(nodes=8).resolved(mean)
    found = [SamplingOptions().resolved(head) for head in heads]
    assert [(o.solver, o.steps) for o in found] == [("euler", 100), ("mean-flow", 1)]
    assert SamplingOptions(solver="midpoint", steps=7).resolved(mean).steps == 7
