"""Loss per column on uniform and on object-centred data (Fig. 4).

    python -m equimini.experiments uniformity --data synthetic

Trains the same model on both; columns in the middle of object-centred pictures should be harder
than those at the sides, those of uniform pictures should not.  The loss of every held-out picture
is a mean over several draws of times and noise, each a validation's, so that the share of both in
the error is known, by drawing pictures again from these (bootstrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.probe import Probe
from equimini.experiments.report import Report, paired_interval, per_column, spread
from equimini.experiments.training_runs import TrainingRun
from equimini.generator import flow_matching_loss
from equimini.noise import rng
from equimini.training.cache_latents import CachedLatents
from equimini.training.data import fixed_loader
from equimini.utils.command_line import parse, pick_device
from equimini.utils.plot import curves

PAPER = ("on ImageNet, whose objects are in the middle, the loss is higher for the middle columns; "
         "on LHQ landscapes it is not (Fig. 4).")


@dataclass(frozen=True)
class UniformityConfig(ExperimentConfig):
    centred_data: str = flag("synthetic-object", "object-centred pictures, as --data, which is "
                             "the uniform set here")
    draws: int = flag(16, "times and noise of every held-out picture are drawn so often", min=1)


@torch.no_grad()
def picture_losses(cfg: UniformityConfig, run: TrainingRun, latents: Path) -> np.ndarray:
    """Held-out loss of every picture that was cached, and column, (pictures, N), of a training."""
    probe = Probe(run.last, pick_device(cfg.device))
    trainer, found = probe.trainer(), []
    model, data = trainer.model.eval(), CachedLatents(str(latents), "val", probe.tokenizer, 0)
    for means, labels, indices in fixed_loader(data, 64, len(data)):
        total = 0
        for k in range(cfg.draws):
            draws = trainer.draws([rng("uniformity", k, int(i)) for i in indices],
                                  *trainer.shape(means)).map(trainer.on_device)
            total += flow_matching_loss(model, trainer.tokens(means, draws),
                                        trainer.on_device(labels), draws.u, draws.eps).cpu().numpy()
        found.append(total / cfg.draws)
    return np.concatenate(found)


def standard_error(losses: np.ndarray) -> float:
    """Of the bump, by the choice of pictures and of their draws; losses (seeds, pictures, N)."""
    n, rolls = losses.shape[1], np.random.default_rng(0)
    means = losses.mean(0)  # all seeds have the same pictures
    return float(np.std([bump(means[rolls.integers(n, size=n)].mean(0)[None])
                         for _ in range(1000)]))


def sure(claim: str, by_seed: np.ndarray, error: float) -> str:
    """Whether a quantity is above 0, over trainings (Student's t) and pictures (error); the two
    half intervals are added in quadrature."""
    low, high = paired_interval(by_seed)
    half = np.hypot((high - low) / 2, 1.96 * error)
    low, high = by_seed.mean() - half, by_seed.mean() + half
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is undecided"
    return f"{claim}: {word} ({by_seed.mean():+.2f}, interval {low:+.2f} to {high:+.2f})"


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
    names, found = {"uniform": cfg.data, "object-centred": cfg.centred_data}, {}
    for kind, data in names.items():
        own = {"data": data, "name": "columns-centred"} if kind != "uniform" else {}
        found[kind] = np.stack([
            picture_losses(cfg, run, lab.latents(data=data, seed=seed)[1])
            for seed, run in enumerate(lab.columns(**own))])  # (seeds, pictures, N)
    means = {k: v.mean(1) for k, v in found.items()}
    bumps = {k: bump(v) for k, v in means.items()}
    errors = {k: standard_error(v) for k, v in found.items()}
    rows = [("data", "loss", "middle over sides, %", "standard error by pictures and draws, %"),
            *((f"{k} ({names[k]})", spread(v.mean(1)), spread(bumps[k], 2, True),
               f"{errors[k]:.2f}") for k, v in means.items())]
    uniform, objects = bumps.values()
    both = float(np.hypot(*errors.values()))
    reading = (f"The loss of the middle columns is {spread(objects, 1, True)} % over that of the "
               f"sides on object-centred pictures and {spread(uniform, 1, True)} % on uniform "
               f"ones; {sure('a higher bump on object-centred ones', objects - uniform, both)}; "
               f"{sure('a bump on uniform ones, unlike the paper', uniform, errors['uniform'])}.")
    scaled = {k: per_column(v / v[:, 1:].mean(1, keepdims=True))[1:] for k, v in means.items()}
    left_out = curves(lab.folder / "uniformity.png", scaled, "column", "loss over its mean",
                      "Loss per column, relative (the first column left out)")
    Report("Uniform against object-centred data (Fig. 4)", PAPER, rows, reading, [
        f"Losses are means over {cfg.draws} draws of a validation's times and noise for each of "
        f"{found['uniform'].shape[1]} held-out pictures.", left_out],
        {"losses": means, "bumps": bumps, "errors": errors},
        "Intervals: 95 %, over trainings (Student's t over seeds, each with a tokenizer of its "
        "own; paired where data sets are compared) and over pictures and draws (bootstrap), the "
        "two half intervals added in quadrature; a claim holds if the interval lies above 0. ± is "
        "the standard deviation over seeds.").write(lab)
