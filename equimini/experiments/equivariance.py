"""Do subtasks pull the weights the same way?  Cosines of their gradients (Definition 2.1).

    python -m equimini.experiments equivariance --data synthetic

Equivariant subtasks have one argmax_θ P_i(θ), so at any θ their gradients should agree.  Two halves
a, b of the pictures give two estimates g_i of ∇P_i, and averaged over exchanging a and b

    C_ij = cos(g_i^a, g_j^b),    E = mean_{i≠j} C_ij / mean_i C_ii.

C_ii is what equal subtasks reach with so many pictures: the noise floor.  E is 1 if all pull alike,
0 if none says anything about another.  i and j are interior: from the 4th subtask on, which have a
whole window of W = 4, in all models.  Borders are listed apart.  Then: does E predict what
zero-shot transfer costs over these models?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
from torch import Tensor

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.probe import Probe
from equimini.experiments.report import Report, rank_correlation, spread, verdict
from equimini.experiments.training_runs import TrainingRun, losses
from equimini.training.cache_latents import CachedLatents
from equimini.training.loaders import fixed_loader
from equimini.utils.command_line import parse, pick_device
from equimini.utils.files import replacing

PAPER = "has no such number; what is measured is its Definition 2.1."
WINDOW, BATCH = 4, 32
MODELS = {  # layout, name of its runs, flags; N: the number of tokens
    "columns": ("columns", "columns", ""),
    "grid, no shift": ("grid", "grid", ""),
    "columns, no shift": ("columns", "unshifted", "--position-shift 1"),
    "grid": ("grid", "grid-shifted", "--position-shift 16"),
    "full causal": ("columns", "full", "--window N"),
    "real equivariant": ("columns", "real", "--real-equivariant"),
    "full causal, no shift": ("columns", "full-unshifted", "--window N --position-shift 1"),
    "real equivariant, no shift": ("columns", "real-unshifted",
                                   "--real-equivariant --position-shift 1")}


@dataclass(frozen=True)
class EquivarianceConfig(ExperimentConfig):
    early: tuple[int, ...] = flag((10, 30), "when to measure besides the end, in percent of the "
                                  "steps", min=1, max=99)
    half: int = flag(256, "training pictures of either half", min=1)
    models: int = flag(len(MODELS), "how many models, the first of the table", min=2,
                       max=len(MODELS))


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """C (N, N), from the gradients (N, weights) of both halves."""
    a, b = (g / g.norm(dim=1, keepdim=True) for g in (a, b))
    return ((a @ b.T + b @ a.T) / 2).cpu().numpy()


def agreement(c: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """E over the pairs i of rows, j of columns."""
    pairs = [c[i, j] for i in rows for j in columns if i != j]
    return float(np.mean(pairs) / c.diagonal()[sorted({*rows, *columns})].mean())


def measured(cfg: EquivarianceConfig, lab: Lab, run: TrainingRun, layout: str,
             seed: int) -> np.ndarray:
    """C (N, N) of a generator; kept in its folder."""
    kept = run.folder / f"cosines-{cfg.half}.npy"
    if kept.exists():
        return np.load(kept)
    probe = Probe(run.last, pick_device(cfg.device))
    latents = CachedLatents(str(lab.latents(layout, seed=seed)[1]), "train", probe.tokenizer, seed)
    batches = list(fixed_loader(latents, min(BATCH, cfg.half), 2 * cfg.half))
    middle = len(batches) // 2
    c = cosines(probe.gradients(batches[:middle]), probe.gradients(batches[middle:]))
    with replacing(kept) as file:
        np.save(file, c)
    return c


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments equivariance", __doc__, EquivarianceConfig(), argv)
    lab = Lab("equivariance", cfg)
    n, stages = lab.tokens(), (*sorted(cfg.early), 100)
    half, found, rises = f" --subtasks {','.join(map(str, range(0, n, 2)))}", {}, {}
    models = dict(list(MODELS.items())[:cfg.models])
    for name, (layout, of, flags) in models.items():
        make, flags, runs = getattr(lab, layout), flags.replace("N", str(n)), None
        for percent in stages:
            runs = make(flags, of + f"-at-{percent}" * (percent < 100),
                        steps=max(1, lab.steps * percent // 100), forks=runs)
            found[name, percent] = np.stack([measured(cfg, lab, run, layout, seed)
                                             for seed, run in enumerate(runs)])
        if "real" not in of:  # trained on crops, it has no subtasks to leave out
            whole, part = (losses(r)[:, 1::2].mean(1) for r in (runs, make(flags + half,
                                                                           f"{of}-half")))
            rises[name] = 100 * (part / whole - 1)
    first, last, interior = range(WINDOW - 1), range(n - WINDOW + 1, n), range(WINDOW - 1, n)
    sets = {"all": (range(n), range(n)), f"first {WINDOW - 1}": (first, interior),
            f"last {WINDOW - 1}": (last, interior)}

    def e(name: str, percent: int, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        return np.array([agreement(c, rows, columns) for c in found[name, percent]])
    ends = {name: e(name, 100, interior, interior) for name in models}
    table = [("model", *(f"E at {p} %" for p in stages), *(f"{k}, 100 %" for k in sets),
              "noise floor, 100 %", "rise without training, %")]
    for name in models:
        floor = found[name, 100].diagonal(axis1=1, axis2=2)[:, WINDOW - 1:].mean(1)
        table.append((name, *(spread(e(name, p, interior, interior), 2) for p in stages),
                      *(spread(e(name, 100, *of), 2) for of in sets.values()), spread(floor, 2),
                      spread(rises[name], 2, True) if name in rises else "–"))
    rho, p = rank_correlation(*zip(*((ends[k].mean(), v.mean()) for k, v in rises.items())))
    each = [rank_correlation([ends[k][s] for k in rises], [v[s] for v in rises.values()])[0]
            for s in range(cfg.seeds)]
    shift = {k: ends[k] - ends[f"{k}, no shift"] for k in models if f"{k}, no shift" in models}
    reading = "; ".join((
        verdict("columns pull more alike than the grid, both as in the paper",
                ends["columns"] - ends["grid, no shift"], 2),
        verdict("both without shift", ends["columns, no shift"] - ends["grid, no shift"], 2),
        *(verdict(f"{k}: more alike with position augmentation", v, 2) for k, v in shift.items()),
        f"rank correlation of E with the rise over {len(rises)} models {rho:.2f} (exact p = "
        f"{p:.3f}; seeds one by one {', '.join(f'{r:.2f}' for r in each)})"))
    Report("A measure of equivariance", PAPER, table, f"{reading[0].upper()}{reading[1:]}.", [
        f"E over subtasks {WINDOW} to {n}, at the stages of the training; then, at its end, over "
        f"all, and of those at either end with the interior. Noise floor: mean C_ii, from two "
        f"times {cfg.half} pictures. Rise: of the loss on every second subtask, if only the others "
        "were trained. Correlation: over means of seeds, all orders of the models counted."],
        {"cosines": {f"{k} {p}": v for (k, p), v in found.items()}, "rises": rises}).write(lab)
