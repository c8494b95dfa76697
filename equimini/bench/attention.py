"""The attention operator against the stock ones: SDPA, FlexAttention, FlashAttention-2.

    python -m equimini.bench attention [--device cuda] [--dtype bfloat16] [--json]

Everything that is compared runs in this one process on the same random numbers, after a
warm-up; figures are medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from equimini.attention import implementation, window_attention, window_mask
from equimini.bench.timing import copy_bandwidth, median_seconds
from equimini.rope import rope_tables, rotate
from equimini.utils.errors import first_line
from equimini.utils.machine import machine

# (B, N, H, D, W); a CPU gets fewer sequences of the same kind
SHAPES = {
    "cuda": [(2048, 16, 12, 64, 4), (2048, 16, 16, 80, 4), (64, 16, 8, 64, 4),
             (8, 4096, 16, 64, 4), (8, 4096, 16, 64, 32), (8, 4096, 16, 64, 128),
             (8, 4096, 16, 64, 256)],
    "cpu": [(256, 16, 12, 64, 4), (256, 16, 16, 80, 4), (64, 16, 8, 64, 4), (4, 1024, 12, 64, 4),
            (1, 4096, 16, 64, 4), (1, 4096, 16, 64, 32), (1, 4096, 16, 64, 128),
            (1, 4096, 16, 64, 256)],
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (B, N, H, D) each


def sdpa(n: int, window: int, device: str) -> Attend:
    """Torch's scaled_dot_product_attention with the window as a mask."""
    mask = window_mask(n, n, window, device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    return attend


def flex(n: int, window: int, device: str) -> Attend:
    """Compiled FlexAttention; its mask keeps the same W keys (many examples keep W + 1)."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, n, n,
                             device=device)
    torch._dynamo.reset()  # after 8 shapes it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads, block_mask=mask).transpose(1, 2)

    return attend


class Flash2(torch.autograd.Function):
    """FlashAttention-2 as torch ships it, with its own local window."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        n = q.shape[1]
        out, lse, *random, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, n, n, 0.0, False, False,
            window_size_left=window - 1, window_size_right=0)
        ctx.save_for_backward(q, k, v, out, lse, *random)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, *random = ctx.saved_tensors
        n = q.shape[1]
        return *torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, None, None, n, n, 0.0, False, *random,
            window_size_left=ctx.window - 1, window_size_right=0), None


def flash2(n: int, window: int, device: str) -> Attend:
    return lambda q, k, v: Flash2.apply(q, k, v, window)


def contestants(n: int, window: int, device: str, dtype: torch.dtype) -> dict[str, Attend]:
    peers = {"sdpa": sdpa, "flex": flex}
    if device == "cuda" and dtype != torch.float32:
        peers["flash2"] = flash2
    return {"equimini": lambda q, k, v: window_attention(q, k, v, window),
            **{name: make(n, window, device) for name, make in peers.items()}}


def with_rope(attend: dict[str, Attend], n: int, d: int, window: int,
              device: str) -> dict[str, Attend]:
    """The same with rotated q and k: fused in ours, the usual rotation before the peers'."""
    tables = tuple(t.to(device) for t in rope_tables(torch.arange(n), d))

    def before(peer: Attend) -> Attend:
        return lambda q, k, v: peer(rotate(q, tables), rotate(k, tables), v)

    return {**{name: before(peer) for name, peer in attend.items()},
            "equimini": lambda q, k, v: window_attention(q, k, v, window, rope=tables)}


def attention_case(shape: tuple[int, ...], device: str, dtype: torch.dtype, bandwidth: float):
    """Rows (dicts) for one shape: forward and backward, without and with rotation."""
    b, n, h, d, window = shape
    plain = contestants(n, window, device, dtype)
    for rope, attend in ((False, plain), (True, with_rope(plain, n, d, window, device))):
        for backward in (False, True):
            qkv = torch.randn(b, n, 3, h, d, device=device, dtype=dtype)
            seconds = contests(attend, qkv, backward, device)
            size = b * n * h * ((8 if backward else 4) * d * qkv.element_size() + 4)
            ours = seconds.pop("equimini")
            yield {"shape": shape, "pass": "backward" if backward else "forward", "rope": rope,
                   "ms": ours * 1e3, "gb_per_s": size / ours / 1e9,
                   "share_of_copy": size / ours / bandwidth,
                   "peers_ms": {name: s * 1e3 for name, s in seconds.items()},
                   "times_faster": {name: s / ours for name, s in seconds.items()}}


def contests(attend: dict[str, Attend], qkv: Tensor, backward: bool,
             device: str) -> dict[str, float]:
    """Seconds of each contestant; a peer that cannot do it is left out, with a printed reason."""
    seconds = {}
    for name, function in attend.items():
        if backward and name == "flex" and device == "cpu":
            continue  # it has no backward pass there
        try:
            seconds[name] = contest(function, qkv, backward, device)
        except Exception as error:
            if name == "equimini":
                raise
            print(f"# {name} does not run here: {first_line(error)}", file=sys.stderr)
    return seconds


def contest(attend: Attend, qkv: Tensor, backward: bool, device: str) -> float:
    """Seconds for one pass over slices of a packed projection."""
    if not backward:
        with torch.no_grad():
            return median_seconds(lambda: attend(*qkv.unbind(2)), device, kernels=True)
    inputs = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    out = attend(*inputs)
    grad = torch.randn_like(out)
    return median_seconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
                          device, kernels=True)


def compare(options: argparse.Namespace) -> None:
    """Print the table, or JSON."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    shapes = [tuple(options.shape)] if options.shape else SHAPES[device]
    rows = []
    if not options.json:
        print(f"# {machine(device)}\n# {str(dtype)[6:]}; a copy moves "
              f"{bandwidth / 1e9:.1f} GB/s\n{'B, N, H, D, W':>20} {'pass':>8} rope "
              f"{'ms':>8} {'GB/s':>7} {'of copy':>7}  peers: ms (times slower)")
    for shape in shapes:
        for row in attention_case(shape, device, dtype, bandwidth):
            rows.append(row)
            if not options.json:
                print(attention_line(row), flush=True)
    if options.json:
        print(json.dumps({"machine": machine(device), "implementation": implementation(device),
                          "dtype": str(dtype)[6:], "copy_gb_per_s": bandwidth / 1e9,
                          "rows": rows}, indent=1))


def attention_line(row: dict) -> str:
    peers = "  ".join(f"{name} {ms:.2f} ({row['times_faster'][name]:.1f}x)"
                      for name, ms in row["peers_ms"].items())
    return (f"{', '.join(map(str, row['shape'])):>20} {row['pass']:>8} "
            f"{'yes' if row['rope'] else 'no':>4} {row['ms']:8.3f} {row['gb_per_s']:7.1f} "
            f"{row['share_of_copy']:7.0%}  {peers}")


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m equimini.bench attention",
                                     description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="bfloat16 on cuda, float32 on a CPU")
    parser.add_argument("--shape", type=int, nargs=5, metavar=("B", "N", "H", "D", "W"),
                        help="one shape in place of the usual ones")
    parser.add_argument("--json", action="store_true", help="print JSON")
    compare(parser.parse_args(argv))
