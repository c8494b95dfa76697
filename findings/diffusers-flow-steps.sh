#!/usr/bin/env bash
# Ten steps along a straight flow (diffusers)
#
# Guess: on the flow x_t = t * noise + (1 - t) * x with its true velocity noise - x, which is
# constant along each path, every solver is exact for every number of steps. Asked for 10 steps,
# FlowMatchEulerDiscreteScheduler steps from t = 1 to 0 by 0.1, and the multistep solvers, told
# to use flow sigmas and to expect a flow's velocity, take about the same steps.
#
# What happens: Euler's steps are nine of 0.111 and one of 0.001: the times are even between 1
# and 1/1000, and 0 comes after that. So n steps do the work of n - 1, and 100 steps are not
# those of a loop over t = 1, 0.99, ... DPM-Solver begins at 0.999 with what is pure noise, and
# so ends a thousandth of the noise off. DEIS repeats its last time: its last step has length 0,
# it never goes below t = 0.1, and a tenth of the noise stays in the picture, with no warning.
#
# 2026-11-28: diffusers 0.42.1, torch 2.13.0, CPU, Python 3.11. Source: found by running it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cat > finding.py <<'PYTHON'
import sys

import torch

import diffusers

print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
picture, noise = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)


def solve(scheduler, steps: int = 10):
    """The times of a run along the true flow, and how much of the noise is left at its end."""
    scheduler.set_timesteps(steps)
    x = noise.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(noise - picture, t, x).prev_sample
    direction = noise - picture
    left = ((x - picture) * direction).sum() / direction.square().sum()
    return scheduler.sigmas.double(), left.item()


flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
schedulers = {
    "Euler": diffusers.FlowMatchEulerDiscreteScheduler(),
    "DPM-Solver": diffusers.DPMSolverMultistepScheduler(**flow),
    "DEIS": diffusers.DEISMultistepScheduler(**flow),
}
runs = {}
for name, scheduler in schedulers.items():
    times, left = runs[name] = solve(scheduler)
    print(f"{name}: times", " ".join(f"{t:.4f}" for t in times), f"- noise left: {left:.4f}")

euler, solver, deis = runs["Euler"], runs["DPM-Solver"], runs["DEIS"]
steps = -euler[0].diff()
as_described = (
    abs(steps[-1] - 0.001) < 1e-6 and (steps[:-1] - 0.111).abs().max() < 1e-6
    and abs(euler[1]) < 1e-5
    and abs(solver[0][0] - 0.999) < 1e-6 and abs(solver[1] - 0.001) < 2e-4
    and deis[0][-1] == deis[0][-2] > 0.09 and abs(deis[1] - 0.1) < 0.01)
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 env/bin/python -W ignore finding.py
