"""Trained on half of the subtasks, tested on all: columns against a 2-D grid (Table 1).

    python -m equimini.experiments transfer --data synthetic

Trains both models on all columns (patches) and on every second one, and compares the held-out
loss of each subtask.  The rise on subtasks that were never trained, over the model that was
trained on all of them, is what zero-shot transfer costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab, Run, parse
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.utils.command_line import output_folder
from equimini.utils.errors import UserError
from equimini.utils.plot import curves

PAPER = ("gFID of columns 5.57 trained on 16 subtasks, 8.99 on 8; of the 2-D grid 7.93 and 92.46 "
         "(Table 1). Which 8 is not said.")


@dataclass(frozen=True)
class TransferConfig(ExperimentConfig):
    """Which subtasks are trained."""

    subtasks: tuple[int, ...] = flag((0, 2, 4, 6, 8, 10, 12, 14), "subtasks that the second pair "
                                     "of models is trained on, counted from 0", min=0)


def train(cfg: TransferConfig, lab: Lab) -> dict[str, list[Run]]:
    """The four variants, by name, each with one run per seed."""
    if not set(cfg.subtasks) < set(range(lab.tokens())):
        raise UserError(f"--subtasks must be some, not all, of 0 to {lab.tokens() - 1}, got "
                        f"{','.join(map(str, cfg.subtasks))}")
    half = f"--subtasks {','.join(map(str, cfg.subtasks))}"
    runs: dict[str, list[Run]] = {name: [] for name in (
        "columns", "columns-half", "grid", "grid-half")}
    for seed in range(cfg.seeds):
        runs["columns"].append(lab.columns(seed))
        runs["columns-half"].append(lab.columns(seed, half, "columns-half"))
        runs["grid"].append(lab.grid(seed))
        runs["grid-half"].append(lab.grid(seed, half, "grid-half"))
    return runs


def main(argv: list[str]) -> None:
    """The command line."""
    cfg = parse("transfer", __doc__, TransferConfig(), argv)
    lab, folder = Lab(cfg), output_folder(f"{cfg.out}/transfer")
    runs = train(cfg, lab)
    losses = {name: np.stack([run.losses() for run in found]) for name, found in runs.items()}
    n = losses["columns"].shape[1]
    trained = sorted(cfg.subtasks)
    unseen = [i for i in range(n) if i not in cfg.subtasks]
    report(cfg, lab, folder, losses, trained, unseen)


def report(cfg: TransferConfig, lab: Lab, folder: Path, losses: dict[str, np.ndarray],
           trained: list[int], unseen: list[int]) -> None:
    """The table, the picture, the sentence; losses: (seeds, N) by variant."""
    rows = [("model", "subtasks trained", "loss on these", "loss on the others",
             "rise on the others, %")]
    rises = {}
    for layout in ("columns", "grid"):
        whole, half = losses[layout], losses[f"{layout}-half"]
        rise = 100 * (half[:, unseen].mean(1) / whole[:, unseen].mean(1) - 1)
        rises[layout] = rise
        for name, found, cost in ((len(trained) + len(unseen), whole, "0"),
                                  (len(trained), half, spread(rise, 2, sign=True))):
            rows.append((layout, str(name), spread(found[:, trained].mean(1)),
                         spread(found[:, unseen].mean(1)), cost))
    holds = rises["columns"] < rises["grid"]
    reading = (f"On subtasks that were never trained the loss rises by "
               f"{spread(rises['columns'], 1)} % with columns and by {spread(rises['grid'], 1)} % "
               f"with the grid; {verdict('columns lose less, as in the paper', holds)}.")
    curves(folder / "transfer.png",
           {f"{layout}, {'half' if part else 'all'} trained": per_column(losses[layout + part])
            for layout in ("columns", "grid") for part in ("", "-half")},
           "subtask (column, or patch in raster order)", "held-out loss",
           f"Trained on subtasks {', '.join(str(i + 1) for i in trained)}, or on all")
    Report("transfer", "Zero-shot transfer between subtasks (Table 1)", PAPER, rows, reading, [
        "Losses of columns and grid are of different tokens, so only rises are compared between "
        "the two."], {"losses": losses, "rises": rises}).write(cfg, lab, folder)
