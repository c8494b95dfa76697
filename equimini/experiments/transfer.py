"""Trained on half of the subtasks, tested on all: columns against a 2-D grid (Table 1).

    python -m equimini.experiments transfer --data synthetic

Trains both models on all columns (patches) and on every second one, and compares the held-out
loss of each subtask.  The rise on subtasks that were never trained, over the model that was
trained on all of them, is what zero-shot transfer costs.  Pictures are drawn as well, and compared
with held-out ones, encoded and decoded: the tokenizer's own losses would drown what is compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from equimini.config import flag
from equimini.experiments.common import Lab
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.samples import Judge, SampledConfig, scales_text
from equimini.experiments.training_runs import losses
from equimini.utils.command_line import parse
from equimini.utils.errors import UserError
from equimini.utils.plot import curves

PAPER = ("gFID of columns 5.57 trained on 16 subtasks, 8.99 on 8; of the 2-D grid 7.93 and 92.46 "
         "(Table 1). Which 8 is not said.")


@dataclass(frozen=True)
class TransferConfig(SampledConfig):
    subtasks: tuple[int, ...] = flag((0, 2, 4, 6, 8, 10, 12, 14), "subtasks that the second pair "
                                     "of models is trained on, counted from 0", min=0)
    halves: bool = flag(False, "also train on the first half, on the last half, and on a "
                               "checkerboard of the grid's patches, for the losses alone")


def halves(n: int) -> dict[str, Sequence[int]]:
    """Other halves of n subtasks; a checkerboard of the grid leaves out no column of patches."""
    p = math.isqrt(n)
    return {"first": range(n // 2), "last": range(n // 2, n),
            "checkerboard": [i for i in range(n) if (i // p + i) % 2 == 0]}


def rise(whole: np.ndarray, part: np.ndarray, trained: Sequence[int]) -> np.ndarray:
    """Of the loss (seeds, N) on the subtasks that are trained and on the others, %, (2, seeds)."""
    others = np.delete(range(whole.shape[1]), trained)
    return np.stack([100 * (part[:, of].mean(1) / whole[:, of].mean(1) - 1)
                     for of in ([*trained], others)])


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments transfer", __doc__, TransferConfig(), argv)
    lab = Lab("transfer", cfg)
    n, trained = lab.tokens(), sorted(set(cfg.subtasks))
    if not set(trained) < set(range(n)):
        raise UserError(f"--subtasks must be some, not all, of 0 to {n - 1}, got "
                        f"{','.join(map(str, cfg.subtasks))}")
    half = f"--subtasks {','.join(map(str, cfg.subtasks))}"
    runs = {"columns": lab.columns(), "columns-half": lab.columns(half, "columns-half"),
            "grid": lab.grid(), "grid-half": lab.grid(half, "grid-half")}
    found = {name: losses(of) for name, of in runs.items()}  # (seeds, N) each
    judges = {layout: Judge(cfg, lab, layout) for layout in ("columns", "grid")}
    scales, distances = {}, {}
    for name, of in runs.items():
        scales[name], distances[name] = judges[name.removesuffix("-half")].best(of)

    rows = [("model", "subtasks trained", "loss on these", "loss on the others",
             "rise on these, %", "rise on the others, %", "guidance", "Fréchet distance")]
    rises, losts = {}, {}
    for layout in ("columns", "grid"):
        whole, part = found[layout], found[f"{layout}-half"]
        rises[layout] = rise(whole, part, trained)
        losts[layout] = distances[f"{layout}-half"] - distances[layout]
        for count, name, cost in ((n, layout, "00"), (len(trained), f"{layout}-half", [
                spread(of, 2, sign=True) for of in rises[layout]])):
            rows.append((layout, str(count), spread(found[name][:, trained].mean(1)),
                         spread(np.delete(found[name], trained, 1).mean(1)), *cost,
                         scales_text(scales[name]), spread(distances[name], 3)))
    more = ""
    for name, chosen in halves(n).items() if cfg.halves else ():
        flags, rises[name] = f"--subtasks {','.join(map(str, chosen))}", {}
        for layout, make in (("columns", lab.columns), ("grid", lab.grid)):
            part = found[f"{layout}-{name}"] = losses(make(flags, f"{layout}-{name}"))
            rises[name][layout] = rise(found[layout], part, chosen)
            rows.append((layout, f"{len(chosen)}, {name}", spread(part[:, chosen].mean(1)),
                         spread(np.delete(part, chosen, 1).mean(1)),
                         *(spread(of, 2, True) for of in rises[name][layout]), "", ""))
        more += f" Trained on the half '{name}': " + verdict(
            "columns lose less", (rises[name]["grid"] - rises[name]["columns"])[1], 2) + "."
    rows += [(f"training pictures, decoded by {layout} (floor)", "", "", "", "", "", "",
              f"{judge.floor:.3f}") for layout, judge in judges.items()]
    beyond = {layout: rises[layout][1] - rises[layout][0] for layout in ("columns", "grid")}
    reading = (f"On subtasks that were never trained the loss rises by "
               f"{spread(rises['columns'][1], 1)} % with columns and by "
               f"{spread(rises['grid'][1], 1)} % with the grid; " + verdict(
                   "columns lose less, as in the paper", (rises["grid"] - rises["columns"])[1], 2) +
               "; by more than on those that were: " + ", ".join(
                   verdict(layout, of, 2) for layout, of in beyond.items()) + "; " + verdict(
                   "columns by less", beyond["grid"] - beyond["columns"], 2) +
               f".{more} The samples' distance rises by {spread(losts['columns'], 3)} with "
               f"columns and by {spread(losts['grid'], 3)} with the grid; " + verdict(
                   "columns lose less, as in the paper", losts["grid"] - losts["columns"]) + ".")
    left_out = curves(
        lab.folder / "transfer.png",
        {f"{layout}, {'half' if part else 'all'} trained": per_column(found[layout + part])
         for layout in ("columns", "grid") for part in ("", "-half")},
        "subtask (column, or patch in raster order)", "held-out loss",
        f"Trained on subtasks {', '.join(str(i + 1) for i in trained)}, or on all")
    Report("Zero-shot transfer between subtasks (Table 1)", PAPER, rows, reading, [
        "Losses of columns and grid are of different tokens, so only rises are compared between "
        f"the two. {judges['grid'].how}", left_out],
        {"losses": found, "rises": rises, "distances": distances, "guidance": scales}).write(lab)
