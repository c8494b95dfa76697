"""One optimizer step of a batch that processes and micro-batches share: gradients, EMA, schedule."""

from __future__ import annotations

import copy
import math
from typing import Any, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from equimini.config import Checked
from equimini.generator import Generator
from equimini.training.options import RunConfig
from equimini.training.precision import load_optimizer
from equimini.utils import checkpoint, distributed
from equimini.utils.errors import UserError


def weight_decay_groups(generator: Generator, weight_decay: float) -> list[dict]:
    """AdamW's groups of trained parameters: no decay on biases, norms and the flow head."""
    decayed, free = [], []
    for name, p in generator.named_parameters():
        if p.requires_grad:
            (free if p.dim() == 1 or name.startswith("head.") else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": free, "weight_decay": 0.0}]


class MicroBatch(NamedTuple):
    """A part of this process's local batch that goes through the model at once."""

    rows: slice  # of the local batch
    places: range  # of its images in the global batch, which key their random draws
    weight: float  # its part of the global batch


def micro_batches(images: int, accumulate: int) -> Iterator[MicroBatch]:
    """The local batch of `images` images, in `accumulate` parts."""
    size, offset = images // accumulate, distributed.rank() * images
    for first in range(0, images, size):
        yield MicroBatch(slice(first, first + size), range(offset + first, offset + first + size),
                         size / (images * distributed.world_size()))


def add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add each tensor of `more` to the one of the same name in `sums`."""
    for name, value in more.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


class Ema:
    """Exponential moving average of a module's weights, kept as a module of its own (`model`).

    With warmup the decay starts small, min(decay, (1+n)/(10+n)), so that the random first
    weights are forgotten quickly.  Buffers are copied; frozen parameters are left alone.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        self.updates += 1
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        mine, theirs = zip(*((a, b) for a, b in zip(self.model.parameters(), model.parameters())
                             if b.requires_grad))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for a, b in zip(self.model.buffers(), model.buffers()):
            a.copy_(b)

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """‖average − weights‖ / ‖weights‖: how far the weights have moved within its memory."""
        pairs = list(zip(self.model.parameters(), model.parameters()))
        apart = torch.stack([(a - b).norm() for a, b in pairs]).norm()
        return (apart / torch.stack([b.norm() for _, b in pairs]).norm()).item()


def warmup_decay_lr(step: int, lr: float, warmup_steps: int, decay: float = 1.0,
                    every: int = 1) -> float:
    """Learning rate of a step: linear from 0 over the warm-up, then × decay every `every` steps.

    A function of the step alone, so that a resumed run continues on the same curve.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * decay ** ((step - warmup_steps) // every)


def cooldown(step: int, steps: int, share: float) -> float:
    """Factor on the learning rate: 1, then falling linearly to 0 over the last `share` of the steps."""
    return min(1.0, (steps - step) / (share * steps)) if share else 1.0


class Stepper:
    """One optimizer step from the gradients of all micro-batches and processes, clipped.

    A step that is not finite is left out.  After `patience` of them in a row the training ends
    with an error; the last checkpoint stays.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, patience: int = 10) -> None:
        self.optimizer, self.patience, self.in_a_row, self.skipped = optimizer, patience, 0, 0

    def __call__(self, lr: float, clip: float) -> float:
        """Sum the processes' gradients, clip, step, clear them.

        Returns the gradient's norm before clipping (NaN: the step was left out).
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        distributed.sum_tensors([p.grad for p in parameters if p.grad is not None])
        norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        if finite := math.isfinite(norm):
            self.optimizer.step()
            self.in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            return norm
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.patience:
            raise UserError(f"the loss or its gradient was not finite {self.in_a_row} times in a "
                            "row; resume from the last checkpoint with a lower --lr or a lower "
                            "--grad-clip, and look for odd pictures in the data")
        return math.nan


class Trainer:
    """What `loop.fit` needs of either model: the method itself, without the machinery.

    A subclass adds:
    step(step, data, labels): one training step on this process's local batch; returns `loss`, `lr`
        and more, of the whole batch: the same on every process.
    validate(loader): scores on held-out images, `val_loss` among them; `loader` has this
        process's part.
    preview(path): draws a picture of how far the training is.
    start_from(state): takes the weights (EMA) of another run's checkpoint as the initial ones.
    """

    all_losses_from = 0  # step from which all losses are on, and best.pt is chosen afresh

    def __init__(self, model: nn.Module, cfg: Checked, opts: RunConfig, device: torch.device,
                 optimizer: torch.optim.Optimizer, ema_warmup: bool) -> None:
        self.model, self.cfg, self.opts, self.seed, self.device = model, cfg, opts, opts.seed, device
        self.ema = Ema(model, cfg.ema_decay, ema_warmup)
        self.optimizer, self.stepper = optimizer, Stepper(optimizer)

    def autocast(self) -> torch.autocast:
        """Matrix products and convolutions in bfloat16 with --precision bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, self.opts.precision == "bf16")

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "skipped": self.stepper.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        checkpoint.load_weights(self.model, state["model"], "last.pt")
        checkpoint.load_weights(self.ema.model, state["ema"], "last.pt")
        load_optimizer(self.optimizer, state["optimizer"])
        self.stepper.skipped = state["skipped"]
