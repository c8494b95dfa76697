"""Many steps a column: the head's modulations from a few times, interpolated for all others.

They are smooth in t, and matrix products over all of the head's largest weights.  docs/sampling.md
says what the interpolation costs in exactness, and what the nodes' modulations, all kept, in memory.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from equimini.sampler import ColumnSampler, VelocityHead


class NodeSampler(ColumnSampler):
    """Draws a column as `ColumnSampler(head, *flow)` does, from modulations at `nodes` times."""

    def __init__(self, head: VelocityHead, nodes: int, *flow: Any) -> None:
        super().__init__(head, *flow)
        times, self.weights = chebyshev(torch.tensor(self.times, dtype=torch.float64), nodes)
        self.at_nodes = ColumnSampler(head)
        self.at_nodes.times = times.tolist()

    def at_times(self, z: Tensor,
                 s: float | Tensor) -> Callable[[slice], Sequence[tuple[Tensor, ...]]]:
        """As of `ColumnSampler`, interpolated from the modulations at the nodes."""
        blocks = self.at_nodes.at_times(z, s)(slice(None))
        self.weights = self.weights.to(blocks[0][0])
        return lambda part: [tuple(torch.tensordot(self.weights[part], m, 1) for m in block)
                             for block in blocks]


def chebyshev(times: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n nodes in (0, 1), and the weights (T, n) that interpolate from them at times (T,)."""
    k = torch.arange(n, dtype=times.dtype)
    angles = (k + 0.5) * (math.pi / n)  # of the nodes; those of times lie between 0 and π as well
    polynomials = torch.cos(k * (2 * times - 1).acos()[:, None])  # (T, n)
    polynomials[:, 0] /= 2
    return 0.5 + angles.cos() / 2, polynomials @ torch.cos(k[:, None] * angles) * (2 / n)
