"""Drawing columns from left to right: the head's flow, and classifier-free guidance.

Every random number is keyed by (the image's seed, the column), so that an image is the same
whatever batch it is drawn in, and a longer image begins with the shorter one's noise.
"""

from __future__ import annotations

from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

from equimini import keyed
from equimini.flow_head import FlowHead
from equimini.generator import Generator
from equimini.graphs import GraphedColumn, GraphedStep
from equimini.solvers import SOLVERS, evaluation_times, time_grid

SCHEDULES = ("linear", "constant")
PRODUCT_ROWS = 256  # rows (steps times batch) of one matrix product for the head's modulations


def guidance_scale(i: int, n: int, s: float, schedule: str = "linear") -> float:
    """Guidance of column i of n: 1 + (s−1)·(i+1)/n for 'linear' (the paper's), s for 'constant'.

    i counts from 0 at the left end of the image, also when a prefix is given.
    Raises ValueError for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return 1 + (s - 1) * (i + 1) / n if schedule == "linear" else s


def guided(v: Tensor, s: float) -> Tensor:
    """v_uncond + s·(v_cond − v_uncond), for a batch that holds both halves, conditional first."""
    cond, uncond = v.chunk(2)
    return uncond + s * (cond - uncond)


def column_noise(seeds: Sequence[int], column: int, channels: int) -> Tensor:
    """The starting noise ε (B, C) of one column of the images with these seeds."""
    return keyed.normal((channels,), [keyed.rng("sample", seed, column) for seed in seeds])


class ColumnSampler:
    """Draws one column after another: the head's flow, from noise at t = 1 to a token at t = 0.

    head: the velocity field; solver, steps and time_shift: see `equimini.solvers`.
    """

    def __init__(self, head: FlowHead, steps: int = 100, solver: str = "euler",
                 time_shift: float = 1.0) -> None:
        self.head, self.solve = head, SOLVERS.get(solver)
        self.grid = time_grid(steps, time_shift)
        self.times = list(dict.fromkeys(evaluation_times(solver, self.grid)))
        device = next(head.parameters()).device
        self.embedded = head.embed_time(torch.tensor(self.times, device=device))

    def __call__(self, z: Tensor, noise: Tensor, s: float | Tensor) -> Tensor:
        """One column x (B, C), normalised, from noise (B, C).

        z: (B, d), the transformer's output for this column; or (2·B, d) for guidance with scale
        s: conditional first, then unconditional.  Both branches share the noise.
        """
        branches = len(z) // len(noise)
        modulations = self.modulations(z)

        def velocity(x: Tensor, t: float) -> Tensor:
            v = self.head.velocity(x.repeat(branches, 1), modulations(t))
            return v if branches == 1 else guided(v, s)

        return self.solve(velocity, noise, self.grid)

    def modulations(self, z: Tensor) -> Callable[[float], Sequence[tuple[Tensor, ...]]]:
        """The head's modulations for z (rows, d), as a function of t.

        They do not depend on x, so they are computed for many times in one matrix product: as
        many as make PRODUCT_ROWS rows, which bounds the memory; a large batch is enough alone.
        """
        together = max(1, PRODUCT_ROWS // len(z))
        ready: dict[float, Sequence[tuple[Tensor, ...]]] = {}

        def at(t: float) -> Sequence[tuple[Tensor, ...]]:
            if t not in ready:
                ready.clear()
                i = self.times.index(t)
                of_blocks = self.head.modulations(self.embedded[i:i + together, None], z)
                of_times = zip(*(zip(*(x.unbind(0) for x in block)) for block in of_blocks))
                ready.update(zip(self.times[i:i + together], of_times))
            return ready[t]

        return at


@torch.no_grad()
def sample_columns(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int], *,
                   cfg: float = 1.0, schedule: str = "linear", steps: int = 100,
                   solver: str = "euler", time_shift: float = 1.0,
                   cuda_graphs: bool = False, prefix: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the columns of B images one by one, (B, C) each, normalised.

    labels: (B,) class numbers; seeds: B integers ≥ 0; columns: the images' length.  cfg: the
    guidance scale s; at s = 1 the unconditional branch is not run.  prefix: (B, P, C), columns
    that are given; the first column that is drawn and yielded is then column P.
    Raises ValueError for arguments that do not fit.
    """
    _check(generator, labels, columns, seeds, prefix, cuda_graphs)
    step, draw = generator, ColumnSampler(generator.head, steps, solver, time_shift)
    if cuda_graphs:
        step, draw = GraphedStep(generator), GraphedColumn(draw)
    device = generator.no_class.device
    labels = labels.to(device)
    branches = 1 if cfg == 1 else 2
    drop = torch.arange(branches, device=device).bool().repeat_interleave(len(labels))
    context = generator.encode_classes(labels.repeat(branches), drop)
    z, cache, start = context.z0, [], 0
    if prefix is not None and prefix.shape[1]:
        start = prefix.shape[1]
        z = generator(prefix.to(device).repeat(branches, 1, 1), context, 0, cache)
    for i in range(start, columns):
        noise = column_noise(seeds, i, generator.channels).to(device)
        x = draw(z[:, -1], noise, guidance_scale(i, columns, cfg, schedule))
        yield x
        if i + 1 < columns:
            z = step(x[:, None].repeat(branches, 1, 1), context, i, cache)


def sample_tokens(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
                  **options) -> Tensor:
    """All drawn columns of `sample_columns`, stacked behind the prefix: (B, columns, C)."""
    drawn = torch.stack(list(sample_columns(generator, labels, columns, seeds, **options)), 1)
    prefix = options.get("prefix")
    return drawn if prefix is None else torch.cat((prefix.to(drawn), drawn), 1)


def _check(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
           prefix: Tensor | None, cuda_graphs: bool) -> None:
    if len(seeds) != len(labels):
        raise ValueError(f"seeds must be one per label ({len(labels)}), got {len(seeds)}")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be at least 0, got {min(seeds)}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= generator.num_classes:
        raise ValueError(f"labels must be class numbers 0 to {generator.num_classes - 1}, got "
                         f"{labels.tolist()}")
    given = 0 if prefix is None else prefix.shape[1]
    if columns <= given:
        raise ValueError(f"columns must be more than the {given} given, got {columns}")
    if cuda_graphs and generator.no_class.device.type != "cuda":
        raise ValueError("cuda_graphs needs a generator on a CUDA device, got one on "
                         f"{generator.no_class.device}")
