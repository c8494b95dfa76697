"""Guidance by a second, worse generator: away from what it draws without a class.

    v = v_guide + s_i·(v_cond − v_guide)

Plain guidance has the generator's own unconditional velocity in the place of v_guide, and leads
away from other classes.  A worse generator of the same data, an earlier checkpoint say, errs in the
same places as the better one, but more, and so this leads away from errors as well (Karras et al.
2024, "Guiding a diffusion model with a bad version of itself", where the guide has the class too).
docs/sampling.md says what it brings.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from equimini.generator import Generator
from equimini.mean_flow import guided
from equimini.sampler import ColumnSampler, Stream


class Guide(Stream):
    """B images of another stream, as a generator of the same tokens sees them without a class.

    max_position, step: as of `Stream`.
    """

    def __init__(self, generator: Generator, images: int, max_position: int | None = None,
                 step: Callable[..., Tensor] | None = None) -> None:
        super().__init__(generator, torch.zeros(images, dtype=torch.int64), range(images), None,
                         max_position=max_position, step=step)

    @torch.no_grad()
    def set_class(self, labels: Tensor) -> None:
        """None, whatever they are."""
        none = torch.zeros_like(labels).to(self.device)
        self.context = self.generator.encode_classes(none, torch.ones_like(none).bool())


class GuidedStream(Stream):
    """A `Stream` whose unconditional branch is another generator's; sampler: a `GuidedSampler`."""

    branches = 1  # rows per image, of this generator

    def __init__(self, guide: Guide, *arguments: Any) -> None:
        """arguments: of `Stream`."""
        self.guide = guide
        super().__init__(*arguments)

    def _next_z(self) -> tuple[Tensor, Tensor]:
        return super()._next_z(), self.guide._next_z()

    def feed(self, x: Tensor) -> Tensor:
        """As of `Stream`; z (B, d) is this generator's."""
        z, _ = super().feed(x)
        self.guide.last, self.guide.column = self.last, self.column
        return z

    def draw(self, noise: Tensor | None = None) -> Tensor:
        """As of `Stream`."""
        x = super().draw(noise)
        self.guide.last, self.guide.column = x, self.column
        return x

    def state(self) -> dict[str, Any]:
        """As of `Stream`."""
        return {**super().state(), "guide": self.guide.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """As of `Stream`; with no earlier columns, the guide's state is the same."""
        super().load_state(state)
        self.guide.load_state(state["guide"] if state["cache"] else state)


class GuidedSampler:
    """Draws a column from both generators' z."""

    def __init__(self, own: ColumnSampler, guide: ColumnSampler) -> None:
        """Of the two heads, with the same steps."""
        self.own, self.guide = own, guide

    def __call__(self, z: tuple[Tensor, Tensor], noise: Tensor, s: float | Tensor) -> Tensor:
        """One column (B, C), normalised, from noise (B, C) and z (B, d), (B, d')."""
        v, v_guide = self.own.velocity(z[0], s), self.guide.velocity(z[1], 1.0)
        return self.own.follow(lambda x, t: guided((v(x, t), v_guide(x, t)), s), noise)
