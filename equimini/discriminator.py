"""The critics of the tokenizer's adversarial loss: PatchGAN, and heads on a frozen network.

A critic works in two halves: `features` is frozen (and empty in PatchGAN), `logits` is trained.
The features of x̂ serve the autoencoder's step and the critic's, so the frozen half runs twice a
step, on x̂ and on x, and backwards once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchGAN(nn.Sequential):
    """Convolutional critic that judges overlapping patches (latent diffusion's layout).

    `layers` strided 4×4 convs, one more without stride, then one to a map of logits: images
    (B, 3, H, W) to (B, 1, h, w).
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        c = channels
        for i in range(1, layers + 1):
            c_in, c = c, channels * min(2 ** i, 8)
            stride = 2 if i < layers else 1
            modules += [nn.Conv2d(c_in, c, 4, stride, 1, bias=False), nn.BatchNorm2d(c),
                        nn.LeakyReLU(0.2)]
        super().__init__(*modules, nn.Conv2d(c, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def features(self, images: Tensor, rngs: list[np.random.Generator]) -> list[Tensor]:
        """The images themselves: nothing is frozen, nothing drawn."""
        return [images]

    def logits(self, features: list[Tensor]) -> Tensor:
        """(B, 1, h, w)."""
        return self(features[0])


class Moved(torch.autograd.Function):
    """Of each image a piece of height × width, from rows `tops` and columns `lefts` on; with its
    gradient, since that of a slice would be zeros of the whole size for each image."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, tops: list[int], lefts: list[int], height: int,
                width: int) -> Tensor:
        ctx.places, ctx.shape = (tops, lefts), images.shape
        return torch.stack([x[:, i:i + height, j:j + width]
                            for x, i, j in zip(images, tops, lefts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        whole, (height, width) = grad.new_zeros(ctx.shape), grad.shape[2:]
        for x, g, i, j in zip(whole, grad, *ctx.places):
            x[:, i:i + height, j:j + width] = g
        return whole, None, None, None, None


def augment(images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
    """Differentiable augmentation, drawn for each image from its own generator.

    Translation by whole pixels, at most round(side / 8), filled with zeros; brightness ± 0.5;
    saturation × U(0, 2); contrast × U(0.5, 1.5); a zeroed rectangle of round(0.2 · side) around
    a random centre.  images: (B, 3, H, W) in [−1, 1]; the result is not clipped.
    """
    height, width = images.shape[2:]
    u = np.stack([rng.random(7) for rng in rngs])  # (B, 7)
    dy, dx = round(height / 8), round(width / 8)
    padded = F.pad(images, (dx, dx, dy, dy))
    tops, lefts = (u[:, 0] * (2 * dy + 1)).astype(int), (u[:, 1] * (2 * dx + 1)).astype(int)
    x = Moved.apply(padded, tops.tolist(), lefts.tolist(), height, width)

    brightness, saturation, contrast = (
        torch.from_numpy(u[:, k].astype(np.float32)).to(x.device).view(-1, 1, 1, 1)
        for k in (2, 3, 4))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    level = x.mean((1, 2, 3), keepdim=True)
    x = level + (x - level) * (contrast + 0.5)

    rows = cut(height, u[:, 5]).to(x.device)[:, None, :, None]
    columns = cut(width, u[:, 6]).to(x.device)[:, None, None, :]
    return x.masked_fill(rows & columns, 0.0)


def cut(side: int, u: np.ndarray) -> Tensor:
    """Which of `side` pixels a stretch of round(0.2 · side) covers, (B, side) bool; its centre is
    uniform over the side, so at the borders a part of it may lie outside."""
    length = round(0.2 * side)
    first = (u * (side + 1 - length % 2)).astype(int) - length // 2
    distance = torch.arange(side) - torch.from_numpy(first)[:, None]
    return (distance >= 0) & (distance < length)


class VirtualBatchNorm(nn.Module):
    """Normalisation of (B, C, L) over positions and the samples of a group.

    The batch is cut into ⌈B/8⌉ consecutive groups, as equal as they can be (B = 9: 5 and 4).
    Biased variance, eps 1e-6, no running statistics; in float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        groups, x = math.ceil(len(x) / 8), x.float()
        # equal groups all at once: a GPU's kernels are few then
        parts = ([x.unflatten(0, (groups, -1))] if len(x) % groups == 0 else
                 [part[None] for part in x.tensor_split(groups)])  # (g, b, C, L) each
        normal = []
        for part in parts:
            variance, mean = torch.var_mean(part, (1, 3), correction=0, keepdim=True)
            normal.append(((part - mean) * (variance + 1e-6).rsqrt()).flatten(0, 1))
        return torch.cat(normal) * self.weight + self.bias


class CircularConv(nn.Conv1d):
    """Conv1d, kernel 9, whose positions form a ring of any length."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=9)

    def forward(self, x: Tensor) -> Tensor:
        length, turns = x.shape[2], math.ceil(4 / x.shape[2])
        ring = x.repeat(1, 1, 2 * turns + 1)  # indices would have no deterministic backward
        return super().forward(ring.narrow(2, turns * length - 4, length + 8))


class Head(nn.Module):
    """Logits (B, 1, L) from features (B, C, L); every convolution is spectrally normalised."""

    def __init__(self, c_in: int, channels: int) -> None:
        super().__init__()
        self.conv_in = spectral_norm(nn.Conv1d(c_in, channels, 1))
        self.norm_in = VirtualBatchNorm(channels)
        self.conv = spectral_norm(CircularConv(channels))
        self.norm = VirtualBatchNorm(channels)
        self.conv_out = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm_in(self.conv_in(x)), 0.2)
        x = (x + F.leaky_relu(self.norm(self.conv(x)), 0.2)) / math.sqrt(2)
        return self.conv_out(x)


class FeatureCritic(nn.Module):
    """The "stronger" discriminator: a head on each intermediate feature map of a frozen network.

    frozen: DinoFeatures or ScriptFeatures.  Augmentation is always on, and drawn anew for every
    call of `features`, so separately for real and decoded images.
    """

    def __init__(self, frozen: nn.Module, channels: int) -> None:
        super().__init__()
        self.frozen = [frozen]  # in a list: no part of the weights or of the state dict
        self.heads = nn.ModuleList(Head(c, channels) for c in frozen.channels)

    def features(self, images: Tensor, rngs: list[np.random.Generator]) -> list[Tensor]:
        """Those of the augmented images, [(B, C, L), …]; images: (B, 3, H, W) in [−1, 1]."""
        return self.frozen[0](augment(images, rngs), rngs[0])

    def logits(self, features: list[Tensor]) -> Tensor:
        """Of all heads, (B, 1, ΣL)."""
        return torch.cat([head(x.float()) for head, x in zip(self.heads, features)], 2)
