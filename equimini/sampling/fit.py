"""Columns that fit on both sides: several candidates for a gap, weighed by what follows it.

A column i between kept ones should come from

    p(x_i | left, right) ∝ p(x_i | left) · Π_j p(x_j | x_<j),   j > i: the kept columns that see x_i

The model draws from the first factor.  So K candidates are drawn from it, and one of them is
chosen with probabilities ∝ the second (sampling importance resampling), which for K → ∞ is a draw
from the product.  Candidates are drawn with guidance, and weighed without.  log p(x_j | x_<j) need
only be known up to what all candidates share.  For the best denoiser it is, on the straight path
x_t = t·ε + (1−t)·x_j (Eq. 8),

    log p(x_j | z_j) = const − ∫ (1−t)/t · E_ε |v(x_t, t, z_j) − (ε − x_j)|² dt

(the derivative of the signal-to-noise ratio, times the squared error of x_j; Kong et al. 2023,
"Information-theoretic diffusion").  All candidates share t and ε, so that what these cost in
precision cancels.  A gap of several columns is drawn K times as a whole: only its end can be
judged.  `python -m equimini.experiments fits` compares the estimate with the exact likelihood.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import torch
from torch import Tensor

from equimini.generator import GeneratorConfig
from equimini.noise import normal, rng, uniform
from equimini.sampler import Stream, column_noise
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.utils.checkpoint import map_tensors

TIMES = 16  # evaluations of the head per candidate and kept column
LOGIT = (-3.0, 1.0)  # of t: where contexts differ in what they predict
LOOK_AHEAD = 4  # kept columns that are measured, at most
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


@torch.no_grad()
def draw_end(model: ImageGenerator, stream: Stream, row: int, labels: Tensor, kept: Tensor,
             options: SamplingOptions, fit: int, total: int) -> tuple[Tensor, Tensor]:
    """Candidates (fit, n, C) for the end of a gap, from where row `row` of a stream has come to.

    labels: (n + R,), the classes of these columns and of the kept ones (R, C) behind them.
    total: columns of the whole picture.  Returns also the log weights (fit,).  Candidate 0 has the
    noise of a picture with this seed.
    """
    seed = stream.seeds[row]
    wide = model.stream(labels[:1].expand(fit), [seed] * fit, total, options)
    rows = slice(row, None, len(stream.seeds))  # of each branch
    wide.load_state(map_tensors(lambda x: x[rows].repeat_interleave(fit, 0), stream.state()))
    drawn, weights = [], torch.zeros(fit, device=wide.device)
    for label in labels[:len(labels) - len(kept)]:
        wide.set_class(label.expand(fit))
        drawn.append(wide.draw(candidate_noise(seed, wide.column, wide, fit)))
    for label, x in zip(labels[len(drawn):], kept.to(wide.device)):
        wide.set_class(label.expand(fit))
        z = wide.feed(x.expand(fit, -1))
        weights += torch.cat([log_likelihoods(wide.generator.head, part, x, seed, wide.column - 1)
                              for part in z[:fit].split(64)])  # bounds the memory
    return torch.stack(drawn, 1), weights


def candidate_noise(seed: int, column: int, stream: Stream, k: int) -> Tensor:
    """Starting noise (K, C) of a column: the picture's own, then others."""
    c = stream.generator.channels
    others = normal((c,), [rng("candidate", seed, column, i) for i in range(1, k)])
    return torch.cat((column_noise([seed], column, c), others)).to(stream.device)


def choice(log_weights: Tensor, seed: int, column: int) -> Tensor:
    """A draw by weight of one candidate (the Gumbel-max trick), a function of seed and column."""
    u = uniform((len(log_weights),), [rng("choose", seed, column)])[0].double()
    gumbel = -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))
    return (log_weights.cpu().double() + gumbel).argmax()


def stream_near(model: ImageGenerator, column: int, tokens: Tensor, labels: Tensor,
                seeds: Sequence[int], options: SamplingOptions) -> Stream:
    """A stream of tokens (B, N, C) that begins as late as leaves everything `column` sees."""
    stream = model.stream(labels[:1].expand(len(seeds)), seeds, len(labels), options)
    first = column - max(reach(g.config) for g in model.generators(options)) + 1
    if first > 0:
        last = tokens[:, first - 1].to(stream.device)
        stream.load_state({"column": first, "last": last, "cache": []})
    return stream


def gaps_of(drawn: Sequence[int]) -> list[range]:
    """Neighbouring columns together."""
    gaps: list[range] = []
    for i in drawn:
        if gaps and gaps[-1].stop == i:
            gaps[-1] = range(gaps[-1].start, i + 1)
        else:
            gaps.append(range(i, i + 1))
    return gaps


def _kept_right(tokens: Tensor, start: int, most: int, ring: bool) -> list[int]:
    """Up to `most` columns from `start` on, none beyond one that is still to be drawn."""
    n, right = len(tokens), []
    for i in range(start, start + most):
        if i >= n and not ring or tokens[i % n].isnan().any():
            break
        right.append(i % n)
    return right


def fill_gap(model: ImageGenerator, tokens: Tensor, labels: Tensor, gap: range,
             seeds: Sequence[int], options: SamplingOptions, fit: int = 1,
             ring: bool = False) -> Iterator[tuple[Sequence[int], int]]:
    """Draw one gap of a picture into its versions tokens (B, N, C), one a seed.

    tokens: NaN where a column is still to be drawn.  labels: (N,).  Yields which versions have how
    many of the gap's columns now.  With fit > 1 the last ones (FITTED, at most) are chosen among
    so many, where kept columns follow; in a ring, the first column follows the last.
    """
    right = _kept_right(tokens[0], gap.stop, min(LOOK_AHEAD, reach(model.generator.config)), ring)
    first = max(gap.start, gap.stop - FITTED) if right and fit > 1 else gap.stop
    stream = stream_near(model, gap.start, tokens, labels, seeds, options)
    while stream.column < first:
        i = stream.column
        stream.set_class(labels[i].expand(len(seeds)))
        if i in gap:
            tokens[:, i] = stream.draw().cpu()
            yield range(len(seeds)), i + 1 - gap.start
        else:
            stream.feed(tokens[:, i])
    for k, seed in enumerate(seeds if first < gap.stop else ()):
        drawn, weights = draw_end(model, stream, k, labels[[*range(first, gap.stop), *right]],
                                  tokens[k, right], options, fit, len(labels))
        tokens[k, first:gap.stop] = drawn[choice(weights, seed, gap.start)].cpu()
        yield [k], len(gap)
