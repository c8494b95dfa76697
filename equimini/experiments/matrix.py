"""The transfer matrix A_ij: what a little training on subtask j does to the loss of subtask i.

    python -m equimini.experiments matrix --checkpoint runs/generator/last.pt --data my/pictures

From a common checkpoint, the generator is trained on each subtask j alone for a few steps.  A_ij is
the change of the held-out loss of subtask i (below 0: better).  The summary, mean off the diagonal
over mean on it, is 1 if the subtasks are fully equivariant: each learns as much from any other as
from itself.  Without --checkpoint, both models of the other experiments are measured.

The steps are plain gradient descent, all of the same short length, each on pictures of its own.
They stay where the loss is nearly linear, so that A_ij is about minus the length times the cosine
of two subtasks' gradients.  (AdamW's steps from averaged weights are mostly noise at first.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.probe import Probe
from equimini.experiments.report import Report, spread, verdict
from equimini.training.data import load_data
from equimini.utils.command_line import parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.plot import heat_map

PAPER = ("has no such number; its Fig. 3 shows two columns of the matrix (training on the 4th and "
         "on the 11th subtask).")
END = 3  # columns at either end that are not like the others: W − 1


@dataclass(frozen=True)
class MatrixConfig(ExperimentConfig):
    checkpoint: str = flag("", "checkpoint of a generator; empty: the columns and the grid of the "
                           "other experiments, trained now if need be")
    tune_steps: int = flag(8, "steps on one subtask", min=1)
    tune_batch: int = flag(128, "pictures per step", min=1)
    tune_length: float = flag(3e-4, "length of these steps together, over the norm of all weights",
                              min=1e-9)
    measured: int = flag(256, "held-out pictures that losses are measured on", min=1)


def transfer_matrix(probe: Probe, train: Dataset, val: Dataset, cfg: MatrixConfig,
                    seed: int) -> np.ndarray:
    """A (N, N): row i, column j is the change of subtask i's loss by training on j alone."""
    batches = probe.encode(train, cfg.tune_steps * cfg.tune_batch, cfg.tune_batch,
                           "encoding training pictures", seed)
    held_out = probe.encode(val, cfg.measured, cfg.tune_batch, "encoding held-out pictures")
    before = np.array(probe.losses(held_out))
    after = []
    for j in tqdm(range(len(before)), desc="training on each subtask alone"):
        trainer = probe.descender(seed, cfg.tune_length / len(batches), subtasks=(j,))
        for step, (means, labels, _) in enumerate(batches):
            trainer.step(step, means, labels)
        after.append(trainer.validate(held_out)["val_loss_per_column"])
    return np.array(after).T - before[:, None]


def summary(matrix: np.ndarray) -> float:
    """Mean off the diagonal over mean on it; NaN if training on itself helps no subtask."""
    diagonal = np.diag(matrix).mean()
    off = (matrix.sum() - np.trace(matrix)) / (matrix.size - len(matrix))
    return off / diagonal if diagonal < 0 else float("nan")


def checkpoints(cfg: MatrixConfig, lab: Lab) -> dict[str, list[Path]]:
    """The files to measure, one per seed, by name."""
    if cfg.checkpoint:
        return {Path(cfg.checkpoint).stem: [Path(cfg.checkpoint)] * cfg.seeds}
    return {name: [run.last for run in generators()]
            for name, generators in (("columns", lab.columns), ("grid", lab.grid))}


def opened(cfg: ExperimentConfig, path: Path) -> tuple[Probe, Dataset, Dataset]:
    """A checkpoint, training and held-out pictures; UserError if --data has other classes."""
    probe = Probe(path, pick_device(cfg.device), cfg.precision)
    train, val, classes = load_data(cfg.pictures(path), probe.tokenizer.config)
    if classes != probe.classes:
        raise UserError(f"{path} knows the classes {', '.join(probe.classes)}, --data has "
                        f"{', '.join(classes)}")
    return probe, train, val


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments matrix", __doc__, MatrixConfig(), argv)
    lab, found, left_out = Lab("matrix", cfg), {}, []
    for name, paths in checkpoints(cfg, lab).items():
        found[name] = np.stack([transfer_matrix(*opened(cfg, path), cfg, seed)
                                for seed, path in enumerate(paths)])
        left_out.append(heat_map(lab.folder / f"matrix-{name}.png", -found[name].mean(0),
                                 "subtask trained alone", "subtask measured",
                                 f"{name}: gain of each subtask"))

    rows = [("model", "mean on the diagonal", "mean off the diagonal", "off / on",
             f"off / on without {END} at either end", "pairs that gain, %")]
    ratios, inner = {}, {}
    for name, matrices in found.items():  # (seeds, N, N)
        n = matrices.shape[1]
        ratios[name] = np.array([summary(m) for m in matrices])
        inner[name] = np.array([summary(m[END:n - END, END:n - END]) if n > 2 * END + 1 else np.nan
                                for m in matrices])
        others = matrices[:, ~np.eye(n, dtype=bool)]  # (seeds, N² − N)
        rows.append((name, spread(matrices.diagonal(axis1=1, axis2=2).mean(1), 5, True),
                     spread(others.mean(1), 5, True), spread(ratios[name], 2),
                     spread(inner[name], 2), spread(100 * (others < 0).mean(1), 0)))
    reading = "; ".join(
        f"{name}: a subtask gains {spread(r, 2)} times as much from training on another as from "
        "training on itself" if np.isfinite(r).all() else f"{name}: training on a subtask does not "
        "improve it, so there is no ratio (try another --tune-length, or more --tune-batch)"
        for name, r in ratios.items())
    if len(ratios) > 1:
        first, second = ratios.values()
        reading += f"; {verdict('columns are the more equivariant', first - second, 2)}"
        first, second = inner.values()
        if np.isfinite([first, second]).all():
            reading += (f"; without {END} at either end {spread(first, 2)} (columns) and "
                        f"{spread(second, 2)} (grid): "
                        f"{verdict('columns are the more equivariant', first - second, 2)}")
    Report("Transfer matrix", PAPER, rows, f"{reading[0].upper()}{reading[1:]}.", [
        "Changes of the loss, below 0 is better; off / on is 1 for fully equivariant subtasks. "
        f"The first {END} columns have fewer columns in their window than all others, the last "
        f"{END} a border of the picture in the tokenizer's view. "
        f"{cfg.tune_steps} steps of {cfg.tune_batch} pictures on one subtask, together "
        f"{cfg.tune_length:g} times as long as the norm of the weights.", *left_out],
        {"matrices": found, "ratios": ratios, "inner_ratios": inner}).write(lab)
