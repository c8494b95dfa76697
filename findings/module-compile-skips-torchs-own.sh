#!/usr/bin/env bash
# Module.compile() and the modules that torch itself brings (torch.compile)
#
# Guess: `module.compile()` does to a module in place what `torch.compile(module)` does to a wrapper
# around it; its documentation says that the module's forward is compiled and that all arguments
# are handed to torch.compile.
#
# What happens: for a module whose forward is torch's own code (nn.Sequential and its subclasses,
# nn.Linear, nn.TransformerEncoderLayer), `module.compile()` compiles nothing: the backend is never
# called, the result is that of the plain module, at its speed, and nothing is said. With
# fullgraph=True there is an error at the first call. `torch.compile(module)` compiles each of them
# into one graph. A module with a forward of its own is compiled by both, Sequential parts included.
# So a block made as a subclass of nn.Sequential needs a forward of its own, even if that only calls
# the parent's, to be compiled in place.
#
# 2026-11-28: torch 2.13.0, CPU, Python 3.11 (2.11.0 likewise). Source: found in use.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6
cat > finding.py <<'PYTHON'
import sys

import torch
from torch import nn

print("torch", torch.__version__)
graphs = []


def backend(graph: torch.fx.GraphModule, inputs: list):
    graphs.append(graph)
    return graph.forward


class Parts(nn.Sequential):
    """A subclass without a forward of its own."""


class Forward(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


MAKE = {
    "nn.Linear": lambda: nn.Linear(8, 8),
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()),
    "a subclass of nn.Sequential": lambda: Parts(nn.Linear(8, 8), nn.GELU()),
    "the same with a forward": lambda: Forward(nn.Linear(8, 8), nn.GELU()),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2),
}
found = {}
for name, make in MAKE.items():
    counts = []
    for in_place in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        module = make()
        if in_place:
            module.compile(backend=backend)
        else:
            module = torch.compile(module, backend=backend)
        module(torch.randn(4, 8))
        counts.append(len(graphs))
    found[name] = tuple(counts)
    print(f"{name}: {counts[0]} graph by torch.compile(module), {counts[1]} by module.compile()")

as_described = all(counts == (1, int(name == "the same with a forward"))
                   for name, counts in found.items())
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 env/bin/python -W ignore finding.py
