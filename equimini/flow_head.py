"""The flow-matching head: an MLP v_θ(x_t, t, z) that moves noise towards one token (Eq. 8).

On the straight path x_t = t·ε + (1−t)·x the velocity is ε − x: at t = 1 there is only noise, at
t = 0 the token.  The head depends on t and the transformer's output z through adaLN: each block's
shift, scale and gate are linear in SiLU(y), y = MLP(t) + Linear(z).  They do not depend on x_t.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.layers import LayerNorm, maybe_recomputed, widened, without_autocast, xavier

TIME_CHANNELS = 256  # of the sinusoidal embedding


def time_embedding(t: Tensor) -> Tensor:
    """Sinusoidal embedding of t (not of 1000·t): any shape to (…, 256), cosines first.

    Float32, also for a t of fewer bits; float64 for float64.
    """
    t, half = widened(t), TIME_CHANNELS // 2
    k = torch.arange(half, device=t.device, dtype=t.dtype)
    angle = t[..., None] * torch.exp(-math.log(10000) * k / half)
    return torch.cat((angle.cos(), angle.sin()), -1)


class TimeMLP(nn.Sequential):
    """Numbers (…), say times t in [0, 1], to vectors (…, width)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        x = time_embedding(t)
        with without_autocast(x):  # most cosines are so close to 1 that bfloat16 takes them for 1
            x = self[0](x)
        return self[2](self[1](x))


class VelocityHead(Protocol):
    """What a sampler asks of a head; a generator's `head` may be any module that offers this.

    scales: None if guidance takes the velocities of both branches; else the smallest and largest
    guidance scale of a head that is told the scale (`embed_scale`) and takes a guided z instead,
    see `equimini.mean_flow`.
    """

    scales: tuple[float, float] | None

    def embed_time(self, t: Tensor) -> Tensor:
        """Times t (T,) to what `modulations` takes of them, (T, width)."""

    def modulations(self, time: Tensor, z: Tensor) -> Sequence[tuple[Tensor, ...]]:
        """All that depends on time (T, 1, width) and z (rows, d), but not on x: (T, rows, …)."""

    def velocity(self, x: Tensor, modulations: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """v (rows, channels) at x (rows, channels), from the modulations of one time."""

    def pack(self, packer: Any) -> None:
        """Lay out the weights for sampling alone, see sampling/packed_weights.py."""


class HeadBlock(nn.Module):
    """x += gate · MLP((1 + scale)·LN(x) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.ada = nn.Linear(width, 3 * width)

    def modulation(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """shift, 1 + scale and gate, (…, width) each, of the condition y (…, width)."""
        shift, scale, gate = self.ada(y).chunk(3, -1)
        return shift, 1 + scale, gate

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shift, factor, gate = modulation  # (…, width), as x
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, factor, self.norm(x))))

    def conditioned(self, x: Tensor, y: Tensor) -> Tensor:
        """The same, from the condition y (…, width)."""
        return self(x, self.modulation(y))


class FlowHead(nn.Module):
    """The velocity field of one token.

    channels: of a token; cond_channels: of z; width and depth of the MLP.
    """

    scales = None

    def __init__(self, channels: int, cond_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.x_in = nn.Linear(channels, width)
        self.z_in = nn.Linear(cond_channels, width)
        self.time_mlp = TimeMLP(width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.norm_out = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_out = nn.Linear(width, 2 * width)
        self.x_out = nn.Linear(width, channels)
        self.recompute = False  # blocks again in the backward pass, see Generator
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier, but zero in adaLN and output: at first v = 0, and the blocks add nothing."""
        self.apply(xavier)
        for i in (0, 2):
            nn.init.normal_(self.time_mlp[i].weight, std=0.02)
        for layer in (*(block.ada for block in self.blocks), self.ada_out, self.x_out):
            nn.init.zeros_(layer.weight)

    def embed_time(self, t: Tensor) -> Tensor:
        """MLP(t): times t (…) in [0, 1] to (…, width)."""
        return self.time_mlp(t)

    def modulations(self, time: Tensor, z: Tensor) -> list[tuple[Tensor, ...]]:
        """Every block's (shift, 1 + scale, gate) and the output's (shift, 1 + scale).

        time: `embed_time` of t, (…, width); z: (…, cond_channels).  Nothing here depends on x: a
        sampler may ask for many times at once, before it has the first x.
        """
        y = self.condition(time, z)
        last = self.modulation_out(y)
        return [*(block.modulation(y) for block in self.blocks), last]

    def condition(self, time: Tensor, z: Tensor) -> Tensor:
        """SiLU(y) (…, width), which every modulation is linear in."""
        return F.silu(time + self.z_in(z))

    def modulation_out(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The output's shift and 1 + scale, (…, width) each, of the condition y (…, width)."""
        shift, scale = self.ada_out(y).chunk(2, -1)
        return shift, 1 + scale

    def velocity(self, x: Tensor, modulations: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """v (…, channels) at x (…, channels): the part of the head that depends on x."""
        *of_blocks, last = modulations
        x = widened(self.x_in(x))
        for block, modulation in zip(self.blocks, of_blocks):
            x = block(x, modulation)
        return self.output(x, last)

    def output(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """What the last block left (…, width) to v (…, channels)."""
        shift, factor = modulation
        return self.x_out(torch.addcmul(shift, factor, self.norm_out(x)))

    def pack(self, packer: Any) -> None:
        """Lay out the weights for sampling; those of the time MLP, read once, are not rounded."""
        packer.linears(self.time_mlp, rounded=False)
        packer.linears(self)
        self.blocks = nn.ModuleList(map(packer.residual_block, self.blocks))

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Velocity at x (…, channels), t (…) in [0, 1], given z (…, cond_channels).

        Leading shapes broadcast: with x, t of (M, B, N, …) one z of (B, N, …) serves M draws.
        """
        return self.conditioned(x, self.embed_time(t), z)

    def conditioned(self, x: Tensor, time: Tensor, z: Tensor) -> Tensor:
        """The same, from what `embed_time` made of t, (…, width)."""
        if not self.recompute:
            return self.velocity(x, self.modulations(time, z))
        y, x = self.condition(time, z), widened(self.x_in(x))
        last = self.modulation_out(y)  # first, as above: so gradients add up in the same order
        for block in self.blocks:
            x = maybe_recomputed(True, block.conditioned, x, y)
        return self.output(x, last)
