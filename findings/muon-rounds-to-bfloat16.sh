#!/usr/bin/env bash
# torch.optim.Muon computes its step in bfloat16, whatever the weights are
#
# Guess: an optimizer's step is computed in the precision of the weights: float32 weights take a
# step that is right to seven digits, float64 ones to fifteen; and on a CPU the step costs its
# matrix products, some tens of them the size of the weight, at the rate of other products.
#
# What happens: the orthogonalization (five Newton-Schulz iterations) rounds the update to bfloat16
# first and stays in it, for float32 and float64 weights alike, outside autocast and with no switch;
# the class's documentation does not mention it. Its direction therefore differs from that of the
# same iteration in float64 by about one per cent. On a processor without bfloat16 instructions
# these products are emulated: there a training step of a small model took 15.5 s of one core, where
# it took 2.1 s with the same iteration in float32, and 1.8 s with AdamW.
#
# 2026-11-28: torch 2.13.0, CPU, Python 3.11. Source: a training that Muon made nine times slower.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > finding.py <<'PYTHON'
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, "
      f"{torch.backends.cpu.get_cpu_capability()}")
A, B, C = 3.4445, -4.775, 2.0315  # the defaults of ns_coefficients


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.add(out.dtype)
        return out


def iteration(x):
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


as_described = True
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(256, 1024, dtype=dtype))
    weight.grad = torch.randn(256, 1024, dtype=dtype)
    optimizer = torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    start = time.process_time()
    with Products() as products:
        optimizer.step()
    seconds = time.process_time() - start
    start = time.process_time()
    iteration(weight.grad)
    own = time.process_time() - start
    exact = iteration(weight.grad.double())
    step = -weight.detach().double()
    off = float((step / step.norm() - exact / exact.norm()).norm())
    names = ", ".join(map(str, products.dtypes))
    print(f"{dtype} weights: products in {names}; the step's direction is off by {off:.1e}; "
          f"{seconds:.3f} s of the processor, "
          f"the iteration in {dtype} {own:.3f} s")
    as_described &= products.dtypes == {torch.bfloat16} and 1e-3 < off < 0.1
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python finding.py
