"""Drawn pictures against real ones: Fréchet distances, at each model's own best guidance scale."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini import load_generator
from equimini.autoencoder import Tokenizer
from equimini.config import flag
from equimini.evaluate.feature_networks import load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance
from equimini.experiments.common import ExperimentConfig, Lab
from equimini.experiments.training_runs import TrainingRun
from equimini.training.data import fixed_loader, load_data
from equimini.utils.checkpoint import load_tokenizer
from equimini.utils.command_line import pick_device
from equimini.utils.errors import UserError
from equimini.utils.files import replacing
from equimini.utils.images import to_float, to_pixels

GUIDANCE = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0,
            32.0)  # scales to choose from
EXACT, BATCH = {"solver": "midpoint", "steps": 16}, 64


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


def lowest(value: Callable[[int], float], start: int, count: int) -> int:
    """The number of 0 … count − 1, found downhill from `start`, neither neighbour of which has a
    lower value."""
    at, known = start, functools.cache(value)
    while (best := min(range(max(0, at - 1), min(count, at + 2)), key=known)) != at:
        at = best
    return at


@torch.no_grad()
def reconstructed(images: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Pictures, uint8 (B, 3, H, W), encoded and decoded; None: as they are."""
    if tokenizer is None:
        return images
    x = to_float(images.to(tokenizer.latent_mean.device))
    return to_pixels(tokenizer.decode(tokenizer.encode(x)))


class Judge:
    """Fréchet distances between a model's samples and the held-out pictures.

    decoded: real pictures are encoded and decoded first, by the tokenizer of this layout and the
    same seed, which leaves out what it loses; for models of that layout alone.  floor: the distance
    of as many training pictures as a model draws, at the first seed.
    """

    def __init__(self, cfg: SampledConfig, lab: Lab, decoded: str = "") -> None:
        self.device, self.samples = pick_device(cfg.device), cfg.samples or lab.scale.samples
        self.lab, self.decoded = lab, decoded
        self.load: Callable[[TrainingRun], Any] = lambda run: load_generator(run.last, self.device)
        self.features: Callable[[Tensor], Tensor] = thumbnails
        self.name, self.kept = "8x8 thumbnails", "thumbnails"
        if cfg.network:
            net = load_network(cfg.network, device=self.device)
            self.features, self.name = net.features, net.name
            self.kept = net.sha256[:12]
        shape = load_tokenizer(lab.tokenizer(decoded or "columns").last, self.device).config
        train, self.val, _ = load_data(cfg.pictures(lab.tokenizer().last), shape)
        if min(len(train), len(self.val)) < 2:
            raise UserError("a Fréchet distance needs at least two training and two held-out "
                            "pictures; give more as --data, or --val-data")
        self.real = [self.gaussian("val", self.val, len(self.val), seed)
                     for seed in range(cfg.seeds if decoded else 1)]
        self.floor = frechet_distance(self.real[0], self.gaussian("train", train, self.samples))

    @property
    def how(self) -> str:
        """For a report."""
        return (f"Fréchet distance of {self.samples} samples (features: {self.name}; drawn with "
                f"{EXACT['steps']} steps of the {EXACT['solver']} method) to held-out pictures"
                f"{', encoded and decoded' if self.decoded else ''}. Guidance scale of every run: "
                f"from 1 on downhill over {', '.join(f'{s:g}' for s in GUIDANCE)}, by half as many "
                "other samples. Floor: as many training pictures.")

    def gaussian(self, split: str, data: Dataset, count: int, seed: int = 0) -> Gaussian:
        """Fitted to the features of `count` pictures, decoded by this seed's tokenizer if any."""
        run = self.lab.tokenizer(self.decoded or "columns", seed=seed)

        def pictures() -> Iterator[Tensor]:
            tokenizer = load_tokenizer(run.last, self.device) if self.decoded else None
            for images, _, _ in tqdm(fixed_loader(data, BATCH, count), "features of real pictures"):
                yield reconstructed(images, tokenizer)
        return self.fit(run, f"{split}{'-decoded' * bool(self.decoded)}-{count}", pictures())

    def fit(self, run: TrainingRun, name: str, pictures: Iterator[Tensor]) -> Gaussian:
        """To the features of pictures, uint8 (B, 3, H, W) each, which are kept beside `run`."""
        kept = run.folder / f"features-{self.kept}-{name}.npy"
        if not kept.exists():
            found = torch.cat([self.features(images).cpu() for images in pictures])
            with replacing(kept) as file:
                np.save(file, found.numpy())
        return Gaussian.fit(torch.from_numpy(np.load(kept)))

    def distance(self, run: TrainingRun, seed: int, scale: float, count: int,
                 first: int = 0, steps: int = 0) -> float:
        """Of `count` samples with seeds `first`, first + 1, …, classes in turn; seed: the run's;
        steps: other than `EXACT` has them."""
        exact = EXACT | ({"steps": steps} if steps else {})

        def pictures() -> Iterator[Tensor]:
            model = self.load(run)
            for i in tqdm(range(0, count, BATCH), f"drawing, guidance {scale:g}"):
                seeds = range(first + i, first + min(i + BATCH, count))
                yield to_pixels(model.sample([s % len(model.classes) for s in seeds],
                                             seed=seeds[0], cfg=scale, **exact))
        how = "-".join(map(str, exact.values()))
        return frechet_distance(self.real[seed if self.decoded else 0], self.fit(
            run, f"samples-{how}-{scale:g}-{count}-{first}", pictures()))

    def best(self, runs: list[TrainingRun]) -> tuple[list[float], np.ndarray]:
        """By seed, the best guidance scale, found on half as many samples, and the distance of
        others at that scale."""
        half, scales, at = max(2, self.samples // 2), [], GUIDANCE.index(1.0)
        for seed, run in enumerate(runs):
            at = lowest(lambda i: self.distance(run, seed, GUIDANCE[i], half, 1_000_000), at,
                        len(GUIDANCE))
            scales.append(GUIDANCE[at])
        return scales, np.array([self.distance(run, seed, scale, self.samples)
                                 for seed, (run, scale) in enumerate(zip(runs, scales))])


def scales_text(scales: list[float]) -> str:
    """Guidance scales of the seeds, for a table; an end of the sweep is marked."""
    return ", ".join(f"{s:g}" + " (an end)" * (s in (GUIDANCE[0], GUIDANCE[-1]))
                     for s in sorted(set(scales)))
