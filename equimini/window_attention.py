"""Windowed causal attention (Eq. 7): the operator, and its pure-PyTorch reference.

Query i sees the `window` keys that end at its own position, itself counted:

    o_i = softmax(q_i · K_{i−W+1..i}ᵀ · scale) · V_{i−W+1..i}

so every token of the scroll looks back over the same distance and no position is special.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equimini.rope import Rope, rotate


def window_mask(n_q: int, n_k: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """(Nq, Nk) bool, True where query i, at position Nk − Nq + i, sees key j."""
    behind = (torch.arange(n_q, device=device)[:, None] + (n_k - n_q)
              - torch.arange(n_k, device=device)[None, :])  # how far key j lies behind query i
    return (behind >= 0) & (behind < window)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, *, rope: Rope | None = None,
                     dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Windowed causal attention.

    q: (B, Nq, H, D); k, v: (B, Nk, H, D) with Nk ≥ Nq.  window counts the token itself:
    window ≥ Nk is full causal attention, window = 1 returns v.  rope: tables of the Nk keys'
    positions; the queries stand at the last Nq of them.  scale: 1/√D unless given.
    Returns (B, Nq, H, D) in q's dtype; the softmax runs in float32 (float64 for float64).
    Raises ValueError for shapes or a window that do not fit.
    """
    _check(q, k, v, window, rope)
    (_, n_q, _, d), n_k = q.shape, k.shape[1]
    scale = d ** -0.5 if scale is None else scale
    if rope is not None:
        cos, sin = rope
        q, k = rotate(q, (cos[n_k - n_q:], sin[n_k - n_q:])), rotate(k, (cos, sin))
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v_ = (x.transpose(1, 2).to(compute) for x in (q, k, v))  # (B, H, N, D)
    s = (q * scale) @ k.transpose(-1, -2)  # (B, H, Nq, Nk)
    s = s.masked_fill(~window_mask(n_q, n_k, window, q.device), float("-inf"))
    p = torch.nn.functional.dropout(s.softmax(-1), dropout_p)
    return (p @ v_).transpose(1, 2).to(v.dtype)  # (B, Nq, H, D)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, rope: Rope | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be (B, N, H, D), got {tuple(q.shape)}, {tuple(k.shape)}")
    b, n_q, h, d = q.shape
    if k.shape != (b, k.shape[1], h, d) or v.shape != k.shape:
        raise ValueError(f"k and v must be (B={b}, Nk, H={h}, D={d}) like q, "
                         f"got {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[1] < n_q:
        raise ValueError(f"k must hold at least as many tokens as q ({n_q}), got {k.shape[1]}")
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), got {window}")
    if rope is not None and any(t.shape != (k.shape[1], d // 2) for t in rope):
        raise ValueError(f"rope tables must be (Nk={k.shape[1]}, D/2={d // 2}), "
                         f"got {[tuple(t.shape) for t in rope]}")
