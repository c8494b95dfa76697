"""What `bench attention` compares with: windowed attention as torch, and JAX, ship it.

A peer is made for (batch, tokens, window, device) and attends over q, k, v of (B, N, H, D) each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from equimini.attention import window_mask
from equimini.utils.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
aten = torch.ops.aten


def _heads_first(attend: Callable[..., Tensor], **how: object) -> Attend:
    """A function of (B, H, N, D) as one of (B, N, H, D)."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v)), **how).transpose(1, 2)


def sdpa(b: int, n: int, window: int, device: str) -> Attend:
    """Torch's scaled_dot_product_attention with the window as a mask."""
    return _heads_first(F.scaled_dot_product_attention, attn_mask=window_mask(n, n, window, device))


def flex(b: int, n: int, window: int, device: str, parts: int = 1) -> Attend:
    """Compiled FlexAttention; its mask keeps the same W keys (many examples keep W + 1).

    parts: how many sequences of equal length the n tokens are.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < window)
        return near & (i - j <= i % (n // parts)) if parts > 1 else near

    _prepare_to_compile()
    mask = create_block_mask(visible, None, None, n, n, device=device,
                             _compile=device == "cuda")  # else n × n lies in memory
    return _heads_first(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def flex_folded(b: int, n: int, window: int, device: str) -> Attend:
    """FlexAttention over the whole batch as one sequence, whose short parts share its blocks."""
    attend = flex(1, b * n, window, device, parts=b)
    return lambda q, k, v: attend(*(x.flatten(0, 1)[None] for x in (q, k, v))).view_as(q)


def shifts(b: int, n: int, window: int, device: str) -> Attend:
    """The plain formula, compiled: W products of q and k, k shifted by 0 … W − 1 tokens."""
    if window > 32:
        raise UserError("windows up to 32 only: each shift is a part of the compiled graph")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def shifted(x: Tensor, by: int) -> Tensor:
            return F.pad(x[:, :n - by], (0, 0, 0, 0, by, 0))

        seen = torch.arange(n, device=q.device)[:, None]
        s = torch.stack([torch.where(seen >= by, (q * shifted(k, by)).sum(-1).float(),
                                     float("-inf")) for by in range(min(window, n))], -1)
        p = (s * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype)  # (B, N, H, W)
        return sum(p[..., by, None] * shifted(v, by) for by in range(min(window, n)))

    _prepare_to_compile()
    return torch.compile(attend, dynamic=False)


def _prepare_to_compile() -> None:
    torch._dynamo.reset()  # after 8 shapes it would run uncompiled
    torch._functorch.config.donated_buffer = False  # a backward pass is timed again and again


class Efficient(torch.autograd.Function):
    """Memory-efficient attention (xFormers' kernels in torch): its window counts the token."""

    CAUSAL = 1  # query i sees keys up to i

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        out, lse, *random, n_q, n_k = aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, Efficient.CAUSAL, True, window_size=window)
        ctx.save_for_backward(q, k, v, out, lse, *random)
        ctx.sizes, ctx.window = (n_q, n_k), window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, *random = ctx.saved_tensors
        return *aten._efficient_attention_backward(
            grad, q, k, v, None, out, None, None, *ctx.sizes, lse, 0.0, *random,
            Efficient.CAUSAL, False, window_size=ctx.window)[:3], None


def efficient(b: int, n: int, window: int, device: str) -> Attend:
    """torch's memory-efficient attention with a local window, (B, N, H, D) each; CUDA alone."""
    _need_cuda(device)
    return lambda q, k, v: Efficient.apply(q, k, v, window)


def flash2(b: int, n: int, window: int, device: str) -> Attend:
    """FlashAttention-2 as torch ships it, with its own local window."""
    _need_cuda(device)
    return lambda q, k, v: aten._flash_attention_forward(
        q, k, v, None, None, n, n, 0.0, False, False, window_size_left=window - 1,
        window_size_right=0)[0]


def _need_cuda(device: str) -> None:
    if device not in ("cuda", "meta"):
        raise UserError("its kernels are for CUDA alone")


PEERS: dict[str, Callable[..., Attend]] = {
    "sdpa": sdpa, "flex": flex, "flex-folded": flex_folded, "shifts": shifts,
    "efficient": efficient, "flash2": flash2}

# cuDNN, by way of JAX, in a process of its own: two libraries do not share a GPU's memory well.
IN_JAX = """
import json, statistics, sys, time
import jax, jax.numpy as jnp, numpy as np
folder, window, dtype, kind, repeats = json.loads(sys.argv[1])
q, k, v, grad = (jnp.asarray(x, dtype) for x in np.load(folder + "/in.npy"))
attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(
    q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation=kind))
out, pull = jax.vjp(attend, q, k, v)
pull = jax.jit(pull)
np.save(folder + "/out.npy", np.stack([np.asarray(x, np.float32) for x in (out, *pull(grad))]))
def seconds(call):
    def once():
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(20)])  # queued: launches overlap
        return (time.perf_counter() - start) / 20
    return statistics.median([once() for _ in range(repeats)][1:])
print(json.dumps([seconds(lambda: attend(q, k, v)), seconds(lambda: pull(grad))]))
"""


def in_jax(qkv: Tensor, grad: Tensor, window: int, kind: str = "cudnn",
           repeats: int = 12) -> tuple[list[Tensor], list[float]]:
    """(out, dq, dk, dv) and the seconds forward and backward of JAX's attention; kind: cudnn, xla.

    Raises UserError where there is no JAX, or it cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "in.npy"), torch.stack([*qkv.unbind(2), grad]).float().cpu().numpy())
        given = json.dumps([folder, window, str(qkv.dtype)[6:], kind, repeats])
        done = subprocess.run([sys.executable, "-c", IN_JAX, given], capture_output=True, text=True,
                              env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or ["it was killed"])[-1])
        results = torch.from_numpy(np.load(Path(folder, "out.npy")))
        return list(results.to(qkv.device)), json.loads(done.stdout.splitlines()[-1])
