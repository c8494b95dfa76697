"""What a training would be: its settings, its memory, and its time, before it is started.

    python train_generator.py --recipe paper --preset large --data imagenet/train --dry-run
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Callable

import torch
from torch import Tensor

from equimini.config import Checked
from equimini.presets import parameters
from equimini.training.loop import Trainer
from equimini.training.setup import Setup
from equimini.utils import distributed
from equimini.utils.command_line import spelled
from equimini.utils.errors import UserError
from equimini.utils.machine import seconds

MEASURED_STEPS = 3
FEW = 4  # images, at most, of a step whose bytes are counted, and on a CPU of one that is timed
COPIES = 5  # of every trained weight: itself, its gradient, two moments of Adam, the average


def dry_run(setup: Setup, images: int, make: Callable[[], tuple[Trainer, Tensor]],
            step: int = 0) -> None:
    """Print the report.

    images: of the training set.  make: gives the trainer and one example (1, …) of its data, or
    raises UserError for what it lacks, which is then printed in place of memory and time.  step:
    number of the step that is measured, one at which all losses are on.
    """
    cfg, processes = setup.training, distributed.world_size()
    count = distributed.local_batch(cfg.batch_size) // setup.run.accumulate  # a micro-batch's
    for title, part in (("run", setup.run), ("model", setup.model), ("training", cfg)):
        print_settings(title, part)
    print(f"\ntraining pictures      {images:,}")
    print(f"steps                  {cfg.steps:,} = {cfg.steps * cfg.batch_size / images:,.1f} epochs "
          f"of {images / cfg.batch_size:,.1f} steps")
    print(f"effective batch        {cfg.batch_size} = {processes} processes x "
          f"{setup.run.accumulate} micro-batches x {count} images")
    print(f"learning rate          {cfg.lr:g}, after {cfg.warmup_steps:,} steps of warm-up")
    try:
        print_costs(setup, *make(), images, count, step)
    except UserError as error:
        print(f"memory and time        not measured: {error}")


def print_settings(title: str, part: Checked) -> None:
    """One line for each setting."""
    print(f"\n{title}")
    for name, value in dataclasses.asdict(part).items():
        print(f"  {name.replace('_', '-'):20} {spelled(value) or 'none'}")


def print_costs(setup: Setup, trainer: Trainer, example: Tensor, images: int, wanted: int,
                step: int) -> None:
    """Print parameters, memory and time, from a few steps on copies of `example`.

    images: of the training set; wanted: of a micro-batch.
    """
    few, gpu = min(wanted, FEW), setup.device.type == "cuda"
    trainer.opts = dataclasses.replace(setup.run, accumulate=1)

    steps = itertools.count(step)  # counting up, as draws are made for the step to come

    def train(n: int) -> None:
        trainer.step(next(steps), example.expand(n, *example.shape[1:]), torch.zeros(n).long())

    kept = {}  # bytes for the backward pass, by images: they are a + b·images
    for n in (max(1, few // 2), few):
        saved = Saved()
        with saved:
            train(n)
        kept[n] = saved.bytes
    (fewer, low), (few, high) = min(kept.items()), max(kept.items())
    per_image = (high - low) / (few - fewer) if few > fewer else high
    for_pass = high + per_image * (wanted - few)

    trained = sum(p.numel() for group in trainer.stepper.optimizer.param_groups
                  for p in group["params"])
    state = 4 * COPIES * trained
    print(f"parameters             {trained / 1e6:.2f} M trained, "
          f"{parameters(trainer.model) / 1e6:.2f} M in all")
    print(f"memory per process     about {(state + for_pass) / 2**30:.2f} GiB: "
          f"{state / 2**30:.2f} for weights, gradients, Adam and average,\n{'':23}"
          f"{for_pass / 2**30:.2f} for what {wanted} images keep for the backward pass")
    count, seconds = time_step(train, wanted if gpu else few, setup.device)
    if gpu:
        print(f"{'':23}{torch.cuda.max_memory_allocated() / 2**30:.2f} measured on this GPU with "
              f"{count} images")
    if gpu and count < wanted:
        print(f"{'':23}{wanted} images do not fit: --accumulate "
              f"{setup.run.accumulate * parts(wanted, count)} makes micro-batches that do")
    per_second = count * distributed.world_size() / seconds
    hours = images / per_second / 3600
    epochs = setup.training.steps * setup.training.batch_size / images
    print(f"time per epoch         {duration(hours)} at {per_second:.3g} images/s, measured with "
          f"{count} images a step\n{'':23}on {distributed.world_size()} x {setup.device}, without "
          f"reading pictures; all {epochs:,.1f} epochs: {duration(epochs * hours)}")


def time_step(train: Callable[[int], None], count: int,
              device: torch.device) -> tuple[int, float]:
    """Images of a step, `count` or as many halves of it as fit into memory, and its seconds."""
    while count:
        try:
            return count, min(seconds(lambda: train(count), device.type)
                              for _ in range(MEASURED_STEPS))
        except torch.OutOfMemoryError:
            count //= 2
        torch.cuda.empty_cache()  # here, where no frame of the failed step holds its tensors
        torch.cuda.reset_peak_memory_stats()
    raise UserError("one image at a time needs more memory than there is")


def parts(images: int, fitting: int) -> int:
    """The fewest equal parts of so many images that hold at most `fitting` each."""
    return next(n for n in range(1, images + 1) if images % n == 0 and images // n <= fitting)


def duration(hours: float) -> str:
    """Hours as text: '12 s', '5.0 min', '3.2 h', '41 days'."""
    for limit, factor, unit in ((1 / 60, 3600, "s"), (1, 60, "min"), (48, 1, "h")):
        if hours < limit:
            return f"{hours * factor:.1f} {unit}"
    return f"{hours / 24:,.0f} days"


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes of memory kept for backward passes, weights left out."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        super().__init__(self._note, lambda x: x)

    def _note(self, x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):
            self.seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    @property
    def bytes(self) -> int:
        """Their sum; memory that several tensors share counts once."""
        return sum(self.seen.values())
