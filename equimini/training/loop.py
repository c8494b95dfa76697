"""What both trainings share: the loop, and of each step the optimizer, the average, the schedule.

`fit` is the training of both scripts; a `Trainer` is the method itself, without the machinery.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from equimini.config import Checked
from equimini.training.data import ImageFolder, fixed_loader, report_pictures, training_loader
from equimini.training.options import RunConfig
from equimini.training.setup import Setup, own_files
from equimini.utils import checkpoint, distributed
from equimini.utils.errors import UserError, reading
from equimini.utils.files import replacing
from equimini.utils.signals import StopRequest


def fit(kind: str, setup: Setup, trainer: Trainer, train: Dataset, val: Dataset,
        classes: list[str]) -> None:
    """The training of both scripts, from the first step or the resumed one to the last.

    Asked to stop by Ctrl-C or SIGTERM, it writes a checkpoint after the step and exits with the
    shell's code for that signal (130, 143), so that a chain of commands ends there.
    """
    out, best, main = setup.out, math.inf, distributed.is_main()
    if setup.resumed:
        with reading(out / "last.pt"):
            trained_on, best = setup.resumed["classes"], float(setup.resumed["best_loss"])
        if trained_on != classes:
            raise UserError(f"the run to resume has the classes {trained_on}, the "
                            f"data has {classes}; to train it further on other classes, give "
                            f"--init-from {out / 'last.pt'} and another --out")
        with reading(out / "last.pt"):
            trainer.load_state(setup.resumed)
        setup.resumed = None
    else:
        if main:  # what an older run left, given up by --overwrite
            for path in own_files(out):
                path.unlink()
        if setup.initial:
            with reading("the checkpoint of --init-from"):
                trainer.start_from(setup.initial)
            setup.initial = None
    distributed.copy_from_main(trainer.model, trainer.ema.model)
    if main:
        (out / "previews").mkdir(exist_ok=True)
    if setup.run.cache_gb:
        if not isinstance(train, ImageFolder):
            raise UserError("--cache-gb keeps pictures of a folder in memory; leave it out here")
        train.keep_in_memory(setup.run.cache_gb, setup.run.workers)

    def save(name: str, step: int, best: float) -> None:
        if main:
            config = {"model": setup.model, "training": setup.training, "run": setup.run}
            config = {"preset": setup.preset, **{k: asdict(v) for k, v in config.items()}}
            checkpoint.save(out / name, kind, {"config": config, "classes": classes, "step": step,
                                               "best_loss": best, **trainer.state()},
                            keep=setup.run.keep if name == "last.pt" else 1)

    with StopRequest() as stop:
        step = train_steps(kind, setup, trainer, train, val, best, save, stop)
    report_pictures([train, val], out)
    if step < setup.training.steps:
        print(f"stopped at step {step}; continue with --resume")
        raise SystemExit(128 + stop.asked)


def train_steps(kind: str, setup: Setup, trainer: Trainer, train: Dataset, val: Dataset,
                best: float, save: Callable[[str, int, float], None], stop: StopRequest) -> int:
    """The loop: steps, log, validations, previews, checkpoints.  Returns the steps done.

    Only the main process writes.
    """
    cfg, opts, step, main = setup.training, setup.run, setup.start, distributed.is_main()
    log = Log(setup.out / "log.jsonl", step) if main else None
    val_loader = fixed_loader(val, distributed.local_batch(cfg.batch_size), opts.val_images, shared=True)
    with Progress(step, cfg.steps, cfg.batch_size, kind) as progress:
        for data, labels, _ in training_loader(train, cfg.batch_size, opts, step, cfg.steps,
                                               setup.device.type == "cuda"):
            if step == trainer.all_losses_from:  # a critic raises the loss on held-out images
                best = math.inf
            scalars = trainer.step(step, data, labels)
            step += 1
            progress.step(scalars, trainer.stepper.skipped)
            last = step == cfg.steps
            if main and step % opts.log_every == 0:
                log.write(step, **scalars, ema_distance=trainer.ema.distance(trainer.model),
                          skipped=trainer.stepper.skipped, images_per_s=progress.rate)
            with progress.paused():
                if step % opts.val_every == 0 or last:
                    scores = trainer.validate(val_loader)
                    if main:
                        log.write(step, **scores)
                        shown = (f"{k.removeprefix('val_')} {v:.5g}" for k, v in scores.items()
                                 if isinstance(v, float))
                        progress.write(f"step {step}: {', '.join(shown)} (held out)")
                    if scores["val_loss"] < best:
                        best = scores["val_loss"]
                        save("best.pt", step, best)
                if main and (step % opts.preview_every == 0 or last):
                    trainer.preview(setup.out / "previews" / f"{step:07d}.png")
                stop.share()
                if step % opts.save_every == 0 or last or stop.asked:
                    save("last.pt", step, best)
            if stop.asked:
                break
    return step


class Log:
    """A JSONL file of scalars, one line per record; lines of steps not trained yet are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() and start else []
        steps = [_step(line) for line in lines]
        if damaged := sum(step is None for step in steps[:-1]):  # the last: cut off by a kill
            warnings.warn(f"{path}: left out {damaged} damaged lines", stacklevel=2)
        with replacing(path) as file:
            file.write(b"".join(line for line, step in zip(lines, steps)
                                if step is not None and step <= start))
        self.path = path

    def write(self, step: int, **scalars: float) -> None:
        """Append one record; `step` counts the optimizer steps done."""
        try:
            with open(self.path, "a") as file:  # not kept open: a training may end anywhere
                file.write(json.dumps({"step": step, **scalars}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, and go "
                            "on from the last checkpoint with --resume") from None


def _step(line: bytes) -> float | None:
    """The step of a line of the log; None where it is no whole line."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, (int, float)) else None


class Progress(tqdm):
    """Progress bar with loss, learning rate and images per second."""

    def __init__(self, start: int, steps: int, batch_size: int, label: str) -> None:
        super().__init__(total=steps, initial=start, desc=label, dynamic_ncols=True,
                         mininterval=1.0, disable=not distributed.is_main())
        self.batch_size, self.images, self.since, self.rate = batch_size, 0, time.time(), 0.0

    def step(self, scalars: dict[str, float], skipped: int) -> None:
        """Count one step, and show its loss, and how many steps were left out so far."""
        self.images += self.batch_size
        passed = time.time() - self.since
        if passed > 2:
            self.rate, self.images, self.since = self.images / passed, 0, time.time()
        shown = {k: f"{scalars[k]:.3g}" for k in ("loss", "lr")} | {"img/s": f"{self.rate:.0f}"}
        self.set_postfix(shown | ({"skipped": skipped} if skipped else {}), refresh=False)
        self.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count for the images per second."""
        start = time.time()
        yield
        self.since += time.time() - start


class Trainer:
    """What `fit` needs of either model: the method itself, without the machinery.

    A subclass adds:
    step(step, data, labels): one training step on this process's local batch; returns `loss`, `lr`
        and more, of the whole batch: the same on every process.
    validate(loader): scores on held-out images, `val_loss` among them; `loader` has this
        process's part.
    preview(path): draws a picture of how far the training is.
    start_from(state): takes the weights (EMA) of another run's checkpoint as the initial ones.
    more_state(): what `state` has of the subclass; its `load_state` loads it.
    """

    all_losses_from = 0  # step from which all losses are on, and best.pt is chosen afresh

    def __init__(self, model: nn.Module, cfg: Checked, opts: RunConfig, device: torch.device,
                 optimizer: torch.optim.Optimizer, ema_warmup: bool) -> None:
        set_float32(opts.precision, device)
        self.model, self.cfg, self.opts, self.seed, self.device = model, cfg, opts, opts.seed, device
        self.ema = Ema(model, cfg.ema_decay, ema_warmup)
        self.optimizer, self.stepper = optimizer, Stepper(optimizer)

    def autocast(self) -> torch.autocast:
        """Matrix products and convolutions in bfloat16 with --precision bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, self.opts.precision == "bf16")

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "skipped": self.stepper.skipped,
                **self.more_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        checkpoint.load_weights(self.model, state["model"], "last.pt")
        checkpoint.load_weights(self.ema.model, state["ema"], "last.pt")
        load_optimizer(self.optimizer, state["optimizer"])
        self.stepper.skipped = state["skipped"]


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


def total(sums: dict[str, Tensor]) -> dict[str, float | list[float]]:
    """Scalars and vectors, each a sum over this process's part, summed over all and as numbers.

    One message between the processes, and one wait for the device.
    """
    flat = distributed.sendable(torch.cat([v.detach().flatten() for v in sums.values()]))
    distributed.sum_tensors([flat])
    parts = flat.cpu().split([v.numel() for v in sums.values()])
    return {name: part.view_as(v).tolist() for (name, v), part in zip(sums.items(), parts)}


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


def set_float32(precision: str, device: torch.device) -> None:
    """What float32 products mean on CUDA: tf32 (10 bits of mantissa) or all their bits.

    A setting of the whole process.  Raises UserError for tf32 on another device.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        raise UserError(f"--precision tf32 is arithmetic of CUDA devices, got --device {device}; "
                        "give float32 or bf16")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, but keep this one's own implementation (fused or not).

    Raises ValueError, KeyError or TypeError for a state that does not fit.
    """
    own = ("fused", "foreach")
    groups = [{**theirs, **{k: mine[k] for k in own}}
              for mine, theirs in zip(optimizer.param_groups, state["param_groups"])]
    optimizer.load_state_dict({**state, "param_groups": groups})
    if any(type(group[k]) is not type(optimizer.defaults[k]) for group in groups
           for k in ("betas", "eps", "weight_decay")) or any(
            not 0 <= beta < 1 for group in groups for beta in group["betas"]):
        raise ValueError("the optimizer's settings are of other kinds")
    for p, kept in optimizer.state.items():  # torch looks at neither until the next step
        if kept.keys() != {"step", "exp_avg", "exp_avg_sq"} or any(
                x.shape != (p.shape if name != "step" else ()) for name, x in kept.items()) or (
                not 0 <= kept["step"] < 2**53):
            raise ValueError("the optimizer's state does not fit the weights")
