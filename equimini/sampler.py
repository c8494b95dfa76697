"""Sampling: columns from left to right, each carried by the head's flow from noise to a token.

Read `sample_plainly` first: the paper's sampler, with nothing kept from column to column or from
step to step.  Everything below computes the same with less work: a `Stream` keeps what the next
column needs of those before it, a `ColumnSampler` what the steps of one column share.

Every random number is keyed by (the image's seed, the column), so that an image is the same in
any batch, and a longer image begins with the shorter one's noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor

from equimini.flow_head import VelocityHead
from equimini.generator import Generator, KeyValue
from equimini.mean_flow import guided
from equimini.noise import normal, rng

SCHEDULES = ("linear", "constant")
PRODUCT_ROWS = 256  # rows (steps times batch) of one matrix product for the head's modulations


@torch.no_grad()
def sample_plainly(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
                   cfg: float = 1.0, schedule: str = "linear", steps: int = 100) -> Tensor:
    """The paper's sampler: class numbers `labels` (B,) to normalised tokens (B, columns, C)."""
    b, like = len(labels), generator.no_class  # its device and dtype
    labels = labels.to(like.device).repeat(2)  # the second half is drawn without a class
    drop = torch.arange(2 * b, device=like.device) >= b
    tokens = like.new_zeros(b, 0, generator.channels)
    for i in range(columns):
        s = Guidance(cfg, schedule, columns).scale(i)
        padded = torch.cat((tokens, like.new_zeros(b, 1, generator.channels)), 1)
        z_i = generator.predict(padded.repeat(2, 1, 1), labels, drop)[:, i]  # (2B, d) from x_<i
        x = column_noise(seeds, i, generator.channels).to(like)  # at t = 1
        for k in range(steps, 0, -1):
            t = like.new_full((2 * b,), k / steps)
            cond, uncond = generator.head(x.repeat(2, 1), t, z_i).chunk(2)  # both share the noise
            x = x - (uncond + s * (cond - uncond)) / steps  # Euler, to t = 0
        tokens = torch.cat((tokens, x[:, None]), 1)
    return tokens


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v_uncond + s_i·(v_cond − v_uncond), s_i depending on the column i.

    'linear' (the paper's): s_i = 1 + (s−1)·(i+1)/columns, then s; 'constant': s.  i counts from 0
    at the left end of the image, also when columns are given.  Raises ValueError for another.
    """

    s: float = 1.0  # at s = 1 the unconditional branch is not run
    schedule: str = "linear"
    columns: int = 1  # over which 'linear' rises

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got "
                             f"{self.schedule!r}")

    @property
    def branches(self) -> int:
        """Rows per image: conditional, and unconditional where it counts."""
        return 1 if self.s == 1 else 2

    def scale(self, i: int) -> float:
        """s_i."""
        if self.schedule == "constant":
            return self.s
        return 1 + (self.s - 1) * min(1, (i + 1) / self.columns)


def column_noise(seeds: Sequence[int], column: int, channels: int) -> Tensor:
    """The starting noise ε (B, C) of one column of the images with these seeds."""
    return normal((channels,), [rng("sample", seed, column) for seed in seeds])


# Solvers -----------------------------------------------------------------------------------

Velocity = Callable[[Tensor, float], Tensor]  # v(x, t)


@dataclass(frozen=True)
class Solver:
    """A step of the flow's ODE dx/dt = v(x, t) from t to r < t.

    step(v, x, t, r): x at r from x at t.  times(t, r): when it asks for v, in order, so that all
    that depends on time alone can be computed beforehand.  average: what it asks for at t is the
    average velocity down to r, which `equimini.mean_flow` trains a head for.
    """

    step: Callable[[Velocity, Tensor, float, float], Tensor]
    times: Callable[[float, float], tuple[float, ...]]
    average: bool = False


def euler(v: Velocity, x: Tensor, t: float, r: float) -> Tensor:
    """First order: the velocity at the start of the step.  The paper's."""
    return x + (r - t) * v(x, t)


def midpoint(v: Velocity, x: Tensor, t: float, r: float) -> Tensor:
    """Second order: the velocity in the middle of the step, found with half an Euler step."""
    half = (r - t) / 2
    return x + 2 * half * v(x + half * v(x, t), t + half)


def heun(v: Velocity, x: Tensor, t: float, r: float) -> Tensor:
    """Second order: the mean of the velocities at both ends, the far one found with Euler.

    The last step is a full one: v(x, 0) is defined (the straight path's velocity stays finite,
    unlike the score), and the head is trained down to t = 1e-5.
    """
    v_t = v(x, t)
    return x + (r - t) / 2 * (v_t + v(x + (r - t) * v_t, r))


SOLVERS = {"euler": Solver(euler, lambda t, r: (t,)),
           "midpoint": Solver(midpoint, lambda t, r: (t, t + (r - t) / 2)),
           "heun": Solver(heun, lambda t, r: (t, r)),
           "mean-flow": Solver(euler, lambda t, r: (t,), average=True)}


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times from 1 down to 0: k/steps, then t ← shift·t / (1 + (shift − 1)·t).

    shift > 1 takes smaller steps near the noise (t = 1), shift < 1 near the token; 1 leaves them
    equal.  Raises ValueError for steps < 1 or a shift that is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"time_shift must be above 0, got {shift}")
    even = (k / steps for k in range(steps, -1, -1))
    return [shift * t / (shift * t + (1 - t)) for t in even]  # exactly 1 and 0 at the ends


def find_solver(solver: str | Solver) -> Solver:
    """A solver by its name; one that is given stays.  Raises ValueError for an unknown name."""
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    return SOLVERS[solver] if isinstance(solver, str) else solver


def evaluation_times(solver: str | Solver, times: Sequence[float]) -> list[float]:
    """When the velocity is evaluated on the way along `times`; their number is the cost."""
    return [s for t, r in pairwise(times) for s in find_solver(solver).times(t, r)]


# One column --------------------------------------------------------------------------------


class ColumnSampler:
    """Draws a column: the flow from noise at t = 1 to a token at t = 0.

    steps, solver and time_shift: see above.  temperature: factor on the noise; above 1 columns
    vary more, below 1 less.  Raises ValueError for one that is not at least 0.
    """

    def __init__(self, head: VelocityHead, steps: int = 100, solver: str | Solver = "euler",
                 time_shift: float = 1.0, temperature: float = 1.0) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        self.head, self.solver, self.temperature = head, find_solver(solver), temperature
        self.grid = time_grid(steps, time_shift)
        self.times = list(dict.fromkeys(evaluation_times(solver, self.grid)))
        self.embedded: Tensor | None = None  # (times, width), from the first call on

    def __call__(self, z: Tensor, noise: Tensor, s: float | Tensor) -> Tensor:
        """One column x (B, C), normalised, from noise (B, C).

        z: (B, d), the transformer's output for this column; or (2·B, d) for guidance with scale
        s, one or (B,): conditional first, then unconditional.  A head with `scales` is told s, and
        z is guided.
        """
        return self.follow(self.velocity(z, s, len(z) // len(noise)), noise)

    def velocity(self, z: Tensor, s: float | Tensor, branches: int = 1) -> Velocity:
        """v(x, t) of these images, under guidance where z has two branches."""
        if self.head.scales and branches == 2:
            z, branches = guided(z.chunk(2), s), 1
        modulations = self.modulations(z, s)

        def velocity(x: Tensor, t: float) -> Tensor:
            v = self.head.velocity(x.repeat(branches, 1), modulations(t))
            return v if branches == 1 else guided(v.chunk(2), s)

        return velocity

    def follow(self, velocity: Velocity, noise: Tensor) -> Tensor:
        """The way from noise (B, C) to a column."""
        x = self.temperature * noise
        for t, r in pairwise(self.grid):
            x = self.solver.step(velocity, x, t, r)
        return x

    def modulations(self, z: Tensor,
                    s: float | Tensor = 1.0) -> Callable[[float], Sequence[tuple[Tensor, ...]]]:
        """The head's modulations for z (rows, d) and guidance s, as a function of t.

        They do not depend on x, so they are computed for many times in one matrix product: as
        many as make PRODUCT_ROWS rows, which bounds the memory; a large batch is enough alone.
        """
        together, at_times = max(1, PRODUCT_ROWS // len(z)), self.at_times(z, s)
        ready: dict[float, Sequence[tuple[Tensor, ...]]] = {}

        def at(t: float) -> Sequence[tuple[Tensor, ...]]:
            if t not in ready:
                ready.clear()
                i = self.times.index(t)
                of_blocks = at_times(slice(i, i + together))
                of_times = zip(*(zip(*(m.unbind(0) for m in block)) for block in of_blocks))
                ready.update(zip(self.times[i:i + together], of_times))
            return ready[t]

        return at

    def at_times(self, z: Tensor,
                 s: float | Tensor) -> Callable[[slice], Sequence[tuple[Tensor, ...]]]:
        """The same as a function of a part of `times`, each tensor (times, rows, …)."""
        if self.embedded is None:
            times = torch.tensor(self.times, device=z.device)
            ends = [times.new_tensor(self.grid[1:])] if self.solver.average else []
            self.embedded = self.head.embed_time(times, *ends)
        time = self.embedded[:, None]  # (times, 1, width)
        if self.head.scales:
            time = time + self.head.embed_scale(torch.as_tensor(s, device=z.device).reshape(-1))
        return lambda part: self.head.modulations(time[part], z)


# Many columns ------------------------------------------------------------------------------


class Stream:
    """B images that grow to the right, column by column: `feed` a given one, or `draw` the next.

    It holds all that the next column depends on, which does not grow with the images: the column
    before, the window's keys and values of every layer, class and guidance.

    labels: (B,) class numbers of the columns to come, see `set_class`; seeds: B integers ≥ 0;
    sampler: draws a column from z, noise and the guidance scale.  step: in place of the
    generator, from the last token, class context, position and cache to z (a CUDA graph, say).
    max_position: see `Generator.forward`.  Raises ValueError for what does not fit.
    """

    def __init__(self, generator: Generator, labels: Tensor, seeds: Sequence[int],
                 sampler: Callable[[Tensor, Tensor, float], Tensor],
                 guidance: Guidance = Guidance(), max_position: int | None = None,
                 step: Callable[..., Tensor] | None = None) -> None:
        if len(seeds) != len(labels):
            raise ValueError(f"seeds must be one per label ({len(labels)}), got {len(seeds)}")
        if any(seed < 0 for seed in seeds):
            raise ValueError(f"seeds must be at least 0, got {min(seeds)}")
        self.generator, self.seeds, self.guidance = generator, list(seeds), guidance
        self.sampler, self.step = sampler, step or partial(generator, max_position=max_position)
        self.device, self.labels = generator.no_class.device, None
        self.column = 0  # the next one
        self.last: Tensor | None = None  # (B, C), the column before
        self.cache: list[KeyValue] = []
        self.set_class(labels)

    branches = property(lambda self: self.guidance.branches)  # rows per image

    @torch.no_grad()
    def set_class(self, labels: Tensor) -> None:
        """Class numbers (B,) of the columns from the next one on."""
        if self.labels is not None and torch.equal(labels, self.labels):
            return
        _check_labels(labels, self.generator.num_classes)
        n = self.branches
        drop = torch.arange(n, device=self.device).bool().repeat_interleave(len(labels))
        self.labels = labels.clone()
        self.context = self.generator.encode_classes(labels.repeat(n).to(self.device), drop)

    @torch.no_grad()
    def feed(self, x: Tensor) -> Tensor:
        """Take x (B, C) as the next column; what follows is as if it had been drawn.

        Returns z (branches·B, d), from which it would have been.
        """
        z = self._next_z()
        self.last, self.column = x.to(self.device), self.column + 1
        return z

    @torch.no_grad()
    def draw(self, noise: Tensor | None = None) -> Tensor:
        """The next column, (B, C), normalised; from noise (B, C) in place of the seeds'."""
        z = self._next_z()
        if noise is None:
            noise = column_noise(self.seeds, self.column, self.generator.channels)
        self.last = self.sampler(z, noise.to(self.device), self.guidance.scale(self.column))
        self.column += 1
        return self.last

    def _next_z(self) -> Tensor:
        """z (branches·B, d) of the next column; the column before goes into the cache."""
        if self.column == 0:
            return self.context.z0[:, 0]
        token = self.last[:, None].repeat(self.branches, 1, 1)  # (branches·B, 1, C)
        return self.step(token, self.context, self.column - 1, self.cache)[:, 0]

    def state(self) -> dict[str, Any]:
        """What another stream with the same arguments continues from, by `load_state`."""
        return {"column": self.column, "last": self.last, "cache": list(self.cache)}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, whose tensors lie on the generator's device."""
        self.column, self.last, self.cache = state["column"], state["last"], list(state["cache"])


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.dim() != 1 or labels.numel() == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be class numbers 0 to {classes - 1}, one per image, got "
                         f"{labels.tolist()}")


def sample_columns(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int], *,
                   cfg: float = 1.0, schedule: str = "linear", **flow: Any) -> Iterator[Tensor]:
    """Yield the columns of B images one by one, (B, C) each, normalised.

    labels: (B,) class numbers, or (B, columns), the class of every column.  cfg, schedule: see
    `Guidance`, over all columns; flow: options of `ColumnSampler`.
    """
    if labels.dim() == 1:
        labels = labels[:, None].expand(-1, columns)
    if labels.shape[1:] != (columns,):
        raise ValueError(f"labels must be (B,) or (B, columns = {columns}), got "
                         f"{tuple(labels.shape)}")
    stream = Stream(generator, labels[:, 0], seeds, ColumnSampler(generator.head, **flow),
                    Guidance(cfg, schedule, columns))
    for i in range(columns):
        stream.set_class(labels[:, i])
        yield stream.draw()


def sample_tokens(generator: Generator, labels: Tensor, columns: int, seeds: Sequence[int],
                  **options: Any) -> Tensor:
    """All columns of the images: (B, columns, C); see `sample_columns`."""
    return torch.stack(list(sample_columns(generator, labels, columns, seeds, **options)), 1)
