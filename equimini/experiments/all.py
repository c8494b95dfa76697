"""Every experiment but `alignment`, `tokenizer` and `fits`; what they share is trained once.

    python -m equimini.experiments all --data synthetic
"""

from __future__ import annotations

from equimini.experiments import (attention, compute, dit, dynamics, equivariance, extrapolation,
                                  grid_vs_columns, matrix, transfer, uniformity)
from equimini.experiments.common import ExperimentConfig
from equimini.utils.command_line import parse

EXPERIMENTS = (equivariance, transfer, attention, dynamics, grid_vs_columns, matrix, extrapolation,
               uniformity, dit)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments all", __doc__, ExperimentConfig(), argv)
    compute.main(["--out", cfg.out])
    for experiment in EXPERIMENTS:
        print(f"\n== {experiment.__doc__.splitlines()[0]}", flush=True)
        experiment.main(argv)
