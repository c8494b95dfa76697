#!/usr/bin/env bash
# numba's first parallel loop, and the number of torch's threads (OpenMP)
#
# Guess: torch.set_num_threads(1) holds until somebody calls it again. numba has threads of its
# own, whose number is NUMBA_NUM_THREADS, and torch's wheel brings its own OpenMP library, which
# nobody else uses.
#
# What happens: both share one OpenMP runtime. torch loads its libgomp with global symbols, and
# those of numba's OpenMP layer resolve to it, even where another copy of libgomp is loaded
# beside it. When numba starts its threads, at the first parallel function, it sets the runtime's
# number of threads to its own, and from then on torch computes with NUMBA_NUM_THREADS threads in
# that thread, if it has computed with several or been asked for their number there before.
# torch.set_num_threads(1) afterwards holds. So a process that was limited to one thread (a
# loader, one of many trainings on a machine) is not so any more once some library has called
# numba. With numba's workqueue layer torch's number stays.
#
# 2026-11-28: torch 2.13.0, numba 0.68.1, CPU, Linux with libgomp installed, Python 3.11. Source:
# found by running it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 numba==0.68.1
cat > finding.py <<'PYTHON'
import sys

import numpy as np
import torch

import numba

torch.set_num_threads(1)


@numba.njit(parallel=True)
def total(values):
    result = 0.0
    for i in numba.prange(values.size):
        result += values[i]
    return result


torch.ones(1000, 1000).sum()
counts = [torch.get_num_threads()]
total(np.ones(100))
counts.append(torch.get_num_threads())
torch.set_num_threads(1)
total(np.ones(100))
counts.append(torch.get_num_threads())
layer = numba.threading_layer()
print(f"torch {torch.__version__}, numba {numba.__version__}, layer {layer}: torch's threads "
      f"{counts[0]}, after numba's first parallel loop {counts[1]}, "
      f"after set_num_threads(1) and a second loop {counts[2]}")
as_described = counts == ([1, 3, 1] if layer == "omp" else [1, 1, 1])
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
export NUMBA_NUM_THREADS=3
NUMBA_THREADING_LAYER=workqueue env/bin/python -W ignore finding.py
NUMBA_THREADING_LAYER=omp env/bin/python -W ignore finding.py
