"""Do subtasks pull the weights the same way?  Cosines of their gradients (Definition 2.1).

    python -m equimini.experiments equivariance --data synthetic

The definition asks that optimization directions coincide: here, gradients at the weights θ of a
training.  Two halves a, b of the pictures give two estimates g_i of ∇P_i(θ), and averaged over
exchanging a and b

    C_ij = cos(g_i^a, g_j^b),    E = mean_{i≠j} C_ij / mean_i C_ii.

C_ii is what equal subtasks reach with so many pictures: the noise floor.  E is 1 if all pull alike,
0 if none says anything about another.  i and j are interior: from the 4th subtask on, which have a
whole window of W = 4, in all models.  Borders are listed apart.  Then: does E predict what
zero-shot transfer costs over these models?
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.matrix import opened
from equimini.experiments.probe import Probe
from equimini.experiments.report import Report, rank_correlation, spread, verdict
from equimini.experiments.training_runs import TrainingRun, losses
from equimini.training.cache_latents import CachedLatents
from equimini.training.data import fixed_loader
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
    checkpoint: str = flag("", "a generator's checkpoint, measured in place of the models of the "
                           "table; --seeds is then how many sets of pictures")
    half: int = flag(256, "training pictures of either half", min=1)
    models: int = flag(len(MODELS), "how many models, the first of the table", min=2,
                       max=len(MODELS))


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """C (N, N), from the gradients (N, weights) of both halves."""
    a, b = (g / g.norm(dim=1, keepdim=True) for g in (a, b))
    return ((a @ b.T + b @ a.T) / 2).cpu().numpy()


def agreement(c: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """E (…) over the pairs i of rows, j of columns; c (…, N, N)."""
    pairs = [c[..., i, j] for i in rows for j in columns if i != j]
    return np.mean(pairs, 0) / c.diagonal(0, -2, -1)[..., sorted({*rows, *columns})].mean(-1)


def measured(cfg: EquivarianceConfig, probe: Probe, data: Dataset, kept: Path,
             seed: int = 0) -> np.ndarray:
    """C (N, N) of a generator on these pictures or means; kept in a file."""
    if kept.exists():
        return np.load(kept)
    batches = list(fixed_loader(data, min(BATCH, cfg.half), 2 * cfg.half, seed=seed))
    middle = len(batches) // 2
    c = cosines(probe.gradients(batches[:middle]), probe.gradients(batches[middle:]))
    with replacing(kept) as file:
        np.save(file, c)
    return c


def of_checkpoint(cfg: EquivarianceConfig, lab: Lab) -> np.ndarray:
    """C (seeds, N, N) of --checkpoint, every seed on other pictures."""
    probe, data, _ = opened(cfg, Path(cfg.checkpoint))
    return np.stack([measured(cfg, probe, data, lab.folder / (
        f"cosines-{probe.path.stem}-{cfg.half}-{seed}.npy"), seed) for seed in range(cfg.seeds)])


def of_run(cfg: EquivarianceConfig, lab: Lab, run: TrainingRun, layout: str,
           seed: int) -> np.ndarray:
    """C (N, N) of a training."""
    probe = Probe(run.last, pick_device(cfg.device))
    data = CachedLatents(str(lab.latents(layout, seed=seed)[1]), "train", probe.tokenizer, seed)
    return measured(cfg, probe, data, run.folder / f"cosines-{cfg.half}.npy")


def train(cfg: EquivarianceConfig, lab: Lab) -> tuple[dict, dict]:
    """C (seeds, N, N) by model and stage in percent; by model the rise of transfer (seeds), %."""
    n, found, rises = lab.tokens(), {}, {}
    half = f" --subtasks {','.join(map(str, range(0, n, 2)))}"
    for name, (layout, of, flags) in list(MODELS.items())[:cfg.models]:
        make, flags, runs = getattr(lab, layout), flags.replace("N", str(n)), None
        for percent in (*sorted(cfg.early), 100):
            runs = make(flags, of + f"-at-{percent}" * (percent < 100),
                        steps=max(1, lab.steps * percent // 100), forks=runs)
            found[name, percent] = np.stack([of_run(cfg, lab, run, layout, seed)
                                             for seed, run in enumerate(runs)])
        if "real" not in of:  # trained on crops, it has no subtasks to leave out
            part = make(flags + half, f"{of}-half")
            part, whole = (losses(r)[:, 1::2].mean(1) for r in (part, runs))
            rises[name] = 100 * (part / whole - 1)
    return found, rises


def read(e: dict[str, np.ndarray], rises: dict[str, np.ndarray]) -> str:
    """Of one stage; e: E by model, (seeds)."""
    shifts = [(k, f"{k}, no shift") for k in e if f"{k}, no shift" in e]
    parts = [verdict("columns pull more alike than the grid, both as in the paper",
                     e["columns"] - e["grid, no shift"], 2),
             *(verdict(f"{k}: more alike with position augmentation", e[k] - e[other], 2)
               for k, other in shifts)]
    if len(rises) > 3:  # of fewer models no order is rare
        e, cost = (np.array([of[k] for k in rises]) for of in (e, rises))  # (models, seeds)
        rho, p = rank_correlation(e.mean(1), cost.mean(1))
        each = ", ".join(f"{rank_correlation(*of)[0]:.2f}" for of in zip(e.T, cost.T))
        parts.append(f"rank correlation of E with the rise over {len(rises)} models, means of "
                     f"seeds: {rho:.2f} (exact p {p:.3f}; seeds one by one {each})")
    return "; ".join(parts)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments equivariance", __doc__, EquivarianceConfig(), argv)
    lab, rises, stages = Lab("equivariance", cfg), {}, (*sorted(cfg.early), 100)
    if cfg.checkpoint:
        stages, name = (100,), Path(cfg.checkpoint).stem
        found = {(name, 100): of_checkpoint(cfg, lab)}
    else:
        found, rises = train(cfg, lab)
    n, k = next(iter(found.values())).shape[-1], WINDOW - 1
    inner = range(k, n)
    parts = [(inner, inner), (range(n), range(n)), (range(k), inner), (range(n - k, n), inner)]
    rows = [("model", "measured at, %", "E", "E of all", f"first {k} with interior",
             f"last {k} with interior", "noise floor", "rise without training, %")]
    agreements = {}
    for (name, p), c in found.items():
        agreements[name, p] = agreement(c, inner, inner)
        floor = c.diagonal(0, 1, 2)[:, k:].mean(1)
        rise = spread(rises[name], 2, True) if p == 100 and name in rises else ""
        rows.append((name, str(p), *(spread(agreement(c, *of), 2) for of in parts),
                     spread(floor, 2), rise))
    at = {p: {name: e for (name, stage), e in agreements.items() if stage == p} for p in stages}
    reading = (f"E of {name} is {spread(at[100][name], 2)}" if cfg.checkpoint else
               ". ".join(f"At {p} %: {read(e, rises)}" for p, e in at.items()))
    Report("A measure of equivariance", PAPER, rows, f"{reading}.", [
        f"E is over the interior, subtasks {WINDOW} to {n}. Noise floor: mean C_ii, from two times "
        f"{cfg.half} pictures. Rise: of the loss on every second subtask, if only the others are "
        "trained. ± is over seeds, of a --checkpoint over sets of pictures."],
        {"cosines": {f"{of} {p}": c for (of, p), c in found.items()}, "rises": rises}).write(lab)
