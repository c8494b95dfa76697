"""Solvers for the flow's ODE dx/dt = v(x, t), from noise at t = 1 to a token at t = 0.

    euler     x ← x + Δt·v(x, t)                                        order 1, 1 evaluation
    midpoint  x ← x + Δt·v(x + ½Δt·v(x, t), t + ½Δt)                    order 2, 2 evaluations
    heun      x ← x + Δt·½(v₁ + v(x + Δt·v₁, t + Δt)), v₁ = v(x, t)      order 2, 2 evaluations

a step, Δt < 0.  The paper's sampler is Euler with 100 equal steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Solver = Callable[[Velocity, Tensor, Sequence[float]], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """First order: the velocity at the start of every step."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def midpoint(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Second order: the velocity in the middle of every step, found with half an Euler step."""
    for t, t_next in pairwise(times):
        half = (t_next - t) / 2
        x = x + 2 * half * velocity(x + half * velocity(x, t), t + half)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Second order: the mean of the velocities at both ends, the far one found with Euler.

    The last step is a full one, too: v(x, 0) is defined (the straight path's velocity stays
    finite, unlike the score), and the head is trained down to t = 1e-5.
    """
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        x = x + (t_next - t) / 2 * (v + velocity(x + (t_next - t) * v, t_next))
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "midpoint": midpoint, "heun": heun}


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times from 1 down to 0: k/steps, then t ← shift·t / (1 + (shift − 1)·t).

    shift > 1 takes smaller steps near the noise (t = 1), shift < 1 near the token; 1 leaves them
    equal.  Raises ValueError for steps < 1 or a shift that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"time_shift must be above 0, got {shift}")
    even = (k / steps for k in range(steps, -1, -1))
    return [shift * t / (shift * t + (1 - t)) for t in even]  # exactly 1 and 0 at the ends


def evaluation_times(solver: str, times: Sequence[float]) -> list[float]:
    """The times at which the solver evaluates the velocity, in its order.

    Their number is the solver's cost: steps for euler, 2·steps for midpoint and heun.
    Raises ValueError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    asked: list[float] = []
    SOLVERS[solver](lambda x, t: asked.append(t) or x, 0.0, times)
    return asked
