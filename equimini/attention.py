"""Windowed causal attention (Eq. 7): the operator, its reference, and where a binary comes in.

Query i sees the `window` keys that end at its own position, itself counted:

    o_i = softmax(q_i · K_{i−W+1..i}ᵀ · scale) · V_{i−W+1..i}

so every token of the scroll looks back over the same distance and no position is special.

Plain PyTorch, the reference, is below and the text to read first.  What runs is an operator of
PyTorch (kernel/operators.py) to which a binary adds C++ for CPUs and CUDA for NVIDIA GPUs
(kernel/binary.py, csrc/); `implementation(device)` says which of them attends.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any, Callable, TypeVar

import torch
from torch import Tensor

from equimini.kernel import binary, operators
from equimini.rope import Rope, rotate

Result = TypeVar("Result")
implementation, why_reference = binary.implementation, binary.why_reference
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, *, rope: Rope | None = None,
                     dropout_p: float = 0.0, seed: Tensor | int | None = None,
                     scale: float | None = None) -> Tensor:
    """Windowed causal attention.

    q: (B, Nq, H, D); k, v: (B, Nk, H, D) with Nk ≥ Nq, D a multiple of 8 up to 128.  Query i
    stands at position Nk − Nq + i.  window counts the token itself: window ≥ Nk is full causal
    attention, window = 1 returns v.  Slices of one packed (B, N, 3, H, D) projection are read
    in place; a tensor whose last dimension is not contiguous is copied first.

    rope: (cos, sin) tables of the Nk keys' positions, each (Nk, D/2) float32; q and k are
    rotated as they are read.  dropout_p in [0, 1) drops attention weights; which ones is a
    function of (seed, batch, head, position of the query, key) alone, the same in every
    implementation.  seed: an int64 tensor of one element on q's device (so that a captured
    CUDA graph can draw anew), an int, or None to draw one from torch's generator.
    scale: 1/√D unless given.

    Returns (B, Nq, H, D), contiguous, in q's dtype (under autocast: autocast's dtype); sums
    and softmax run in float32 (float64 for float64, which the CUDA kernels do not take).
    Differentiable in q, k and v, in every mode of torch and to any order.  A NaN or an infinity
    spoils what depends on it and may spoil, in the same head of the same batch entry, tokens up
    to a tile of 64 beyond that (0 · NaN is NaN); in the reference, whose tile is everything, all.
    Raises ValueError or TypeError, naming the argument, for what does not fit.
    """
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, window, rope, dropout_p)
    cos, sin = (None, None) if rope is None else rope
    seed = _seed_tensor(seed, q.device) if dropout_p else None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return operators.attend(q, k, v, cos, sin, seed, window, float(dropout_p), scale)[0]


def window_mask(n_q: int, n_k: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """(Nq, Nk) bool, True where query i, at position Nk − Nq + i, sees key j."""
    _check_window(window)
    behind = (torch.arange(n_q, device=device)[:, None] + (n_k - n_q)
              - torch.arange(n_k, device=device)[None, :])  # how far key j lies behind query i
    return (behind >= 0) & (behind < window)


def keep_mask(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """(B, H, Nq, Nk) bool, True where dropout keeps the weight of a (query, key) pair.

    A chain of 32-bit hashes (MurmurHash3's finalizer) over seed, batch, head, position of the
    query, key; a pair is dropped where the last one falls under dropout_p · 2³².  csrc/attention.h
    holds the same function.
    """
    b, h, n_q, n_k = shape
    b, h, i, j = (torch.arange(n, device=seed.device) for n in (b, h, n_q, n_k))
    seed = seed.reshape(1, 1, 1, 1)
    state = _mix((seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    state = _mix(state ^ (seed >> 32 & 0xFFFFFFFF))
    state = _mix(state ^ b[:, None, None, None])
    state = _mix(state ^ h[:, None, None])
    state = _mix(state ^ (i + n_k - n_q)[:, None])
    return _mix(state ^ j) >= int(dropout_p * 2**32)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on 32-bit values held in int64 (products wrap around)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


# The reference -----------------------------------------------------------------------------


def _rotated(q: Tensor, k: Tensor, cos: Tensor | None,
             sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotated q and k as (B, H, N, D), in the dtype of sums."""
    n_q, n_k = q.shape[1], k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(compute), k.to(compute)
    if cos is not None:
        q, k = rotate(q, (cos[n_k - n_q:], sin[n_k - n_q:])), rotate(k, (cos, sin))
    return q.transpose(1, 2), k.transpose(1, 2)


def _weights(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, window: int,
             scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k as (B, H, N, D); scores and their softmax, (B, H, Nq, Nk)."""
    n_q, n_k = q.shape[1], k.shape[1]
    q, k = _rotated(q, k, cos, sin)
    s = (q * scale) @ k.transpose(-1, -2)  # (B, H, Nq, Nk)
    s.masked_fill_(~window_mask(n_q, n_k, window, q.device), float("-inf"))
    return q, k, s, s.softmax(-1)


def _keep(seed: Tensor | None, p: Tensor, dropout_p: float) -> Tensor | float:
    """What dropout multiplies the weights p with: 0 or 1/(1−dropout_p); 1 without a seed."""
    if seed is None:
        return 1.0
    return keep_mask(seed, p.shape, dropout_p).to(p.dtype) / (1 - dropout_p)


def _without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, whose products keep the dtypes that it gives them."""
    @functools.wraps(function)
    def call(first: Tensor, *rest: Any) -> Result:
        if first.device.type == "meta":  # which autocast does not know
            return function(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)
    return call


@_without_autocast
def reference_forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None,
                      seed: Tensor | None, window: int, dropout_p: float,
                      scale: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: the output (B, Nq, H, D) and the log-sum-exp of every row, (B, H, Nq)."""
    _, _, s, p = _weights(q, k, cos, sin, window, scale)
    lse = s.amax(-1) - p.amax(-1).log()  # the largest weight is exp(largest score − lse)
    if seed is not None:
        p = p * _keep(seed, p, dropout_p)
    out = (p @ v.to(p.dtype).transpose(1, 2)).transpose(1, 2)  # (B, Nq, H, D)
    return out.to(v.dtype).contiguous(), lse


@_without_autocast
def reference_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       cos: Tensor | None, sin: Tensor | None, seed: Tensor | None, window: int,
                       dropout_p: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) from grad (B, Nq, H, D); the weights P are computed again.

        dV = P̃ᵀ dO      dP̃ = dO Vᵀ      dS = P ∘ (dP − δ)      dQ = dS K · scale, dK = dSᵀ Q · scale

    P̃ is P after dropout, dP the gradient before it, and δ_i = Σ_j P_ij dP_ij = o_i · do_i: where a
    kernel does not hold a whole row of P at once, it takes P from lse and δ from out.
    """
    n_q, n_k = q.shape[1], k.shape[1]
    dtype = q.dtype
    q, k, _, p = _weights(q, k, cos, sin, window, scale)
    grad, v = (x.to(p.dtype).transpose(1, 2) for x in (grad, v))
    keep = _keep(seed, p, dropout_p)
    dp = grad @ v.transpose(-1, -2) * keep  # (B, H, Nq, Nk)
    dv = (p * keep).transpose(-1, -2) @ grad
    ds = (dp - (p * dp).sum(-1, keepdim=True)) * p * scale
    dq, dk, dv = (x.transpose(1, 2) for x in (ds @ k, ds.transpose(-1, -2) @ q, dv))
    if cos is not None:  # the gradient turns back by the same angle
        dq, dk = rotate(dq, (cos[n_k - n_q:], -sin[n_k - n_q:])), rotate(dk, (cos, -sin))
    return tuple(x.to(dtype).contiguous() for x in (dq, dk, dv))


@_without_autocast
def reference_tangent(q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, k_dot: Tensor,
                      v_dot: Tensor, cos: Tensor | None, sin: Tensor | None, seed: Tensor | None,
                      window: int, dropout_p: float, scale: float) -> Tensor:
    """How the output moves, (B, Nq, H, D), when q, k and v move by q_dot, k_dot and v_dot.

        Ṡ = (Q̇ Kᵀ + Q K̇ᵀ) · scale      Ṗ = P ∘ (Ṡ − Σ_j P_ij Ṡ_ij)      Ȯ = Ṗ̃ V + P̃ V̇

    The tilde is dropout.  Whatever computed the output, its tangent is this.
    """
    dtype = v.dtype
    q_dot, k_dot = _rotated(q_dot, k_dot, cos, sin)
    q, k, _, p = _weights(q, k, cos, sin, window, scale)
    v, v_dot = (x.to(p.dtype).transpose(1, 2) for x in (v, v_dot))
    keep = _keep(seed, p, dropout_p)
    s_dot = (q_dot @ k.transpose(-1, -2) + q @ k_dot.transpose(-1, -2)) * scale  # (B, H, Nq, Nk)
    p_dot = p * (s_dot - (p * s_dot).sum(-1, keepdim=True))
    out = (p_dot * keep) @ v + (p * keep) @ v_dot
    return out.transpose(1, 2).to(dtype).contiguous()


operators.fall_back_on(operators.Reference(  # looked up when called: tests replace them
    lambda *args: reference_forward(*args), lambda *args: reference_backward(*args),
    lambda *args: reference_tangent(*args)))


# Arguments ---------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, rope: Rope | None,
           dropout_p: float) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be (B, N, H, D), got {tuple(q.shape)}, {tuple(k.shape)}")
    (b, n_q, h, d), n_k = q.shape, k.shape[1]
    if k.shape != (b, n_k, h, d) or v.shape != k.shape:
        raise ValueError(f"k and v must be (B={b}, Nk, H={h}, D={d}) like q, "
                         f"got {tuple(k.shape)}, {tuple(v.shape)}")
    if d % 8 or not 8 <= d <= 128:
        raise ValueError(f"q's head size D must be a multiple of 8 up to 128, got {d}")
    if n_k < n_q:
        raise ValueError(f"k must hold at least as many tokens as q ({n_q}), got {n_k}")
    _check_window(window)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must share one of {[str(t)[6:] for t in DTYPES]}, "
                        f"got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"k and v must be on q's device ({q.device}), got {k.device}, {v.device}")
    if rope is not None:
        for name, table in zip(("cos", "sin"), rope, strict=True):
            if table.shape != (n_k, d // 2):
                raise ValueError(f"rope's {name} must be (Nk={n_k}, D/2={d // 2}), "
                                 f"got {tuple(table.shape)}")
            if table.requires_grad:
                raise ValueError(f"rope's {name} takes no gradient: detach it")
            if table.dtype != torch.float32 or table.device != q.device:
                raise TypeError(f"rope's {name} must be float32 on q's device ({q.device}), "
                                f"got {table.dtype} on {table.device}")


def _check_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"window must be one whole number, got {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), got {window}")


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The dropout seed as an int64 tensor of one element on `device`."""
    if seed is None:  # 31 bits: wider bounds become 32-bit numbers in what inductor compiles
        return torch.randint(2**31, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed must be one int64 on q's device ({device}), got "
                         f"{tuple(seed.shape)} {seed.dtype} on {seed.device}")
    return seed
