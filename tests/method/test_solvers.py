"""The ODE solvers: known fields, orders of convergence, grids of times."""

import math
from itertools import pairwise

import pytest
import torch

from equimini.flow_head import FlowHead
from equimini.sampler import SOLVERS, euler, evaluation_times, time_grid
from tests.conftest import randomize


def along(step, velocity, x, times):
    for t, r in pairwise(times):
        x = step(velocity, x, t, r)
    return x


def test_euler_on_known_fields():
    x = torch.tensor([3.0, -1.0], dtype=torch.float64)
    constant = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(along(euler, lambda x, t: constant, x, time_grid(10)), x - constant)
    # dx/dt = x has the solution x(0) = x(1)/e; Euler's is x(1)·(1 − 1/n)^n
    torch.testing.assert_close(along(euler, lambda x, t: x, x, time_grid(50)), x * 0.98 ** 50)


def test_euler_carries_noise_to_the_data_when_the_velocity_is_exact():
    """One data point x*: v = (x_t − x*)/t, and any number of steps ends on x*."""
    star, eps = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for shift in (1.0, 3.0):
        ends = along(euler, lambda x, t: (x - star) / t, eps, time_grid(9, shift))
        torch.testing.assert_close(ends, star)


@pytest.mark.parametrize("shift", (1.0, 2.5))
@pytest.mark.parametrize("solver, order", (("euler", 1), ("midpoint", 2), ("heun", 2)))
def test_order_of_convergence(solver, order, shift):
    """Twice the steps, 2^order times smaller an error; here x(t) = 1/(2 + sin 5t)."""
    def field(x, t):
        return -5 * math.cos(5 * t) * x * x

    coarse, fine = (abs(along(SOLVERS[solver].step, field, 1 / (2 + math.sin(5)),
                              time_grid(n, shift)) - 0.5) for n in (512, 1024))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_time_grids():
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(4, 3.0)  # 3t/(1 + 2t)
    assert shifted[0] == 1 and shifted[-1] == 0
    assert shifted[1:4] == pytest.approx([0.9, 0.75, 0.5])
    for shift in (0.1, 0.3, 7.0):
        grid = time_grid(30, shift)
        assert grid[0] == 1 and grid[-1] == 0 and grid == sorted(set(grid), reverse=True)
    for steps, shift, name in ((0, 1.0, "steps"), (5, 0.0, "time_shift"), (5, -1.0, "time_shift"),
                               (5, math.inf, "time_shift"), (5, math.nan, "time_shift")):
        with pytest.raises(ValueError, match=name):
            time_grid(steps, shift)


def test_evaluations_are_counted_and_in_order():
    grid = time_grid(4)
    assert evaluation_times("euler", grid) == [1.0, 0.75, 0.5, 0.25]
    assert evaluation_times("midpoint", grid) == [1, .875, .75, .625, .5, .375, .25, .125]
    assert evaluation_times("heun", grid) == [1, .75, .75, .5, .5, .25, .25, 0]
    for solver in SOLVERS.values():  # they ask for the velocity when they say
        asked = []
        along(solver.step, lambda x, t: asked.append(t) or x, 1.0, grid)
        assert asked == evaluation_times(solver, grid)
    with pytest.raises(ValueError, match="solver must be one of"):
        evaluation_times("rk4", grid)


def test_the_velocity_at_the_end_is_defined():
    """Heun asks for v(x, 0); training ends at t = 1e-5, and the head is smooth in t."""
    head = randomize(FlowHead(6, 8, 24, 2))
    x, z = torch.randn(3, 6), torch.randn(3, 8)
    with torch.no_grad():
        last, trained = (head(x, torch.full((3,), t), z) for t in (0.0, 1e-5))
    torch.testing.assert_close(last, trained, rtol=1e-3, atol=1e-4)
