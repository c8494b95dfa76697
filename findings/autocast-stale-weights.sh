#!/usr/bin/env bash
# Weights that change inside one autocast region (PyTorch)
#
# Guess: a training loop that stands as a whole inside one `with torch.autocast(...)` block is
# bad style, but computes the same: the forward pass casts the weights, or keeps a cast of them
# as long as their version counter says that they have not changed.
#
# What happens: the first cast of each weight is kept until the block ends, whatever the
# optimizer does to the weight in the meantime. Every forward pass sees the weights of the first
# step; the loss never falls, while the weights run away in the direction of the first gradients.
# No warning. It is the same under torch.no_grad(): averaged weights that are copied into a model
# inside of the block are not what it then computes with, neither is an inner autocast block a
# way out. With cache_enabled=False, or a block per step, all is well.
#
# 2026-11-28: torch 2.13.0, CPU with bfloat16, Python 3.11. Source: found by running it; the
# documentation says where to put the block, not what happens otherwise.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > finding.py <<'PYTHON'
import contextlib
import sys

import torch
from torch import nn

print("torch", torch.__version__)


def train(around_loop, around_step):
    """Loss of a linear fit before the first and after the last of 50 steps, and the true one."""
    torch.manual_seed(0)
    x, model = torch.randn(64, 8), nn.Linear(8, 1, bias=False)
    target = x.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    with around_loop():
        for _ in range(50):
            with around_step():
                loss = (model(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        true = (model(x) - target).square().mean().item()
    return losses[0], losses[-1], true


autocast = lambda **options: torch.autocast("cpu", torch.bfloat16, **options)
runs = {
    "a block per step": train(contextlib.nullcontext, autocast),
    "one block around the loop": train(autocast, contextlib.nullcontext),
    "the same, cache_enabled=False": train(
        lambda: autocast(cache_enabled=False), contextlib.nullcontext),
}
for name, (first, last, true) in runs.items():
    print(f"{name}: loss {first:.3f}, 50 steps later {last:.3f}, in float32 {true:.3f}")

linear, one = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
nn.init.ones_(linear.weight)
with autocast(), torch.no_grad():
    values = [linear(one).item()]
    linear.weight.mul_(3)
    values.append(linear(one).item())
    with autocast():
        values.append(linear(one).item())
print("no_grad, a weight of 1, then 3: ", *values)

stuck = runs["one block around the loop"]
fine = [runs["a block per step"], runs["the same, cache_enabled=False"]]
as_described = (values == [1, 1, 1] and stuck[0] == stuck[1] and stuck[2] > stuck[0]
                and all(last < 0.01 * first and true < 0.01 * first for first, last, true in fine))
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 env/bin/python -W ignore finding.py
