"""The loop that both trainings share: steps, log, checkpoints, validation, previews."""

from __future__ import annotations

import json
import math
import time
import warnings
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Callable, Iterator

from torch.utils.data import Dataset
from tqdm import tqdm

from equimini.training.data import ImageFolder, report_pictures
from equimini.training.loaders import fixed_loader, training_loader
from equimini.training.setup import Setup, own_files
from equimini.training.step import Trainer
from equimini.utils import checkpoint, distributed
from equimini.utils.errors import UserError, reading
from equimini.utils.files import replacing
from equimini.utils.signals import StopRequest


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


class Progress:
    """Progress bar with loss, learning rate and images per second."""

    def __init__(self, start: int, steps: int, batch_size: int, label: str) -> None:
        self.bar = tqdm(total=steps, initial=start, desc=label, dynamic_ncols=True,
                        mininterval=1.0, disable=not distributed.is_main())
        self.batch_size, self.images, self.since, self.rate = batch_size, 0, time.time(), 0.0

    def step(self, scalars: dict[str, float], skipped: int) -> None:
        """Count one step, and show its loss, and how many steps were left out so far."""
        self.images += self.batch_size
        passed = time.time() - self.since
        if passed > 2:
            self.rate, self.images, self.since = self.images / passed, 0, time.time()
        shown = {k: f"{scalars[k]:.3g}" for k in ("loss", "lr")} | {"img/s": f"{self.rate:.0f}"}
        self.bar.set_postfix(shown | ({"skipped": skipped} if skipped else {}), refresh=False)
        self.bar.update()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count for the images per second."""
        start = time.time()
        yield
        self.since += time.time() - start

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        if distributed.is_main():
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()


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
            checkpoint.save(out / name, kind, {"config": setup.config(), "classes": classes,
                                               "step": step, "best_loss": best, **trainer.state()},
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
    with closing(Progress(step, cfg.steps, cfg.batch_size, kind)) as progress:
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
                    numbers = {k: v for k, v in scores.items() if isinstance(v, float)}
                    shown = (f"{k.removeprefix('val_')} {v:.5g}" for k, v in numbers.items())
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
