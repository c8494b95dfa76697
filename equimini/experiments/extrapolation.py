"""Position augmentation on and off: loss and pictures beyond the training length (Fig. 7).

    python -m equimini.experiments extrapolation --data synthetic

Trains columns and the 2-D grid with and without random shifts of their positions, measures the loss
of each column of held-out scrolls that are several times as long as the training pictures, and
draws pictures of that length.  Pictures of a folder are no longer than they are: they are continued
by their own mirror image, again and again, for the measure alone.  So is the grid, downwards, for
in raster order a longer picture has more rows; its tokenizer takes squares only, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equimini.config import flag
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.probe import Batch, Probe
from equimini.experiments.report import Report, spread, verdict
from equimini.experiments.training_runs import TrainingRun
from equimini.sampling.image_generator import load_generator
from equimini.training.data import ImageFolder, fixed_loader, load_data
from equimini.training.options import DataConfig
from equimini.utils.command_line import parse, pick_device
from equimini.utils.images import grid, save_png, to_float
from equimini.utils.plot import curves

PAPER = ("without the augmentation pictures show artefacts and breaks beyond the training length, "
         "with it they do not (Fig. 7; pictures only).")


@dataclass(frozen=True)
class ExtrapolationConfig(ExperimentConfig):
    times: int = flag(8, "length of the long pictures, in training pictures", min=2)
    measured: int = flag(64, "held-out pictures that the loss is measured on", min=1)
    shown: int = flag(2, "pictures drawn per model", min=1)
    cfg: float = flag(1.5, "guidance scale of these, the same for all columns", min=0)
    euler_steps: int = flag(50, "Euler steps per column of these", min=1)


class Mirrored(Dataset):
    def __init__(self, data: ImageFolder, times: int) -> None:
        self.data, self.times = data, times

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        image, label, index = self.data[key]
        return torch.cat([image.flip(2) if i % 2 else image for i in range(self.times)],
                         2), label, index


def long_pictures(cfg: ExtrapolationConfig, probe: Probe) -> Dataset:
    """Held-out pictures, `times` as long as those of the training; of a grid as they are."""
    shape = probe.tokenizer.config
    val = load_data(cfg.pictures(probe.path), shape)[1]
    if shape.layout == "grid":  # see `tall`
        return val
    if isinstance(val, ImageFolder):
        return Mirrored(val, cfg.times)
    return load_data(DataConfig(data=cfg.data, width=cfg.times * shape.image_size), shape)[1]


@torch.no_grad()
def tall(probe: Probe, pictures: Iterator[Batch], times: int) -> Iterator[Batch]:
    """Means (B, times·N, C) of square pictures with their mirror images below, in raster order."""
    for images, labels, indices in pictures:
        x = to_float(images.to(probe.device))
        both = [probe.tokenizer.encode(x), probe.tokenizer.encode(x.flip(2))]
        yield torch.cat([both[i % 2] for i in range(times)], 1).cpu(), labels, indices


def long_losses(cfg: ExtrapolationConfig, runs: list[TrainingRun]) -> np.ndarray:
    """Loss of each column (patch) of long pictures, (runs, times·N)."""
    found = []
    for probe in (Probe(run.last, pick_device(cfg.device)) for run in runs):
        pictures = fixed_loader(long_pictures(cfg, probe), 8, cfg.measured)
        of_grid = probe.tokenizer.config.layout == "grid"
        found.append(probe.losses(tall(probe, pictures, cfg.times) if of_grid else pictures))
    return np.array(found)


def draw(cfg: ExtrapolationConfig, run: TrainingRun) -> Tensor:
    """Long pictures (shown, 3, H, W), with positions that grow beyond those of training."""
    model = load_generator(run.last, pick_device(cfg.device))
    return model.sample([i % len(model.classes) for i in range(cfg.shown)],
                        cfg.times * model.tokenizer.config.columns, cfg=cfg.cfg,
                        cfg_schedule="constant", positions="grow", steps=cfg.euler_steps).cpu()


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments extrapolation", __doc__, ExtrapolationConfig(), argv)
    lab = Lab("extrapolation", cfg)
    runs = {"columns, on": lab.columns(),
            "columns, off": lab.columns("--position-shift 1", "unshifted"),
            "grid, on": lab.grid("--position-shift 16", "grid-shifted"), "grid, off": lab.grid()}
    found = {k: long_losses(cfg, of) for k, of in runs.items()}  # (seeds, times·n)
    n = found["grid, on"].shape[1] // cfg.times
    strips = [draw(cfg, runs[f"columns, {k}"][0]) for k in ("on", "off")]
    save_png(grid([of[i:i + 1] for i in range(cfg.shown) for of in strips],
                  ["with augmentation", "without"] * cfg.shown), lab.folder / "strips.png")

    edges = [n // 2, n, *(n * 2 ** k for k in range(1, 10) if 2 ** k < cfg.times), n * cfg.times]
    bands = list(zip(edges, edges[1:]))
    rows = [("position augmentation", *(f"tokens {a + 1}–{b}" for a, b in bands),
             "beyond / within, %")]
    rises = {}
    for name, values in found.items():
        within, beyond = values[:, n // 2:n].mean(1), values[:, n:].mean(1)
        rises[name] = 100 * (beyond / within - 1)
        rows.append((name, *(spread(values[:, a:b].mean(1)) for a, b in bands),
                     spread(rises[name], 2, True)))
    reading = ". ".join(
        f"Beyond the training length the loss of {layout} changes by "
        f"{spread(rises[f'{layout}, on'], 2, True)} % with position augmentation and by "
        f"{spread(rises[f'{layout}, off'], 2, True)} % without; " + verdict(
            "with it less", rises[f"{layout}, off"] - rises[f"{layout}, on"], 2)
        for layout in ("columns", "grid"))
    width = max(1, n // 4)
    points = {name: [(a + (width + 1) / 2, float(v[:, a:a + width].mean()))
                     for a in range(width, v.shape[1], width)]
              for name, v in found.items() if name.startswith("columns")}
    left_out = curves(lab.folder / "extrapolation.png", points, "column", "held-out loss",
                      f"Loss along the scroll; trained on {n} columns")
    Report("Beyond the training length (Fig. 7)", PAPER, rows, f"{reading}.", [
        "Tokens are columns, or patches of rows that follow below one another. Losses of the two "
        "cannot be compared, changes can; pictures continued by their mirror image have a change "
        "of their own, which is the same with and without augmentation.", left_out],
        {"losses": found, "rises": rises}).write(lab)
