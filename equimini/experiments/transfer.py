"""Trained on half of the subtasks, tested on all: columns against a 2-D grid (Table 1).

    python -m equimini.experiments transfer --data synthetic

Trains both models on all columns (patches) and on every second one, and compares the held-out
loss of each subtask.  The rise on subtasks that were never trained, over the model that was
trained on all of them, is what zero-shot transfer costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.training_runs import losses
from equimini.utils.command_line import parse
from equimini.utils.errors import UserError
from equimini.utils.plot import curves

PAPER = ("gFID of columns 5.57 trained on 16 subtasks, 8.99 on 8; of the 2-D grid 7.93 and 92.46 "
         "(Table 1). Which 8 is not said.")


@dataclass(frozen=True)
class TransferConfig(ExperimentConfig):
    subtasks: tuple[int, ...] = flag((0, 2, 4, 6, 8, 10, 12, 14), "subtasks that the second pair "
                                     "of models is trained on, counted from 0", min=0)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments transfer", __doc__, TransferConfig(), argv)
    lab = Lab("transfer", cfg)
    n, trained = lab.tokens(), sorted(set(cfg.subtasks))
    if not set(trained) < set(range(n)):
        raise UserError(f"--subtasks must be some, not all, of 0 to {n - 1}, got "
                        f"{','.join(map(str, cfg.subtasks))}")
    unseen = [i for i in range(n) if i not in trained]
    half = f"--subtasks {','.join(map(str, cfg.subtasks))}"
    found = {"columns": losses(lab.columns()),  # (seeds, N) each
             "columns-half": losses(lab.columns(half, "columns-half")),
             "grid": losses(lab.grid()), "grid-half": losses(lab.grid(half, "grid-half"))}

    rows, rises = [("model", "subtasks trained", "loss on these", "loss on the others",
                    "rise on the others, %")], {}
    for layout in ("columns", "grid"):
        whole, part = found[layout], found[f"{layout}-half"]
        rises[layout] = 100 * (part[:, unseen].mean(1) / whole[:, unseen].mean(1) - 1)
        for count, values, cost in ((n, whole, "0"),
                                    (len(trained), part, spread(rises[layout], 2, sign=True))):
            rows.append((layout, str(count), spread(values[:, trained].mean(1)),
                         spread(values[:, unseen].mean(1)), cost))
    reading = (f"On subtasks that were never trained the loss rises by "
               f"{spread(rises['columns'], 1)} % with columns and by {spread(rises['grid'], 1)} % "
               f"with the grid; " + verdict("columns lose less, as in the paper",
                                            rises["grid"] - rises["columns"], 2) + ".")
    left_out = curves(
        lab.folder / "transfer.png",
        {f"{layout}, {'half' if part else 'all'} trained": per_column(found[layout + part])
         for layout in ("columns", "grid") for part in ("", "-half")},
        "subtask (column, or patch in raster order)", "held-out loss",
        f"Trained on subtasks {', '.join(str(i + 1) for i in trained)}, or on all")
    Report("Zero-shot transfer between subtasks (Table 1)", PAPER, rows, reading, [
        "Losses of columns and grid are of different tokens, so only rises are compared between "
        "the two.", left_out], {"losses": found, "rises": rises}).write(lab)
