"""Loss per subtask early and late, and what training on one subtask does to the others (Fig. 3).

    python -m equimini.experiments dynamics --data synthetic

Columns and grid are trained on all subtasks to several stages.  From the weights there each is
trained for three tenths of the steps on all subtasks, on the 4th alone and on the 11th alone; the
table shows by how much each subtask's held-out loss is then better than at that stage.
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
    stages: tuple[int, ...] = flag((2, 10, 30, 100), "where these trainings begin, in percent of "
                                   "the steps", min=1, max=100)


Key = tuple[str, int, str]  # layout, stage, what is trained from there ("": nothing)


def train(cfg: DynamicsConfig, lab: Lab) -> dict[Key, np.ndarray]:
    """Held-out losses (seeds, N)."""
    if max(cfg.single) >= lab.tokens():
        raise UserError(f"--single must be subtasks 0 to {lab.tokens() - 1}, got {max(cfg.single)}")
    trained = {"all": ""} | {f"{i + 1} alone": f"--subtasks {i}" for i in cfg.single}
    found: dict[Key, np.ndarray] = {}
    for layout, generators in (("columns", lab.columns), ("grid", lab.grid)):
        start = None
        for stage in sorted({*cfg.stages, 100}):
            name = layout + f"-at-{stage}" * (stage < 100)
            start = generators(name=name, steps=max(1, lab.steps * stage // 100), forks=start)
            found[layout, stage, ""] = losses(start)
            for what, flags in trained.items() if stage in cfg.stages else ():
                found[layout, stage, what] = losses(generators(
                    flags, f"{name}-then-{what.replace(' ', '-')}", initial=start,
                    steps=max(1, 3 * lab.steps // 10)))
    return found


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments dynamics", __doc__, DynamicsConfig(), argv)
    lab = Lab("dynamics", cfg)
    found = train(cfg, lab)
    rows = [("model", "from, % of the training", "then trained on", "gain on it, %",
             "mean gain on the others, %", "others that gain")]
    gains = {k: 100 * (1 - values / found[(*k[:2], "")])  # (seeds, N)
             for k, values in found.items() if k[2]}
    others: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}  # their gain, its own
    for (layout, stage, what), gain in gains.items():
        if what == "all":
            rows.append((layout, str(stage), "all", spread(gain.mean(1), 2, True), "–",
                         f"{(gain.mean(0) > 0).sum()} of {gain.shape[1]}"))
            continue
        i = int(what.split()[0]) - 1
        rest = np.delete(gain, i, 1)
        others.setdefault((layout, stage), []).append((rest.mean(1), gain[:, i]))
        rows.append((layout, str(stage), what, spread(gain[:, i], 2, True),
                     spread(rest.mean(1), 2, True),
                     f"{(rest.mean(0) > 0).sum()} of {rest.shape[1]}"))
    means = {k: np.mean(v, 0)[0] for k, v in others.items()}
    with np.errstate(invalid="ignore", divide="ignore"):  # no gain of its own: NaN, no interval
        shares = {k: 100 * np.divide(*np.mean(v, 0)) for k, v in others.items()}
    reading = "; ".join(
        f"from {stage} % of the training {verdict('columns gain', means['columns', stage], 2)}, "
        f"{verdict('the grid loses', -means['grid', stage], 2)}, " + verdict(
            "columns before the grid", means["columns", stage] - means["grid", stage], 2) + ", " +
        verdict("columns pass on a larger share of their own gain, in %",
                shares["columns", stage] - shares["grid", stage], 0)
        for stage in sorted(cfg.stages))
    late = max(cfg.stages)
    left_out = [
        curves(lab.folder / "losses.png", {f"{k[0]}, {k[1]} %": per_column(v) for k, v in
                                           found.items() if not k[2]},
               "subtask", "held-out loss", "Loss per subtask, at stages of the training"),
        curves(lab.folder / "gains.png", {f"{layout} {what}": per_column(v) for
                                          (layout, stage, what), v in gains.items()
                                          if stage == late},
               "subtask", f"gain from {late} % of the training on, %",
               "Gain of every subtask, by the subtasks trained")]
    Report("Training dynamics (Fig. 3)", PAPER, rows, f"Trained on one subtask alone, means over "
           f"the others: {reading}.", [row_starts(found["grid", 100, ""]), *left_out],
           {"losses": {" ".join(map(str, k)): v for k, v in found.items()},
            "gains": {" ".join(map(str, k)): v for k, v in gains.items()},
            "shares": {" ".join(map(str, k)): v for k, v in shares.items()}}).write(lab)


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
