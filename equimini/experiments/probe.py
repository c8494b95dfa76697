"""A trained generator under test: loss per column, and short trainings from its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini.generator import Generator, GeneratorConfig, make_generator
from equimini.noise import rng
from equimini.presets import GeneratorTraining
from equimini.training.data import fixed_loader
from equimini.training.generator_trainer import Draws, GeneratorRun, GeneratorTrainer
from equimini.training.loop import Stepper
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_inside
from equimini.utils.command_line import config_from_dict
from equimini.utils.images import to_float

CLIP = 1e-4  # gradients are clipped to this norm, which is below that of any that still matters
Batch = tuple[Tensor, Tensor, Tensor]  # means or images, labels, indices


class Probe:
    """A generator's checkpoint, from whose EMA weights trainers are made."""

    def __init__(self, path: Path, device: torch.device, precision: str = "float32") -> None:
        self.path, self.device, self.precision = path, device, precision
        self.content = checkpoint.load(path, "generator")
        self.classes: list[str] = self.content["classes"]
        self.tokenizer = tokenizer_inside(self.content, path).to(device)
        self.model = config_from_dict(GeneratorConfig, self.content["config"]["model"])

    def trainer(self, seed: int = 0, **training: Any) -> GeneratorTrainer:
        """A trainer at the start; training: fields of GeneratorTraining.

        `validate` measures the weights that are trained, not their moving average.
        """
        before = config_from_dict(GeneratorTraining, self.content["config"]["training"])
        model = make_generator(self.model, len(self.classes), self.tokenizer.config.token_channels)
        checkpoint.load_weights(model, self.content["ema"], self.path)
        return GeneratorTrainer(model.to(self.device), self.tokenizer, self.classes,
                                dataclasses.replace(before, ema_decay=0.0, **training),
                                GeneratorRun(seed=seed, precision=self.precision))

    def descender(self, seed: int, length: float, **training: Any) -> GeneratorTrainer:
        """A trainer whose steps go straight down the gradient, all of one length.

        length: of a step, over the norm of all weights.
        """
        trainer = self.trainer(seed, warmup_steps=0, grad_clip=CLIP, **training)
        weights = list(trainer.model.parameters())
        norm = float(torch.stack([w.detach().norm() for w in weights]).norm())
        trainer.cfg = dataclasses.replace(trainer.cfg, lr=length * norm / CLIP)
        trainer.stepper = Stepper(torch.optim.SGD(weights, lr=trainer.cfg.lr))
        return trainer

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """The loss of each column."""
        return self.trainer().validate(batches)["val_loss_per_column"]

    def gradients(self, batches: Iterable[Batch]) -> Tensor:
        """Of the loss of each column over all weights, (N, weights), summed over the batches.

        The loss is that of `losses`, with noise of its own.
        """
        trainer, total = self.trainer(), torch.zeros(())
        model = trainer.model.eval()
        weights = list(model.parameters())
        for means, labels, indices in batches:
            draws = trainer.draws([rng("gradients", int(i)) for i in indices],
                                  *trainer.shape(means))
            draws = draws.map(trainer.on_device)
            x, labels = trainer.tokens(means, draws), trainer.on_device(labels)
            found = [torch.autograd.grad(column_loss(model, x, labels, draws, i), weights,
                                         materialize_grads=True) for i in range(x.shape[1])]
            total = total + torch.stack([torch.cat([g.detach().flatten() for g in of])
                                         for of in found])  # torch 2.9's zeros require grad
        return total

    @torch.no_grad()
    def encode(self, data: Dataset, count: int, batch_size: int, label: str,
               seed: int = 0) -> list[Batch]:
        """Means of `count` random pictures, the same for the same seed, in batches, in memory."""
        return [(self.tokenizer.encode(to_float(images.to(self.device))).cpu(), labels, indices)
                for images, labels, indices in tqdm(
                    fixed_loader(data, batch_size, count, seed=seed), desc=label)]


def column_loss(model: Generator, x: Tensor, labels: Tensor, draws: Draws, i: int) -> Tensor:
    """Eq. 8 of column i alone; x (B, N, C), draws.u (M, B, N), draws.eps (M, B, N, C)."""
    z = model.predict(x[:, :i + 1], labels)[:, i]  # (B, d)
    x, eps, t = x[:, i], draws.eps[:, :, i], draws.u[:, :, i] * (1 - 1e-5) + 1e-5
    v = model.head(torch.lerp(x, eps, t[..., None]), t, z)  # (M, B, C)
    return (v - (eps - x)).square().mean()
