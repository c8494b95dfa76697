"""Rotary position embedding (RoPE) with interleaved pairs, in float32.

Channels 2i and 2i+1 of a head form a pair that turns by an angle position · θ_i,
θ_i = 10000^(−2i/D).  A dot product of two rotated vectors then depends on the difference of
their positions alone: that makes attention with rotated queries *and* keys shift-invariant,
which is what equivariant image modeling needs.  Where only one side is rotated (our
cross-attention: queries are, class keys are not) the absolute position shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # (cos, sin), each (positions, D/2) or (B, positions, D/2), float32


def rope_tables(positions: Tensor, head_dim: int, base: float = 10000.0) -> Rope:
    """Cosines and sines of every position's angles.

    positions: integers, any sign, (N,), or (B, N) where images differ.  Returns (cos, sin), each
    (…, N, head_dim/2), float32.
    The angle is formed in float64, so that columns far out in a long image stay exact.
    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even to form pairs, got {head_dim}")
    device = positions.device
    positions = positions.cpu() if device.type == "mps" else positions  # MPS has no float64
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64)
    angle = positions.double()[..., None] * base ** (-pair / head_dim)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate every pair (a, b) of x to (a·cos − b·sin, b·cos + a·sin).

    x: (B, N, H, D) of any dtype; rope: tables of N (or B × N) positions.  Same shape and dtype as
    x; computed in float32 (float64 for float64).
    """
    cos, sin = (table[..., None, :] for table in rope)  # (N, 1, D/2) or (B, N, 1, D/2)
    compute = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(compute).unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, H, D/2) each
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)
