#!/usr/bin/env bash
# A compiled package, and a picture in another memory order (AOTInductor)
#
# Guess: a package compiled ahead of time for inputs of shape (1, 3, 8, 8) gives the right result
# for every input of that shape and dtype, or raises an error for one whose strides differ.
#
# What happens: it reads the input's memory in the order of the example that it was compiled
# with. The same picture in channels_last format (equal to the first according to torch.equal)
# comes out with its values at wrong places, with no error or warning. The exported program that
# the package was compiled from, and torch.compile, get both right. What helps: .contiguous()
# before the call.
#
# 2026-11-28: torch 2.13.0, CPU, Python 3.11; needs a C++ compiler. Source: found by running it.

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


class Scale(nn.Module):
    """Shift and scale: what turns pixels in [0, 1] into [-1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 - 1


picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
other = picture.to(memory_format=torch.channels_last)
print("strides", picture.stride(), "and", other.stride(), "- equal:", torch.equal(picture, other))

program = torch.export.export(Scale(), (picture,))
package = torch._inductor.aoti_compile_and_package(program, package_path="scale.pt2")
packaged, expected = torch._inductor.aoti_load_package(package), picture * 2 - 1
runs = {"exported program": program.module(), "torch.compile": torch.compile(Scale()),
        "package": packaged}
wrong = {}
for name, run in runs.items():
    wrong[name] = [(run(x) - expected).abs().max().item() for x in (picture, other)]
    print(f"{name}: largest error {wrong[name][0]:.2f} as exported, "
          f"{wrong[name][1]:.2f} in channels_last")

as_described = (wrong["package"][0] < 1e-6 and wrong["package"][1] > 0.5
                and max(wrong["exported program"] + wrong["torch.compile"]) < 1e-6)
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 env/bin/python -W ignore finding.py
