"""First contact with a GPU: is everything right, how fast is a kernel by itself, what to profile.

    python tests/gpu/probe.py smoke|time|once [--device cuda] [--short]

Prints JSON lines; the exit code is 1 where a result is wrong.  first_run.sh calls it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
from attention_cases import NAMES, Case, draw_inputs  # noqa: E402

from equimini.attention import implementation, reference_backward, reference_forward  # noqa: E402
from equimini.bench.attention import moved_bytes  # noqa: E402
from equimini.bench.timing import copy_bandwidth, median_seconds, replayed_seconds  # noqa: E402
from equimini.rope import rope_tables  # noqa: E402
from equimini.utils.machine import machine  # noqa: E402

FORWARD = torch.ops.equimini.window_attention.default
BACKWARD = torch.ops.equimini.window_attention_backward.default
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of relative errors
# every family: windows of registers, shared memory and tensor cores; tiles that end in the middle
SMOKE = [(16, 16, 64, 4), (16, 16, 80, 3), (70, 70, 8, 1), (1, 4, 64, 4), (33, 130, 24, 4),
         (40, 40, 72, 9), (130, 130, 128, 15), (140, 140, 64, 40), (30, 100, 80, 20),
         (257, 257, 120, 300)]  # (Nq, Nk, D, W)
TIMED = [(2048, 16, 12, 64, 4), (2048, 16, 16, 80, 4), (64, 16, 8, 64, 4), (8, 4096, 16, 64, 4),
         (8, 4096, 16, 64, 32), (8, 4096, 16, 64, 128), (8, 4096, 16, 64, 256)]  # (B, N, H, D, W)
SHORT = [(2, 16, 2, 64, 4), (1, 64, 1, 64, 32)]


def say(**row) -> None:
    print(json.dumps(row), flush=True)


def smoke(device: str, short: bool) -> bool:
    """Every kernel family and dtype against the reference in float64 on the same numbers."""
    wrong = 0
    for n_q, n_k, d, window in SMOKE[:4] if short else SMOKE:
        for dtype in LIMITS:
            for dropout_p in (0.0, 0.3):
                case = Case(2, n_q, n_k, 3, d, window, dtype, dropout_p=dropout_p, seed=n_k + d)
                for name, error in errors(case, device):
                    if not error < LIMITS[dtype]:  # NaN is wrong
                        wrong += 1
                        say(wrong=name, error=error, case=str(case))
    say(wrong=wrong, implementation=implementation(device))
    return wrong == 0


def errors(case: Case, device: str):
    """(name, ‖x − truth‖ / ‖truth‖) of the output, the log-sum-exp and the gradients."""
    q, k, v, grad, tables, seed, scale = draw_inputs(case, device)
    rest = (*tables, seed, case.window, case.dropout_p, scale)
    out, lse = FORWARD(q, k, v, *rest)
    results = out, lse, *BACKWARD(grad, q, k, v, out, lse, *rest)
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    out, lse = reference_forward(q, k, v, *rest)
    truth = out, lse, *reference_backward(grad, q, k, v, out, lse, *rest)
    for name, x, true in zip(NAMES, results, truth):
        yield name, float((x.double() - true).norm() / true.norm().clamp_min(1e-30))


def time_kernels(device: str, short: bool) -> bool:
    """Forward and backward alone, bf16, without and with rotation, four sets of inputs in turns."""
    copy = copy_bandwidth(device)
    say(machine=machine(device), copy_gb_per_s=copy / 1e9)
    for shape in SHORT if short else TIMED:
        b, n, h, d, window = shape
        sets = [torch.randn(b, n, 3, h, d, device=device, dtype=torch.bfloat16) for _ in range(4)]
        for rope in (False, True):
            tables = [t.to(device) for t in rope_tables(torch.arange(n), d)] if rope else [None] * 2
            rest = (*tables, None, window, 0.0, d ** -0.5)
            forward = [partial(FORWARD, *x.unbind(2), *rest) for x in sets]
            grad = torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16)
            backward = [partial(BACKWARD, grad, *x.unbind(2), *attend(), *rest)
                        for x, attend in zip(sets, forward)]
            for name, calls in (("forward", forward), ("backward", backward)):
                s = seconds_each(calls, device)
                size = moved_bytes(shape, torch.bfloat16, name == "backward", device)
                say(kernel=name, shape=shape, rope=rope, us=s * 1e6, gb_per_s=size / s / 1e9,
                    share_of_copy=size / s / copy)
    return True


def seconds_each(calls: list[Callable], device: str) -> float:
    if device == "cuda":
        return replayed_seconds(calls)
    return median_seconds(lambda: [call() for call in calls], device, budget=0.1) / len(calls)


def once(device: str, short: bool) -> bool:
    """Three passes forward and backward at the model's shape, for a profiler."""
    b, n, h, d, window = SHORT[0] if short else TIMED[0]
    q, k, v = torch.randn(b, n, 3, h, d, device=device, dtype=torch.bfloat16).unbind(2)
    rest = (None, None, None, window, 0.0, d ** -0.5)
    for _ in range(3):
        out, lse = FORWARD(q, k, v, *rest)
        BACKWARD(out, q, k, v, out, lse, *rest)
    if device == "cuda":
        torch.cuda.synchronize()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    steps = {"smoke": smoke, "time": time_kernels, "once": once}
    parser.add_argument("step", choices=list(steps))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--short", action="store_true", help="small and few, for a rehearsal")
    options = parser.parse_args()
    torch.manual_seed(0)
    return 0 if steps[options.step](options.device, options.short) else 1


if __name__ == "__main__":
    sys.exit(main())
