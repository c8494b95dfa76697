"""Columns of a feature map as tokens (Eq. 3), and tokens as columns again (Eq. 4).

A feature map F (B, C, H, W) becomes a sequence of W vectors of C·H values: column w, index
c·H + h.  Nothing else happens here; the linear maps around it are convolutions over the
sequence (Conv1d over neighbouring columns), which commute with a shift along x.

The paper's 2-D baselines cut square maps otherwise, in raster order.  Layout "grid": p×p patches
of p×p positions, as many tokens of the same size; "positions": each position alone, of C values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def columnize(feature_map: Tensor, layout: str = "columns") -> Tensor:
    """(B, C, H, W) to (B, C·H, W), value c·H + h of column w being F[c, h, w] (Eq. 3).

    For 'grid', H = W = p²: (B, C·p², p²), value (c·p + i)·p + j of token y·p + x being
    F[c, y·p + i, x·p + j].  For 'positions', H = W: (B, C, H·W), token y·W + x being F[:, y, x].
    """
    if layout == "grid":
        feature_map = F.pixel_unshuffle(feature_map, math.isqrt(feature_map.shape[2]))
    return feature_map.flatten(1, 2) if layout == "columns" else feature_map.flatten(2)


def rasterize(tokens: Tensor, rows: int, layout: str = "columns") -> Tensor:
    """(B, C·H, W) back to (B, C, H=rows, W) (Eq. 4); the inverse of `columnize`."""
    if layout == "columns":
        return tokens.unflatten(1, (-1, rows))
    p = math.isqrt(tokens.shape[2])
    return F.pixel_shuffle(tokens.unflatten(2, (p, p)), rows // p)  # 'positions': p = rows


class ReflectPad(torch.autograd.Function):
    """`reflect_pad` with its gradient written out: torch's own has no deterministic CUDA kernel,
    and that of slices would be three arrays of zeros as large as the map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim, n = dim, x.shape[dim]
        return torch.cat((x.narrow(dim, 1, 1), x, x.narrow(dim, n - 2, 1)), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        dim, n = ctx.dim, grad.shape[ctx.dim] - 2
        inner = grad.narrow(dim, 1, n).clone()
        inner.select(dim, 1).add_(grad.select(dim, 0))
        inner.select(dim, n - 2).add_(grad.select(dim, n + 1))
        return inner, None


def reflect_pad(x: Tensor, dim: int) -> Tensor:
    """One reflected row on both sides of `dim` (size ≥ 2)."""
    return ReflectPad.apply(x, dim)


class ColumnConv(nn.Conv1d):
    """Conv1d over neighbouring columns, kernel 3, reflected at the ends: (B, C, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(reflect_pad(x, -1))


class GridConv(nn.Sequential):
    """What stands in for ColumnConv where tokens are in raster order: (B, C, p²).

    Neighbours in raster order are not neighbours in the picture, so it is a 3×3 convolution over
    the p×p grid, reflected at the borders.  That has three times the weights of a ColumnConv; a
    1×1 convolution on the side of more channels narrows it until both have the same number
    (nothing is applied between the two, so together they are one linear map, as ColumnConv is).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        few, many = sorted((in_channels, out_channels))
        between = max(1, round(3 * few * many / (9 * few + many)))
        widen = in_channels < out_channels
        super().__init__(nn.Conv2d(in_channels, between, 3 if widen else 1),
                         nn.Conv2d(between, out_channels, 1 if widen else 3))

    def forward(self, x: Tensor) -> Tensor:
        p = math.isqrt(x.shape[-1])
        x = x.unflatten(2, (p, p))
        for conv in self:
            x = conv(reflect_pad(reflect_pad(x, -1), -2) if conv.kernel_size == (3, 3) else x)
        return x.flatten(2)


TOKEN_CONV = {"columns": ColumnConv, "grid": GridConv, "positions": GridConv}  # by layout
