"""Columns of a feature map as tokens (Eq. 3), and tokens as columns again (Eq. 4).

A feature map F (B, C, H, W) becomes a sequence of W vectors of C·H values: column w, index
c·H + h.  Nothing else happens here; the linear maps around it are convolutions over the
sequence (Conv1d over neighbouring columns), which commute with a shift along x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def columnize(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C·H, W), value c·H + h of column w being F[c, h, w] (Eq. 3)."""
    return feature_map.flatten(1, 2)


def rasterize(columns: Tensor, rows: int) -> Tensor:
    """(B, C·H, W) back to (B, C, H=rows, W) (Eq. 4)."""
    return columns.unflatten(1, (-1, rows))


def reflect_pad(x: Tensor, dim: int) -> Tensor:
    """One reflected row on both sides of `dim` (size ≥ 2).

    Made of slices, because the backward of torch's own reflection padding has no deterministic
    CUDA kernel.
    """
    n = x.shape[dim]
    return torch.cat((x.narrow(dim, 1, 1), x, x.narrow(dim, n - 2, 1)), dim)


class ColumnConv(nn.Conv1d):
    """Conv1d over neighbouring columns, kernel 3, reflected at the ends: (B, C, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(reflect_pad(x, -1))
