"""Drawing columns from left to right: the head's flow, and classifier-free guidance.

Every random number is keyed by (the image's seed, the column), so that an image is the same
whatever batch it is drawn in, and a longer image begins with the shorter one's noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from equimini.flow_head import FlowHead
from equimini.generator import Generator, KeyValue
from equimini.noise import normal, rng
from equimini.sampling.cuda_graphs import GraphedColumn, GraphedStep, kept

SCHEDULES = ("linear", "constant")
PRODUCT_ROWS = 256  # rows (steps times batch) of one matrix product for the head's modulations


def guidance_scale(i: int, n: int, s: float, schedule: str = "linear") -> float:
    """Guidance of column i: 'linear' (the paper's) is 1 + (s−1)·(i+1)/n, then s; 'constant' s.

    i counts from 0 at the left end of the image, also when a prefix is given.
    Raises ValueError for another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return 1 + (s - 1) * min(1, (i + 1) / n) if schedule == "linear" else s


def guided(v: Tensor, s: float) -> Tensor:
    """v_uncond + s·(v_cond − v_uncond), for a batch that holds both halves, conditional first."""
    cond, uncond = v.chunk(2)
    return uncond + s * (cond - uncond)


def column_noise(seeds: Sequence[int], column: int, channels: int) -> Tensor:
    """The starting noise ε (B, C) of one column of the images with these seeds."""
    return normal((channels,), [rng("sample", seed, column) for seed in seeds])


class ColumnSampler:
    """Draws one column after another: the head's flow, from noise at t = 1 to a token at t = 0.

    head: the velocity field; solver, steps and time_shift: see `equimini.solvers`.
    temperature: factor on the noise; above 1 columns vary more, below 1 less.  Raises ValueError
    for one that is not at least 0.
    """

    def __init__(self, head: FlowHead, steps: int = 100, solver: str = "euler",
                 time_shift: float = 1.0, temperature: float = 1.0) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        self.temperature = temperature
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

        return self.solve(velocity, self.temperature * noise, self.grid)

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


@dataclass
class SamplerState:
    """All that the next column depends on besides the options; it does not grow with the picture.

    Filled in place by `sample_columns`, column after column; a copy of it continues there.
    """

    column: int = 0  # the next one
    last: Tensor | None = None  # (B, C), the column before
    cache: list[KeyValue] = field(default_factory=list)


@torch.no_grad()
def sample_columns(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int], *,
                   cfg: float = 1.0, schedule: str = "linear", guidance_columns: int = 0,
                   hold: int | None = None, prefix: Tensor | None = None,
                   redraw: Collection[int] = (), state: SamplerState | None = None,
                   cuda_graphs: bool = False, **drawing: Any) -> Iterator[Tensor]:
    """Yield the columns of B images one by one, (B, C) each, normalised.

    labels: (B,) class numbers, or (B, columns), the class of every column; seeds: B integers ≥ 0;
    columns: the images' length.  cfg: the guidance scale s; at s = 1 the unconditional branch is
    not run; guidance_columns: columns over which the linear schedule rises, 0: all.  hold: see
    `Generator.forward`.  prefix: (B, P, C), columns that are given; only the ones after them, and
    those in `redraw`, are drawn and yielded.  state: goes on from there.  drawing: steps, solver,
    time_shift and temperature of `ColumnSampler`.  Raises ValueError for arguments that do not fit.

    Column i is drawn under the class of column i.  Given columns pass through the transformer one
    at a time, like drawn ones, so that what follows them is the same to the last bit.
    """
    _check(generator, labels, columns, seeds, prefix, redraw, cuda_graphs)
    if cuda_graphs:
        step, draw = kept(generator, (hold, *sorted(drawing.items())), lambda: (
            GraphedStep(generator, hold), GraphedColumn(ColumnSampler(generator.head, **drawing))))
    else:
        step, draw = partial(generator, hold=hold), ColumnSampler(generator.head, **drawing)
    device = generator.no_class.device
    if labels.dim() == 1:
        labels = labels[:, None].expand(-1, columns)
    given = 0 if prefix is None else prefix.shape[1]
    branches = 1 if cfg == 1 else 2
    drop = torch.arange(branches, device=device).bool().repeat_interleave(len(labels))
    state, context = SamplerState() if state is None else state, None
    for i in range(state.column, columns if columns > given else max(redraw) + 1):
        if context is None or not torch.equal(labels[:, i], labels[:, i - 1]):
            context = generator.encode_classes(labels[:, i].repeat(branches).to(device), drop)
        z = context.z0  # (branches·B, 1, d)
        if i:
            last = state.last[:, None].repeat(branches, 1, 1)
            z = step(last, context, i - 1, state.cache)
        if drawn := i >= given or i in redraw:
            noise = column_noise(seeds, i, generator.channels).to(device)
            s = guidance_scale(i, guidance_columns or columns, cfg, schedule)
            x = draw(z[:, 0], noise, s)
        else:
            x = prefix[:, i].to(device)
        state.last, state.column = x, i + 1
        if drawn:
            yield x


def sample_tokens(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
                  **options: Any) -> Tensor:
    """All columns of the images, given and drawn: (B, columns, C); see `sample_columns`."""
    drawn = torch.stack(list(sample_columns(generator, labels, columns, seeds, **options)), 1)
    prefix = options.get("prefix")
    if prefix is None:
        return drawn
    redraw = sorted(options.get("redraw", ()))
    tokens = torch.cat((prefix.to(drawn), drawn[:, len(redraw):]), 1)
    tokens[:, redraw] = drawn[:, :len(redraw)]
    return tokens


def _check(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
           prefix: Tensor | None, redraw: Collection[int], cuda_graphs: bool) -> None:
    if len(seeds) != len(labels):
        raise ValueError(f"seeds must be one per label ({len(labels)}), got {len(seeds)}")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be at least 0, got {min(seeds)}")
    if labels.dim() > 1 and labels.shape[1:] != (columns,):
        raise ValueError(f"labels must be (B,) or (B, columns = {columns}), got "
                         f"{tuple(labels.shape)}")
    if labels.numel() == 0 or labels.min() < 0 or labels.max() >= generator.num_classes:
        raise ValueError(f"labels must be class numbers 0 to {generator.num_classes - 1}, got "
                         f"{labels.unique().tolist()}")
    given = 0 if prefix is None else prefix.shape[1]
    if columns < given + (not redraw):
        raise ValueError(f"columns must be more than the {given} given, got {columns}")
    if any(not 0 <= i < given for i in redraw):
        raise ValueError(f"redraw must be columns 0 to {given - 1}, got {sorted(redraw)}")
    if cuda_graphs and generator.no_class.device.type != "cuda":
        raise ValueError("cuda_graphs needs a generator on a CUDA device, got one on "
                         f"{generator.no_class.device}")


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
