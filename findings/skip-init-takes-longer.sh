#!/usr/bin/env bash
# torch.nn.utils.skip_init takes longer than the initialization that it skips
#
# Guess: a model whose weights will be read from a file is made faster without drawing first
# weights; torch has skip_init for that (and, for whole models, torch.device("meta") and to_empty,
# which it is made of). For a small model it saves a little, for none does it cost anything.
#
# What happens: the first to_empty of a process, which is within skip_init as well, imports some
# hundreds of modules, sympy and torch's symbolic shapes among them, and takes a second and more.
# Drawing the weights of ten million parameters takes a tenth of that. Later calls are fast, so a
# measurement with a warm-up does not show it; a command that loads one model and ends pays it
# every time. Making the module on the meta device alone imports nothing; assigning the loaded
# tensors (load_state_dict(..., assign=True)) does without to_empty.
#
# 2026-11-28: torch 2.13.0, CPU, Python 3.11. Source: found by timing the start of a script.

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
from torch import nn

print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
sizes = [(1000, 1000)] * 10  # ten million parameters


def run(name, make):
    before, start = set(sys.modules), time.perf_counter()
    made = make()
    seconds, new = time.perf_counter() - start, set(sys.modules) - before
    print(f"{name:34} {seconds:6.3f} s, {len(new):4} modules imported, sympy "
          f"{'among them' if 'sympy' in new else 'not among them'}")
    return made, seconds, new


_, drawn, _ = run("Linear, weights drawn", lambda: [nn.Linear(*s) for s in sizes])
with torch.device("meta"):
    meta, _, on_meta = run("Linear on the meta device", lambda: nn.Linear(10, 10))
weights = nn.Linear(10, 10).state_dict()
_, _, assigned = run("load_state_dict(assign=True)", lambda: meta.load_state_dict(weights, assign=True))
_, first, new = run("skip_init, first call",
                    lambda: [nn.utils.skip_init(nn.Linear, *s) for s in sizes])
_, again, _ = run("skip_init, again", lambda: [nn.utils.skip_init(nn.Linear, *s) for s in sizes])
as_described = "sympy" in new and len(new) > 100 and len(on_meta | assigned) < 10 and first > drawn > again
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python finding.py
