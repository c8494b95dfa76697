"""Drawn pictures against real ones: Fréchet distances, at each model's own best guidance scale."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini import load_generator
from equimini.config import flag
from equimini.evaluate.feature_networks import load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.training_runs import TrainingRun
from equimini.training.data import load_data
from equimini.training.loaders import fixed_loader
from equimini.utils.checkpoint import load_tokenizer
from equimini.utils.command_line import pick_device
from equimini.utils.errors import UserError
from equimini.utils.files import write_text
from equimini.utils.images import to_float, to_pixels

GUIDANCE = (1.0, 1.5, 2.0, 3.0)  # scales that are tried for every model
EULER_STEPS, BATCH = 25, 64


@dataclass(frozen=True)
class SampledConfig(ExperimentConfig):
    network: str = flag("", "TorchScript network of the Fréchet distances (the call of the "
                        "published Inception), or 'download'")
    samples: int = flag(0, "pictures drawn of every model; 0: the scale's", min=0)


def thumbnails(pictures: Tensor) -> Tensor:
    """Features that need no network: uint8 (B, 3, H, W) shrunk to 8×8, (B, 192), in [−1, 1].

    They see layout and colours, not detail.
    """
    return F.adaptive_avg_pool2d(to_float(pictures), 8).flatten(1)


class Judge:
    """Fréchet distances between a model's samples and the held-out pictures.

    decoded: real pictures are encoded and decoded first, which leaves out what the tokenizer loses,
    for models that share one.  floor: the distance of as many training pictures as a model draws.
    """

    def __init__(self, cfg: SampledConfig, lab: Lab, decoded: bool = False) -> None:
        self.device, self.samples = pick_device(cfg.device), cfg.samples or lab.scale.samples
        self.features: Callable[[Tensor], Tensor] = thumbnails
        self.name = "8x8 thumbnails"
        if cfg.network:
            net = load_network(cfg.network, device=self.device)
            self.features, self.name = net.features, net.name
        trained = lab.tokenizer().last
        tokenizer = load_tokenizer(trained, self.device)
        self.tokenizer = tokenizer if decoded else None
        train, val, _ = load_data(cfg.pictures(trained), tokenizer.config)
        if min(len(train), len(val)) < 2:
            raise UserError("a Fréchet distance needs at least two training and two held-out "
                            "pictures; give more as --data, or --val-data")
        self.real = self.gaussian(val, len(val))
        self.floor = frechet_distance(self.real, self.gaussian(train, self.samples))

    def gaussian(self, data: Dataset, count: int) -> Gaussian:
        """Fitted to the features of `count` pictures of a data set."""
        loader = tqdm(fixed_loader(data, BATCH, count), desc="features of real pictures")
        return Gaussian.fit(torch.cat([self.features(self.seen(images))
                                       for images, _, _ in loader]))

    @torch.no_grad()
    def seen(self, images: Tensor) -> Tensor:
        """Real pictures, uint8 (B, 3, H, W), as the models that are judged could draw them."""
        if self.tokenizer is None:
            return images
        x = to_float(images.to(self.device))
        return to_pixels(self.tokenizer.decode(self.tokenizer.encode(x)))

    def distance(self, run: TrainingRun, scale: float, count: int, first: int = 0) -> float:
        """Of `count` samples with seeds `first`, first + 1, …, classes in turn."""
        reference = "decoded-" if self.tokenizer else ""
        kept = run.folder / (f"frechet-{reference}{Path(self.name).stem}-{scale:g}-{count}-{first}"
                             ".json")
        if kept.exists():
            return json.loads(kept.read_text())
        model, found = load_generator(run.last, self.device), []
        for i in tqdm(range(0, count, BATCH), desc=f"drawing, guidance {scale:g}"):
            seeds = range(first + i, first + min(i + BATCH, count))
            images = model.sample([s % len(model.classes) for s in seeds], seed=seeds[0],
                                  cfg=scale, steps=EULER_STEPS)
            found.append(self.features(to_pixels(images)))
        value = frechet_distance(self.real, Gaussian.fit(torch.cat(found)))
        write_text(kept, json.dumps(value))
        return value

    def best(self, runs: list[TrainingRun]) -> tuple[float, list[float]]:
        """The best guidance scale, found on half as many samples of the first run, and the
        distance at that scale of every run's samples (with other seeds)."""
        half = max(2, self.samples // 2)
        scale = min(GUIDANCE, key=lambda s: self.distance(runs[0], s, half, 1_000_000))
        return scale, [self.distance(run, scale, self.samples) for run in runs]
