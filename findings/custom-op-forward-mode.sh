#!/usr/bin/env bash
# A custom operator under forward-mode differentiation (PyTorch)
#
# Guess: an operator made with torch.library.custom_op, with a backward formula and no
# forward-mode one, raises an error in torch.func.jvp or jacfwd, as torch's own operators do that
# have none (the fused attention on the CPU, say).
#
# What happens: its tangent is dropped. jvp, jacfwd and torch.autograd.functional.jacobian with
# strategy="forward-mode" return zeros, with no error or warning, and add up the remaining terms
# of a larger function as if the operator were a constant. Only a dual number whose primal
# requires gradients raises an error: it goes through the function that holds the backward
# formula. The divergence of a flow, and with it a likelihood, comes out wrong and looks healthy.
#
# 2026-11-28: torch 2.13.0, CPU, Python 3.11. Source: found by running it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > finding.py <<'PYTHON'
import sys

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

print("torch", torch.__version__)


@torch.library.custom_op("finding::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x ** 3


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, grad: grad * 3 * ctx.saved_tensors[0] ** 2, setup_context=setup_context)


def tangent_of_dual(primal: torch.Tensor):
    with fwAD.dual_level():
        return fwAD.unpack_dual(cube(fwAD.make_dual(primal, torch.ones(2)))).tangent


def attempt(function):
    try:
        return function()
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


x, ones = torch.tensor([1.0, 2.0]), torch.ones(2)
leaf = x.clone().requires_grad_()
q = torch.randn(1, 1, 4, 8)
(backward,) = torch.autograd.grad(cube(leaf).sum(), leaf)
rows = {
    "backward": backward.tolist(),
    "jvp": attempt(lambda: torch.func.jvp(cube, (x,), (ones,))[1].tolist()),
    "jvp of cube(x) + x": attempt(
        lambda: torch.func.jvp(lambda a: cube(a) + a, (x,), (ones,))[1].tolist()),
    "jacfwd": attempt(lambda: torch.func.jacfwd(cube)(x).tolist()),
    "jacobian, forward-mode": attempt(lambda: torch.autograd.functional.jacobian(
        cube, x, strategy="forward-mode", vectorize=True).tolist()),
    "dual number": attempt(lambda: tangent_of_dual(x)),
    "dual number that requires gradients": attempt(lambda: tangent_of_dual(leaf)),
    "jvp of torch's attention": attempt(lambda: torch.func.jvp(
        lambda a: F.scaled_dot_product_attention(a, a, a), (q,), (torch.ones_like(q),))),
}
for name, result in rows.items():
    print(f"{name}: {result}")

zeros = [[0.0, 0.0], [0.0, 0.0]]
as_described = (
    rows["backward"] == [3.0, 12.0] and rows["jvp"] == [0.0, 0.0]
    and rows["jvp of cube(x) + x"] == [1.0, 1.0] and rows["jacfwd"] == zeros
    and rows["jacobian, forward-mode"] == zeros
    and rows["dual number"] is None
    and "NotImplementedError" in rows["dual number that requires gradients"]
    and "NotImplementedError" in rows["jvp of torch's attention"])
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python -W ignore finding.py
