"""Loss per column on uniform and on object-centred data (Fig. 4).

    python -m equimini.experiments uniformity --data synthetic

Trains the same model on both; columns in the middle of object-centred pictures should be harder
than those at the sides, those of uniform pictures should not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.training_runs import losses
from equimini.utils.command_line import parse
from equimini.utils.plot import curves

PAPER = ("on ImageNet, whose objects are in the middle, the loss is higher for the middle columns; "
         "on LHQ landscapes it is not (Fig. 4).")


@dataclass(frozen=True)
class UniformityConfig(ExperimentConfig):
    centred_data: str = flag("synthetic-object", "object-centred pictures, as --data, which is "
                             "the uniform set here")


def bump(losses: np.ndarray) -> np.ndarray:
    """Loss (seeds, N) of the middle half over that at the sides, in %.

    The first column is left out: it has no column before it.
    """
    n = losses.shape[1]
    middle = losses[:, n // 4:n - n // 4].mean(1)
    sides = np.concatenate((losses[:, 1:n // 4], losses[:, n - n // 4:]), 1).mean(1)
    return 100 * (middle / sides - 1)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments uniformity", __doc__, UniformityConfig(), argv)
    lab = Lab("uniformity", cfg)
    centred = lab.columns(name="columns-centred", data=cfg.centred_data)
    found = {"uniform": losses(lab.columns()), "object-centred": losses(centred)}
    bumps = {name: bump(values) for name, values in found.items()}
    names = {"uniform": cfg.data, "object-centred": cfg.centred_data}
    rows = [("data", "loss", "middle over sides, %"),
            *((f"{k} ({names[k]})", spread(v.mean(1)), spread(bumps[k], 2, True))
              for k, v in found.items())]
    uniform, objects = bumps.values()
    reading = (f"The loss of the middle columns is {spread(objects, 1, True)} % over that of the "
               f"sides on object-centred pictures and {spread(uniform, 1, True)} % on uniform "
               f"ones; {verdict('a higher bump on object-centred ones', objects - uniform, 2)}; "
               f"{verdict('a bump on uniform ones, unlike the paper', uniform, 2)}.")
    scaled = {k: per_column(v / v[:, 1:].mean(1, keepdims=True))[1:] for k, v in found.items()}
    left_out = curves(lab.folder / "uniformity.png", scaled, "column", "loss over its mean",
                      "Loss per column, relative (the first column left out)")
    Report("Uniform against object-centred data (Fig. 4)", PAPER, rows, reading, [left_out],
           {"losses": found, "bumps": bumps}).write(lab)
