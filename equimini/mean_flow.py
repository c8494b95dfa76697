"""Average velocities: a head that takes the flow's whole way in one evaluation.

    x_r = x_t − (t − r)·u(x_t, r, t, z, s),       u = 1/(t − r) · ∫_r^t v(x_τ, τ, z) dτ

(MeanFlow, arXiv 2505.13447.)  At r = t it is the velocity v of Eq. 8, so every solver still runs.
v is the velocity of a trained generator, the teacher, under guidance: v_uncond + s·(v_cond −
v_uncond); v_uncond may be a guide's (sampling/guide.py).  For the new head z is guided instead,
z = z_uncond + s·(z_cond − z_uncond): to first order in the difference that is the same, and u,
which is told s, learns the rest.  So a column takes one evaluation of the head at any scale.

MeanFlow trains u through the integral's derivative, v = u + (t − r)·du/dt.  Here v comes from a
network, without noise: its flow can be followed, and u is regressed to the integral itself, which
gives the same function sooner (docs/sampling.md).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from equimini.flow_head import FlowHead, TimeMLP

INTERVALS = 5  # midpoint steps from ε to a token; their error is 0.8 % of a column's RMS (scenes)
SCALES = (1.0, 5.0)  # of guidance in training
WHOLE_WAY = 2.0  # weight of r = 0, t = 1 in the loss


class ZeroMLP(TimeMLP):
    """One that gives zero before training."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.normal_(self[0].weight, std=0.02)
        for tensor in (self[0].bias, *self[2].parameters()):
            nn.init.zeros_(tensor)


class MeanFlowHead(FlowHead):
    """u(x_t, r, t, z, s): the flow head, told t − r and the guidance scale s as well.

    With a flow head's weights it begins as that head's v(x_t, t, z), to the bit.
    """

    scales = SCALES

    def __init__(self, channels: int, cond_channels: int, width: int, depth: int) -> None:
        super().__init__(channels, cond_channels, width, depth)
        self.span_mlp, self.scale_mlp = ZeroMLP(width), ZeroMLP(width)

    def embed_time(self, t: Tensor, r: Tensor | None = None) -> Tensor:
        """Times 0 ≤ r ≤ t ≤ 1 (…) to (…, width); without r, r = t.

        Raises ValueError for an r outside [0, t].
        """
        span = torch.zeros_like(t) if r is None else t - r
        if r is not None and not torch.compiler.is_compiling() and ((r < 0) | (r > t)).any():
            raise ValueError(f"r must lie in [0, t], got r = {r.flatten().tolist()[:8]} for t = "
                             f"{t.flatten().tolist()[:8]}")
        return super().embed_time(t) + self.span_mlp(span)

    def embed_scale(self, s: Tensor) -> Tensor:
        """What guidance by s (…), within SCALES, adds to `embed_time`: (…, width)."""
        return self.scale_mlp(s)

    def pack(self, packer: Any) -> None:
        """Lay out the weights for sampling, see `FlowHead.pack`."""
        for mlp in (self.span_mlp, self.scale_mlp):
            packer.linears(mlp, rounded=False)
        super().pack(packer)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, r: Tensor | None = None,
                s: Tensor | None = None) -> Tensor:
        """u at x (…, channels), from t down to r, given z (…, cond_channels), under guidance s.

        t, r, s: (…); without r, the velocity; without s, unguided.
        """
        scale = self.embed_scale(torch.ones_like(t) if s is None else s)
        return self.conditioned(x, self.embed_time(t, r) + scale, z)


def guided(both: Iterable[Tensor], s: float | Tensor) -> Tensor:
    """Velocities or z (…, d) under guidance s (…), from those with a class and those without."""
    cond, uncond = both
    return uncond + (s[..., None] if isinstance(s, Tensor) else s) * (cond - uncond)


def follow(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor,
           times: Tensor) -> tuple[Tensor, Tensor]:
    """The flow through x (…, C) at falling `times` (n+1, …), by the midpoint rule.

    Returns the points (n+1, …, C), and the velocities at all but the last (n, …, C).
    """
    points, velocities = [x], []
    for t, r in pairwise(times):
        half = (r - t)[..., None] / 2
        velocities.append(velocity(x, t))
        x = x + 2 * half * velocity(x + half * velocities[-1], (t + r) / 2)
        points.append(x)
    return torch.stack(points), torch.stack(velocities)


def ways(u: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices a ≤ b of the points that M ways lead from and to, of n + 1: u (M, …), uniform.

    The first is the whole way, the others any; a = b, a velocity, is n of the n·(n+3)/2 choices.
    """
    a, b = torch.triu_indices(n + 1, n + 1, device=u.device)[:, :-1]  # without the last velocity
    chosen = (u * len(a)).long()
    chosen[0] = n  # (0, n)
    return a[chosen], b[chosen]


def mean_flow_errors(head: FlowHead, teachers: Sequence[tuple[FlowHead, Tensor]], z: Tensor,
                     u: Tensor, eps: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """(u − (x_t − x_r)/(t − r))² on M ways along each token's flow, the mean over channels.

    teachers: heads with their z (B, N, d), with the class and without; z: (2, B, N, d), of `head`;
    u: (M, B, N), more: (INTERVALS, B, N), uniform; eps: (B, N, C), normal: where the flow starts.
    Returns the errors, weighted by WHOLE_WAY, and t, both (M, B, N).
    """
    n = INTERVALS
    with torch.no_grad():
        s = SCALES[0] + (SCALES[1] - SCALES[0]) * more[0]
        k = torch.arange(1, n, device=u.device)[:, None, None]
        inner = (k + 0.9 * (more[1:] - 0.5)) / n
        times = torch.cat((torch.ones_like(s)[None], 1 - inner, torch.zeros_like(s)[None]))
        x, v = follow(lambda x, t: guided((h(x, t, z_h).float() for h, z_h in teachers), s), eps,
                      times)
        a, b = ways(u, n)
        t, r = times.gather(0, a), times.gather(0, b)
        x_t, x_r, v_t = (torch.take_along_dim(y, i[..., None], 0)
                         for y, i in ((x, a), (x, b), (v, a.clamp(max=n - 1))))
        average = torch.where((a == b)[..., None], v_t, (x_t - x_r) / (t - r)[..., None])
    predicted = head(x_t, t, guided(z, s), r, s.expand_as(t)).float()
    errors = (predicted - average).square().mean(3)
    weight = torch.ones_like(u[:, :1, :1])
    weight[0] = WHOLE_WAY
    return errors * weight / weight.mean(), t
