"""The attention operator against the stock ones: SDPA, FlexAttention, FlashAttention-2, …

    python -m equimini.bench attention [--device cuda] [--dtype bfloat16] [--peers sdpa flex]

Everything that is compared runs in this one process (cuDNN, through JAX, in its own) on the same
random numbers, after a warm-up, and must give the same result first.  Figures are medians over
repeats; on CUDA calls are recorded in a graph that is replayed, so that no launch is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equimini.attention import implementation, window_attention
from equimini.bench.attention_peers import PEERS, Attend, in_jax
from equimini.bench.timing import copy_bandwidth, median_seconds, replayed_seconds
from equimini.rope import rope_tables, rotate
from equimini.utils.command_line import command
from equimini.utils.errors import UserError, first_line
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
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # that peers may have


def moved_bytes(shape: tuple[int, ...], dtype: torch.dtype, backward: bool, device: str) -> int:
    """What a pass has to read and write: q, k, v, out and the log-sum-exp; backward, the output's
    gradient and three more, and out and the log-sum-exp only where the kernel reads them."""
    b, n, h, d, window = shape
    narrow = min(window, n) <= {"C++": 12, "CUDA": 4}.get(implementation(device), 0)
    tensors, statistics = (7, 0) if backward and narrow else (8 if backward else 4, 4)
    return b * n * h * (tensors * d * dtype.itemsize + statistics)


def attention_case(shape: tuple[int, ...], device: str, dtype: torch.dtype, bandwidth: float,
                   peers: list[str], rotations: tuple[bool, ...] = (False, True)):
    """Rows (dicts) for one shape, as they come: forward and backward, without and with rotation,
    ours first, then one peer after the other (some compile for minutes)."""
    b, n, h, d, window = shape
    inputs = {rope: torch.randn(b, n, 3, h, d, device=device, dtype=dtype) for rope in rotations}
    tables = tuple(t.to(device) for t in rope_tables(torch.arange(n), d))
    right: dict[tuple[bool, bool], list[Tensor]] = {}  # results and seconds, by rope and backward
    ours: dict[tuple[bool, bool], float] = {}

    def row(name: str, rope: bool, backward: bool, seconds: float) -> dict[str, Any]:
        size = moved_bytes(shape, dtype, backward, device)
        own = {"gb_per_s": size / seconds / 1e9, "share_of_copy": size / seconds / bandwidth}
        return {"shape": shape, "dtype": str(dtype)[6:], "rope": rope,
                "pass": "backward" if backward else "forward", "method": name,
                "ms": seconds * 1e3, "times_slower": seconds / ours[rope, backward],
                **(own if name == "equimini" else {})}

    for rope, qkv in inputs.items():  # the operator rotates q and k itself
        attend = partial(window_attention, window=window, rope=tables if rope else None)
        for backward in (False, True):
            right[rope, backward] = results(attend, qkv, backward)
            ours[rope, backward] = contest(attend, qkv, backward, device)
            yield row("equimini", rope, backward, ours[rope, backward])
    for name in peers:
        try:
            if name == "cudnn":
                found, seconds = in_jax(inputs[False], like_output(inputs[False]), window)
                same(found, right[False, False] + right[False, True])
                yield from (row(name, False, bool(k), seconds[k]) for k in range(2))
                continue
            peer = PEERS[name](b, n, window, device)
        except Exception as error:
            left_out(name, error)
            continue
        for rope, qkv in inputs.items():
            attend = with_rope(peer, tables) if rope else peer
            for backward in (False, True):
                try:
                    same(results(attend, qkv, backward), right[rope, backward])
                    yield row(name, rope, backward, contest(attend, qkv, backward, device))
                except Exception as error:
                    left_out(name, error)


def with_rope(peer: Attend, tables: tuple[Tensor, ...]) -> Attend:
    """A peer after the usual rotation of q and k."""
    return lambda q, k, v: peer(rotate(q, tables), rotate(k, tables), v)


def left_out(name: str, error: Exception) -> None:
    """Say on stderr that a peer is not measured, and why."""
    print(f"# {name} does not run here: {first_line(error)}", file=sys.stderr)


def results(attend: Attend, qkv: Tensor, backward: bool) -> list[Tensor]:
    """The output, or the gradients of q, k and v under the same random one."""
    found = one_pass(attend, qkv, backward)()
    return list(found) if backward else [found]


def like_output(qkv: Tensor) -> Tensor:
    """The gradient that the backward pass is timed with: (B, N, H, D) of fixed noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(qkv[:, :, 0].shape, generator=generator).to(qkv)


def same(found: list[Tensor], right: list[Tensor]) -> None:
    """Raises UserError where results differ by more than their type's roundings; NaN differs."""
    for x, y in zip(found, right, strict=True):
        error = float((x.double() - y.double()).norm() / y.double().norm())
        if not error <= ERRORS[y.dtype]:
            raise UserError(f"it gives another result, {error:.2g} off")


def contest(attend: Attend, qkv: Tensor, backward: bool, device: str) -> float:
    """Seconds for one pass over slices of a packed projection.

    On a GPU several of them take turns, more than its cache holds.
    """
    count = min(32, max(4, 2**28 // qkv.nbytes)) if device == "cuda" else 1
    side = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(side):  # autograd's backward runs where forward ran
        calls = [one_pass(attend, qkv if n == 0 else torch.randn_like(qkv), backward)
                 for n in range(count)]
    if device == "cuda":
        try:
            return replayed_seconds(calls, side=side)
        except RuntimeError as error:
            print(f"# not recorded, single launches are measured: {first_line(error)}",
                  file=sys.stderr)
    return median_seconds(calls[0], device, kernels=True)


def one_pass(attend: Attend, qkv: Tensor, backward: bool) -> Callable[[], object]:
    """What is timed: the forward pass, or the backward pass of a forward one done before."""
    if not backward:
        return lambda: torch.no_grad()(attend)(*qkv.unbind(2))
    inputs = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    out = attend(*inputs)
    grad = like_output(qkv)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def compare(options: argparse.Namespace) -> None:
    """Print the table, or a line of JSON for each of its rows, as they come."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = options.dtype or ["bfloat16" if device == "cuda" else "float32"]
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    if options.json:
        print(json.dumps({"machine": machine(device), "implementation": implementation(device),
                          "dtype": names, "copy_gb_per_s": bandwidth / 1e9}), flush=True)
    else:
        print(f"# {machine(device)}\n# {', '.join(names)}; a copy moves "
              f"{bandwidth / 1e9:.1f} GB/s\n{'B, N, H, D, W':>20} {'pass':>8} rope "
              f"{'method':>11} {'ms':>8} {'slower':>7} {'GB/s':>7} {'of copy':>7}")
    for shape in [tuple(options.shape)] if options.shape else SHAPES[device]:
        for name in names:
            for row in attention_case(shape, device, getattr(torch, name), bandwidth,
                                      options.peers, (False, True) if options.rope else (False,)):
                print(json.dumps(row) if options.json else attention_line(row), flush=True)


def attention_line(row: dict[str, Any]) -> str:
    """One row of the table."""
    text = (f"{', '.join(map(str, row['shape'])):>20} {row['pass']:>8} "
            f"{'yes' if row['rope'] else 'no':>4} {row['method']:>11} {row['ms']:8.3f} "
            f"{row['times_slower']:6.1f}x")
    if "gb_per_s" in row:
        text += f" {row['gb_per_s']:7.1f} {row['share_of_copy']:7.0%}"
    return text


def main(argv: list[str]) -> None:
    parser, peers = command("equimini.bench attention", __doc__), [*PEERS, "cudnn"]
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="cuda where there is a GPU")
    add("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"],
        help="one or more; bfloat16 on cuda, float32 on a CPU")
    add("--shape", type=int, nargs=5, metavar=("B", "N", "H", "D", "W"),
        help="one shape in place of the usual ones")
    add("--peers", nargs="*", choices=peers, default=peers, metavar="PEER",
        help=f"what to compare with, of {', '.join(peers)}; none: nothing [all]")
    add("--no-rope", dest="rope", action="store_false", help="leave out the rows with rotation")
    add("--json", action="store_true", help="print lines of JSON")
    compare(parser.parse_args(argv))
