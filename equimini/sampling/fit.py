"""Columns that fit on both sides: several candidates for a gap, weighed by what follows it.

A column i between kept ones should come from

    p(x_i | left, right) ∝ p(x_i | left) · Π_j p(x_j | x_<j),   j > i: the kept columns that see x_i

The model draws from the first factor.  So K candidates are drawn from it, and one of them is
chosen with probabilities ∝ the second (sampling importance resampling); for K → ∞ that is a draw
from the left side.  log p(x_j | x_<j) need only be known up to what all candidates share.  For
the best denoiser it is, on the straight path x_t = t·ε + (1−t)·x_j (Eq. 8),

    log p(x_j | z_j) = const − ∫ (1−t)/t · E_ε |v(x_t, t, z_j) − (ε − x_j)|² dt

(the derivative of the signal-to-noise ratio, times the squared error of x_j; Kong et al. 2023,
"Information-theoretic diffusion").  All candidates share t and ε, so that what these cost in
precision cancels.  `python -m equimini.experiments fits` compares it with the exact likelihood.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from equimini.generator import GeneratorConfig
from equimini.noise import normal, rng, uniform
from equimini.sampler import Stream, column_noise

TIMES = 16  # (t, ±ε) that one kept column is measured at
LOGIT = (-3.0, 2.0)  # of t: where contexts differ in what they predict
LOOK_AHEAD = 8  # kept columns that are measured, at most
FITTED = 4  # last columns of a gap that candidates differ in, at most


def reach(config: GeneratorConfig) -> int:
    """How far a column is seen: column i plays a part in those up to i + reach, not beyond."""
    if config.real_equivariant:
        return config.window - 1
    return config.layers * (config.window - 1) + 1


def stratified_times(seed: int, column: int) -> Tensor:
    """TIMES/2 values of t, one in each equal part of LOGIT."""
    n = TIMES // 2
    u = uniform((n,), [rng("fit times", seed, column)])[0]
    return torch.sigmoid(LOGIT[0] + (LOGIT[1] - LOGIT[0]) * (torch.arange(n) + u) / n)


@torch.no_grad()
def log_likelihoods(head: torch.nn.Module, z: Tensor, x: Tensor, seed: int, column: int) -> Tensor:
    """log p(x | z) (K,) of one token x (C,) after contexts z (K, d), up to a constant."""
    t = stratified_times(seed, column)
    eps = normal((len(t), len(x)), [rng("fit noise", seed, column)])[0]
    t, eps = (a.to(z.device) for a in (t.repeat(2), torch.cat((eps, -eps))))
    x_t = torch.lerp(x, eps, t[:, None])  # (T, C)
    v = head(x_t[:, None].expand(-1, len(z), -1), t[:, None], z[None])  # (T, K, C)
    errors = (v.float() - (eps - x)[:, None]).square().sum(2)
    # dt = t·(1−t) d logit t
    weight = (1 - t).square() * (LOGIT[1] - LOGIT[0]) / len(t)
    return -(weight[:, None] * errors).sum(0)


def widen(stream: Stream, rows: Tensor, state: dict) -> None:
    """Give `stream` the state of another one: its row b continues that one's row rows[b].

    rows: (B,); of guidance's second branch it takes the same ones.
    """
    n = len(state["last"]) if state["last"] is not None else 0
    cache = [tuple(a[torch.cat([rows + k for k in range(0, len(a), n)])] for a in pair)
             for pair in state["cache"]]
    last = None if state["last"] is None else state["last"][rows]
    stream.load_state({**state, "last": last, "cache": cache})


@torch.no_grad()
def draw_candidates(stream: Stream, labels: Tensor, gap: int, kept: Tensor, seed: int,
                    steps: Iterator) -> tuple[Tensor, Tensor]:
    """Candidates (K, gap, C) for the next columns of a stream of K equal rows; log weights (K,).

    labels: (gap + R,), the classes of the gap and of the kept columns (R, C) behind it.
    Candidate 0 has the noise of a picture with this seed.
    """
    k, drawn = len(stream.seeds), []
    for label in labels[:gap]:
        next(steps)
        stream.set_class(label.expand(k))
        drawn.append(stream.draw(candidate_noise(seed, stream.column, stream, k)))
    total = drawn[0].new_zeros(k)
    for label, x in zip(labels[gap:], kept.to(stream.device)):
        stream.set_class(label.expand(k))
        z = stream.feed(x.expand(k, -1))
        total += log_likelihoods(stream.generator.head, z[:k], x, seed, stream.column - 1)
    return torch.stack(drawn, 1), total


def candidate_noise(seed: int, column: int, stream: Stream, k: int) -> Tensor:
    """Starting noise (K, C) of a column: the picture's own, then others."""
    c = stream.generator.channels
    others = normal((c,), [rng("candidate", seed, column, i) for i in range(1, k)])
    return torch.cat((column_noise([seed], column, c), others)).to(stream.device)


def ranking(log_weights: Tensor, seed: int, column: int) -> Tensor:
    """Candidates in the order of a draw without replacement, by their weights (Gumbel-top-k).

    The first is a draw of one; ranking and weights alike are functions of (seed, column).
    """
    u = uniform((len(log_weights),), [rng("choose", seed, column)])[0].double()
    gumbel = -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))
    return (log_weights.cpu().double() + gumbel).argsort(descending=True)
