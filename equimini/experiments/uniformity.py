"""Loss per column on uniform and on object-centred data (Fig. 4).

    python -m equimini.experiments uniformity --data synthetic

Trains the same model on both; columns in the middle of object-centred pictures should be harder
than those at the sides, those of uniform pictures should not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab, parse
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.utils.command_line import output_folder
from equimini.utils.plot import curves

PAPER = ("on ImageNet, whose objects are in the middle, the loss is higher for the middle columns; "
         "on LHQ landscapes it is not (Fig. 4).")


@dataclass(frozen=True)
class UniformityConfig(ExperimentConfig):
    """What is compared with --data."""

    centred_data: str = flag("synthetic-object", "object-centred pictures, as --data, which is "
                             "the uniform set here")


def bump(losses: np.ndarray) -> np.ndarray:
    """Loss (seeds, N) of the middle half over that at the sides, in %, the first column left out
    (it has no column before it)."""
    n = losses.shape[1]
    middle = losses[:, n // 4:n - n // 4].mean(1)
    sides = np.concatenate((losses[:, 1:n // 4], losses[:, n - n // 4:]), 1).mean(1)
    return 100 * (middle / sides - 1)


def main(argv: list[str]) -> None:
    """The command line."""
    cfg = parse("uniformity", __doc__, UniformityConfig(), argv)
    lab, folder = Lab(cfg), output_folder(f"{cfg.out}/uniformity")
    losses = {"uniform": np.stack([lab.columns(s).losses() for s in range(cfg.seeds)]),
              "object-centred": np.stack([
                  lab.columns(s, name="columns-centred", data=cfg.centred_data).losses()
                  for s in range(cfg.seeds)])}
    bumps = {name: bump(values) for name, values in losses.items()}
    names = {"uniform": cfg.data, "object-centred": cfg.centred_data}
    rows = [("data", "loss", "middle over sides, %"),
            *((f"{k} ({names[k]})", spread(v.mean(1)), spread(bumps[k], 2, True))
              for k, v in losses.items())]
    higher = bumps["object-centred"] > bumps["uniform"]
    reading = (f"The loss of the middle columns is {spread(bumps['object-centred'], 1, True)} % "
               f"over that of the sides on object-centred pictures and "
               f"{spread(bumps['uniform'], 1, True)} % on uniform ones; "
               f"{verdict('a bump in the middle on object-centred pictures alone', higher & (bumps['uniform'] < bumps['object-centred'] / 2))}.")
    scaled = {f"{k}": per_column(v[:, 1:] / v[:, 1:].mean(1, keepdims=True))
              for k, v in losses.items()}
    scaled = {k: [(x + 1, y) for x, y in points] for k, points in scaled.items()}
    curves(folder / "uniformity.png", scaled, "column", "loss over its mean",
           "Loss per column, relative (the first column left out)")
    Report("uniformity", "Uniform against object-centred data (Fig. 4)", PAPER, rows, reading, [],
           {"losses": losses, "bumps": bumps}).write(cfg, lab, folder)
