"""Samples beside their nearest training pictures: does the model memorise?

    python -m equimini.show neighbours --checkpoint runs/generator/last.pt --data my/pictures

Each row of the sheet is a sample and the training pictures closest to it; the number before
the class is the distance of the closest.  As a yardstick, the same is
done for held-out pictures, which the model cannot have seen: samples that are copies lie much
closer to the training set than those do.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini import load_generator
from equimini.config import flag
from equimini.evaluate.feature_networks import load_network
from equimini.training.data import fixed_loader, load_data
from equimini.training.options import DataConfig
from equimini.training.split import as_trained
from equimini.utils.command_line import output_folder, parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.images import clean_label, grid, save_png, to_float, to_pixels

Features = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) to (B, F) vectors


@dataclass(frozen=True)
class NeighboursConfig(DataConfig):
    checkpoint: str = flag("runs/generator/last.pt", "checkpoint of a trained generator")
    network: str = flag("", "TorchScript network whose features are compared (the call of the "
                        "published Inception: net(uint8 pictures, return_features=True)); empty: "
                        "pixels are compared")
    count: int = flag(8, "samples, the classes in turn", min=1)
    nearest: int = flag(5, "training pictures beside each sample", min=1)
    cfg: float = flag(2.0, "guidance scale of the samples; 1: none", min=0)
    steps: int = flag(100, "Euler steps per column", min=1)
    batch_size: int = flag(64, "training pictures compared at a time", min=1)


def pixels(images: Tensor) -> Tensor:
    """Features that are the pixels themselves, in [−1, 1], over the root of their number: the
    distance of two is the root mean squared difference."""
    flat = to_float(images).flatten(1)
    return flat / flat.shape[1] ** 0.5


def network(path: str, device: torch.device) -> Features:
    """Features of a TorchScript network, scaled to unit length (distances are 0 to 2)."""
    net = load_network(path, device=device)
    return lambda images: torch.nn.functional.normalize(net.features(images))


@torch.no_grad()
def nearest(queries: Tensor, data: Dataset, features: Features, k: int, batch_size: int,
            device: torch.device, workers: int) -> tuple[Tensor, list[list[tuple[int, bool]]]]:
    """The k pictures of `data` nearest to each of `queries`, uint8 (Q, 3, H, W).

    Returns their distances (Q, k), rising, and (index, mirrored) of each.  Mirror images count
    where pixels are compared; a network's features hardly see a mirror.
    """
    q = features(queries.to(device))  # (Q, F)
    best = q.new_full((len(q), k), float("inf"))
    names = torch.zeros_like(best, dtype=torch.long)  # 2·index + mirrored
    loader = fixed_loader(data, batch_size, len(data), workers)
    for images, _, indices in tqdm(loader, desc="comparing with training pictures"):
        images = images.to(device)
        for mirrored in range(data.mirrors if features is pixels else 1):
            d = torch.cdist(q, features(images.flip(3) if mirrored else images))  # (Q, B)
            here = (2 * indices + mirrored).to(q.device).expand(len(q), -1)
            best, order = torch.cat((best, d), 1).topk(k, largest=False)
            names = torch.cat((names, here), 1).gather(1, order)
    return best.cpu(), [[(n // 2, bool(n % 2)) for n in row] for row in names.tolist()]


def main(argv: list[str]) -> None:
    cfg = parse("equimini.show neighbours", __doc__, NeighboursConfig(out="neighbours.png"),
                argv)
    out, device = Path(cfg.out), pick_device(cfg.device)
    output_folder(out.parent)
    model = load_generator(cfg.checkpoint, device)
    train, val, _ = load_data(as_trained(cfg, cfg.checkpoint), model.tokenizer.config)
    train.augment = False  # centre crops
    if cfg.nearest > len(train) * train.mirrors:
        raise UserError(f"--nearest {cfg.nearest} is more than the training pictures there are")
    features = network(cfg.network, device) if cfg.network else pixels

    classes = [i % len(model.classes) for i in range(cfg.count)]
    samples = model.sample(classes, model.tokenizer.config.tokens(train.width), seed=cfg.seed,
                           cfg=cfg.cfg, steps=cfg.steps,
                           progress=lambda drawn: tqdm(drawn, desc="drawing samples, columns"))
    held_out = torch.cat([x for x, _, _ in fixed_loader(val, cfg.batch_size, 4 * cfg.count)])
    queries = torch.cat((to_pixels(samples), held_out))
    distances, names = nearest(queries, train, features, cfg.nearest, cfg.batch_size, device,
                               cfg.workers)

    rows, labels = [], []
    for i, c in enumerate(classes):
        views = [to_float(train.view(n, None, flip)[0]) for n, flip in names[i]]
        rows.append(torch.stack((samples[i].cpu(), torch.ones_like(views[0]), *views)))
        labels.append(f"{distances[i, 0]:.3f} {clean_label(model.classes[c], 12)}")
    save_png(grid(rows, labels), out)
    first = distances[:, 0].tolist()
    print(f"distance to the nearest of {len(train)} training pictures "
          f"({'features' if cfg.network else 'pixels, RMS in [-1, 1]'}): samples "
          f"{summary(first[:cfg.count])}, held-out pictures {summary(first[cfg.count:])}: {out}")


def summary(values: list[float]) -> str:
    return f"median {statistics.median(values):.3f} (smallest {min(values):.3f})"
