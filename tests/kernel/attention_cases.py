"""Random cases of windowed attention, and the judge: is an implementation's result right?

The truth is a dense float64 computation written apart from equimini's own.  An implementation
may err by twice what PyTorch errs when it does the same arithmetic in the case's dtype, plus a
few roundings of the largest sum of absolute terms: the second part is what stays where PyTorch
happens to be exact, as for window = 1.  Scores q·k are sums too, and an error of a score is a
relative error of its weight, so the roundings of scores count times the size of the scores.
A NaN is never within tolerance.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from equimini.attention import keep_mask
from equimini.rope import rope_tables

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 64, 97, 128, 130, 257)
LAYOUTS = ("packed", "heads first", "unaligned", "last dimension strided")
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass
class Case:
    """One problem; `seed` draws its numbers."""

    b: int
    n_q: int
    n_k: int
    h: int
    d: int
    window: int
    dtype: torch.dtype
    layout: str = "packed"
    rope: bool = True
    dropout_p: float = 0.0
    spread: float = 1.0  # standard deviation of q and k: 100 gives logits beyond ±10⁴
    seed: int = 0

    def __str__(self) -> str:
        return (f"{self.b}x{self.n_q}of{self.n_k}x{self.h}x{self.d}-w{self.window}-"
                f"{str(self.dtype)[6:]}-{self.layout.replace(' ', '_')}"
                f"{'-rope' if self.rope else ''}{'-drop' if self.dropout_p else ''}"
                f"{'-extreme' if self.spread > 10 else ''}")


def draw_case(rng: random.Random, dtypes: tuple[torch.dtype, ...], longest: int) -> Case:
    """A case at random, small enough for a dense float64 reference."""
    n_k = rng.choice([n for n in LENGTHS if n <= longest] + [rng.randint(1, longest)])
    n_q = n_k if rng.random() < 0.6 else rng.randint(1, n_k)
    window = rng.choice([1, 2, 3, 4, rng.randint(1, n_k + 3), n_k, n_k + 3])
    return Case(b=rng.randint(1, 3), n_q=n_q, n_k=n_k, h=rng.randint(1, 4),
                d=rng.choice([8, 16, 24, 32, 64, 64, 72, 80, 96, 120, 128]), window=window,
                dtype=rng.choice(dtypes), layout=rng.choice(LAYOUTS), rope=rng.random() < 0.5,
                dropout_p=rng.choice([0.0, 0.0, 0.1, 0.7]),
                spread=rng.choice([1.0, 1.0, 1.0, 100.0]), seed=rng.getrandbits(30))


def draw_inputs(case: Case, device: str = "cpu"):
    """q, k, v, grad in the case's layout; (cos, sin); the dropout seed; the softmax scale."""
    generator = torch.Generator().manual_seed(case.seed)

    def heads(n, count, std):
        b, h, d = case.b, case.h, case.d
        x = torch.randn(b, n, count, h, d, generator=generator).mul(std).to(device, case.dtype)
        if case.layout == "heads first":
            x = x.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
        elif case.layout == "unaligned":  # rows start at odd elements
            room = torch.zeros(b, n, count, h, d + 3, dtype=case.dtype, device=device)
            x = room[..., 3:].copy_(x)
        elif case.layout == "last dimension strided":
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        return x.unbind(2)

    if case.n_q == case.n_k:
        q, k, v = heads(case.n_k, 3, 1)
    else:
        (q,), (k, v) = heads(case.n_q, 1, 1), heads(case.n_k, 2, 1)
    q.mul_(case.spread), k.mul_(case.spread)
    (grad,) = heads(case.n_q, 1, 1)
    first = case.seed % 16
    rope = rope_tables(torch.arange(first, first + case.n_k), case.d) if case.rope else (None, None)
    rope = tuple(t if t is None else t.to(device) for t in rope)
    seed = torch.tensor([case.seed * 2**33 - case.seed], device=device) if case.dropout_p else None
    return q, k, v, grad, rope, seed, case.d ** -0.5


def dense(q, k, v, rope, keep, window, scale):
    """Attention over an explicit (Nq, Nk) mask in q's own dtype: output and log-sum-exp."""
    n_q, n_k = q.shape[1], k.shape[1]
    if rope[0] is not None:
        turn = torch.complex(*(t.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
                               for t in rope))[:, None, :]  # (Nk, 1, D/2)
        q = rotate_as_complex(q, turn[n_k - n_q:])
        k = rotate_as_complex(k, turn)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    i, j = torch.meshgrid(torch.arange(n_k - n_q, n_k), torch.arange(n_k), indexing="ij")
    hidden = ((j > i) | (j <= i - window)).to(q.device)
    s = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    p = s.softmax(-1) if keep is None else s.softmax(-1) * keep.to(s.dtype)
    return (p @ v).transpose(1, 2), s.logsumexp(-1)


def rotate_as_complex(x, turn):
    """RoPE another way: pairs of channels as complex numbers, times e^(i·angle)."""
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def differentiate(inputs, keep, window, dtype):
    """(out, lse, dq, dk, dv) of `dense` computed in `dtype`, as float64."""
    q, k, v, grad, rope, _, scale = inputs
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v))
    out, lse = dense(q, k, v, rope, keep, window, scale)
    out.backward(grad.to(dtype))
    return [x.detach().double() for x in (out, lse, q.grad, k.grad, v.grad)]


def magnitudes(inputs, keep, window, lse):
    """Largest sum of absolute terms in a score, and in each of (out, lse, dq, dk, dv)."""
    q, k, v, grad, _, _, scale = inputs
    q, k, v, grad = (x.double().abs().transpose(1, 2) for x in (q, k, v, grad))
    # P ≤ 1 on visible pairs, and a rotation at most doubles a sum of absolute values
    n_q, n_k = q.shape[2], k.shape[2]
    ones = torch.ones(n_q, n_k, dtype=q.dtype, device=q.device)
    seen = ones.tril(n_k - n_q) - ones.tril(n_k - n_q - window)
    keep = seen if keep is None else seen * keep
    dp = (grad @ v.mT) * keep
    s = 2 * scale * (q @ k.mT) * seen
    rows = ((keep @ v), s.amax(-1) + lse.abs(), 2 * scale * (dp @ k), 2 * scale * (dp.mT @ q),
            keep.mT @ grad)
    return float(s.max()), [float(x.max()) for x in rows]


def judge(case: Case, inputs, results, rounds_rotated: bool = False) -> None:
    """Assert that results (out, lse, dq, dk, dv) are right; names the first that is not.

    rounds_rotated: rotated q and k are rounded to the case's dtype, as tensor cores need them;
    over the D terms of a score such roundings add up like a random walk.
    """
    seed = inputs[5]
    shape = (case.b, case.h, case.n_q, case.n_k)
    keep = None if seed is None else (keep_mask(seed, shape, case.dropout_p).double()
                                      / (1 - case.dropout_p))
    truth = differentiate(inputs, keep, case.window, torch.float64)
    native = differentiate(inputs, keep, case.window, case.dtype)
    score, sizes = magnitudes(inputs, keep, case.window, truth[1])
    coarse = torch.finfo(case.dtype).eps  # of results
    fine = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps  # of sums
    of_scores = coarse / case.d ** 0.5 if rounds_rotated and case.rope else fine
    for name, result, true, torch_s, size in zip(NAMES, results, truth, native, sizes):
        roundings = (fine * size + of_scores * score if name == "lse" else
                     (coarse + of_scores * score) * size)
        error = (result.double() - true).abs().max().item()
        torch_errs = (torch_s - true).abs().max().nan_to_num(0).item()  # float16 may overflow
        allowed = 2 * torch_errs + 4 * roundings
        assert error <= allowed, f"{case}: {name} is off by {error:.3g}, allowed {allowed:.3g}"


def run_case(case: Case, forward, backward, device: str = "cpu",
             rounds_rotated: bool = False, judge_device: str | None = None) -> None:
    """Draw the case, run forward and backward (the operators' signatures), judge, repeat.

    The second run must give the same bits.  judge_device: where the truth is computed, if not
    where the operators run (a sanitizer then meets no kernels of torch's libraries).
    """
    inputs = draw_inputs(case, device)
    q, k, v, grad, rope, seed, scale = inputs

    def attend():
        rest = (*rope, seed, case.window, case.dropout_p, scale)
        out, lse = forward(q, k, v, *rest)
        return out, lse, *backward(grad, q, k, v, out, lse, *rest)

    first = attend()
    if judge_device is None:
        judge(case, inputs, first, rounds_rotated)
    else:
        judge(case, *tree_map_only(Tensor, lambda x: x.to(judge_device), (inputs, first)),
              rounds_rotated)
    for name, x, y in zip(NAMES, first, attend()):
        assert torch.equal(x, y), f"{case}: {name} differs between two runs"


REACH = 64  # tokens, a tile: contract of window_attention


def check_reach(forward, backward, window: int, dtype: torch.dtype, n_q: int = 160,
                reach: int | None = REACH, device: str = "cpu") -> None:
    """What is not finite in one token spoils what depends on it, and `reach` tokens beside that.

    Nothing in other heads and batch entries: each but the first has a token of its own.
    reach None: the whole sequence.
    """
    n_k, b, h = 160, 2, 4
    q, k, v, grad, rope, _, scale = draw_inputs(Case(b, n_q, n_k, h, 16, window, dtype), device)
    rest = (*rope, None, window, 0.0, scale)
    for name, x in (("q", q), ("k", k), ("v", v), ("grad", grad)):
        x = x.clone()
        at = torch.full((b, h), 10**6)
        for number in range(1, b * h):  # 7 places in a tile
            entry, head = divmod(number, h)
            at[entry, head] = n_k // 2 + 5 * number
            x[entry, n_k // 2 + 5 * number - n_k + x.shape[1], head] = float(
                ("inf", "nan")[number % 2])
        inputs = {"q": q, "k": k, "v": v, "grad": grad, name: x}
        dout = inputs.pop("grad")
        out, lse = forward(*inputs.values(), *rest)
        results = (out, *backward(dout, *inputs.values(), out, lse, *rest))
        for result, what in zip(results, ("out", "dq", "dk", "dv")):
            # result (B, N, H, D)
            entry, token, head = (~result.isfinite()).any(-1).nonzero().cpu().unbind(1)
            distance = (token + n_k - result.shape[1] - at[entry, head]).abs()
            assert (distance < (n_k if reach is None else window + reach)).all(), (
                f"{name} in {what}, window {window}: {int(distance.max())} tokens off")
