"""Loss per subtask early and late, and what training on one subtask does to the others (Fig. 3).

    python -m equimini.experiments dynamics --data synthetic

Columns and grid are trained on all subtasks to a tenth of the steps ("early") and to the end
("late").  From the early weights each is trained for three tenths of the steps on all subtasks, on
the 4th alone and on the 11th alone; the table shows by how much each subtask's held-out loss is
then better than early on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.training_runs import losses
from equimini.utils.command_line import parse
from equimini.utils.errors import UserError
from equimini.utils.plot import curves

PAPER = ("trained on all subtasks both models gain about 10 % from epoch 10 to 100; trained on the "
         "4th or 11th subtask alone, columns gain on all others too, and the grid loses there. The "
         "grid's loss is higher at the first patches of a row, 5, 9 and 13 (Fig. 3).")


@dataclass(frozen=True)
class DynamicsConfig(ExperimentConfig):
    single: tuple[int, ...] = flag((3, 10), "subtasks that are trained alone, counted from 0",
                                   min=0)


def train(cfg: DynamicsConfig, lab: Lab) -> dict[str, np.ndarray]:
    """Held-out losses (seeds, N) by 'layout stage', stages early, late, all, and each single."""
    if max(cfg.single) >= lab.tokens():
        raise UserError(f"--single must be subtasks 0 to {lab.tokens() - 1}, got {max(cfg.single)}")
    early, more = max(1, lab.steps // 10), max(1, 3 * lab.steps // 10)
    stages = {"all": ""} | {f"{i + 1} alone": f"--subtasks {i}" for i in cfg.single}
    found = {}
    for layout, generators in (("columns", lab.columns), ("grid", lab.grid)):
        start = generators(name=f"{layout}-early", steps=early)
        found |= {f"{layout} early": losses(start), f"{layout} late": losses(generators())}
        for stage, flags in stages.items():
            found[f"{layout} {stage}"] = losses(generators(
                flags, f"{layout}-then-{stage.replace(' ', '-')}", steps=more, initial=start))
    return found


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments dynamics", __doc__, DynamicsConfig(), argv)
    lab = Lab("dynamics", cfg)
    found = train(cfg, lab)
    rows = [("model", "then trained on", "gain on it, %", "mean gain on the others, %",
             "others that gain")]
    gains = {name: 100 * (1 - values / found[f"{name.split(' ', 1)[0]} early"])  # (seeds, N)
             for name, values in found.items() if not name.endswith((" early", " late"))}
    others: dict[str, list[np.ndarray]] = {"columns": [], "grid": []}
    for name, gain in gains.items():
        layout, stage = name.split(" ", 1)
        if stage == "all":
            rows.append((layout, "all", spread(gain.mean(1), 2, True), "–",
                         f"{(gain.mean(0) > 0).sum()} of {gain.shape[1]}"))
            continue
        i = int(stage.split()[0]) - 1
        rest = np.delete(gain, i, 1)
        others[layout].append(rest.mean(1))
        rows.append((layout, stage, spread(gain[:, i], 2, True), spread(rest.mean(1), 2, True),
                     f"{(rest.mean(0) > 0).sum()} of {rest.shape[1]}"))
    columns, grid = (np.mean(others[layout], 0) for layout in ("columns", "grid"))
    reading = (f"Trained on one subtask alone, the others gain {spread(columns, 2, True)} % with "
               f"columns and {spread(grid, 2, True)} % with the grid; "
               f"{verdict('columns gain', columns, 2)}, {verdict('the grid loses', -grid, 2)}, "
               f"{verdict('columns before the grid', columns - grid, 2)}.")
    left_out = [
        curves(lab.folder / "losses.png", {k: per_column(v) for k, v in found.items()
                                           if k.endswith((" early", " late"))},
               "subtask", "held-out loss", "Loss per subtask, early and late in training"),
        curves(lab.folder / "gains.png", {k: per_column(v) for k, v in gains.items()}, "subtask",
               "gain over early training, %", "Gain of every subtask, by the subtasks trained")]
    Report("Training dynamics (Fig. 3)", PAPER, rows, reading, [
        row_starts(found["grid late"]), *left_out], {"losses": found, "gains": gains}).write(lab)


def row_starts(late: np.ndarray) -> str:
    """The grid's loss at the first patches of its rows against that of the others."""
    n = late.shape[1]
    p = round(n ** 0.5)
    first = [i for i in range(1, n) if i % p == 0]
    rest = [i for i in range(1, n) if i % p]
    excess = 100 * (late[:, first].mean(1) / late[:, rest].mean(1) - 1)
    return (f"Late in training, the grid's loss at the first patches of rows (subtasks "
            f"{', '.join(str(i + 1) for i in first)}) differs by {spread(excess, 1, True)} % from "
            "that of the other patches, the very first left out; the paper finds it higher.")
