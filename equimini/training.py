"""What both training scripts share: set-up and resuming, the loop, log, signals."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from equimini import checkpoint, distributed
from equimini.data import (ImageFolder, count_images, fixed_loader, report_pictures,
                           training_loader)
from equimini.cli import (RunConfig, UserError, add_flags, config_from_dict, output_folder,
                          override)
from equimini.files import remove_leftovers, replacing
from equimini.optimize import Ema, Stepper
from equimini.presets import PRESETS, Checked, paper_training


PATIENCE = timedelta(minutes=30)  # that one process waits for another in training


@dataclass
class Setup:
    """A training's resolved configuration, and the checkpoint that it resumes from, if any."""

    preset: str
    model: Checked
    training: Checked
    run: RunConfig
    device: torch.device
    out: Path
    resumed: dict[str, Any] | None  # dropped once it is loaded
    initial: dict[str, Any] | None = None  # the checkpoint of --init-from, likewise
    dry_run: bool = False  # nothing is to be written

    def __post_init__(self) -> None:
        self.start = self.resumed["step"] if self.resumed else 0  # the first step to train

    def config(self) -> dict[str, Any]:
        """The configuration as plain values, for the checkpoint."""
        parts = {"model": self.model, "training": self.training, "run": self.run}
        return {"preset": self.preset, **{k: dataclasses.asdict(v) for k, v in parts.items()}}


def set_up(kind: str, description: str, run: RunConfig, argv: list[str] | None = None,
           count: Callable[[Any], int] = count_images) -> Setup:
    """Parse the command line of train_{kind}.py and find what to resume.

    The preset gives the defaults, --recipe paper those of the training; with --resume, the
    checkpoint gives all; with --init-from, those of the model.  count: from a run's options to the
    number of its training pictures.  Raises UserError for an impossible setting, for an output
    folder that holds another run, and for a checkpoint whose model is not the one asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--recipe")
    known = first.parse_known_args(argv)[0]
    asked, name = known.preset, known.preset or ("small" if known.recipe else "tiny")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    model, training = getattr(preset, kind), getattr(preset, f"{kind}_training")

    args = make_parser(description, run, model, training).parse_args(argv)

    out = Path(getattr(args, "out", run.out))
    last, resumed, initial = out / "last.pt", None, None
    open_folder(out, args)
    if args.resume:
        resumed = checkpoint.load_newest(last, kind)
        saved = resumed["config"]
        if asked not in (None, saved["preset"]):
            raise UserError(f"{last} was trained with --preset {saved['preset']}, not {asked}")
        name, run, training = (saved["preset"], config_from_dict(type(run), saved["run"]),
                               config_from_dict(type(training), saved["training"]))
        model = config_from_dict(type(model), saved["model"])
        if override(model, args) != model:
            raise UserError(f"{last} holds a model of other sizes than asked for; leave the "
                            "model's flags out to resume it, or choose another --out")
    run = override(run, args)
    if args.recipe:
        training = paper_training(kind, count(run), getattr(args, "batch_size", None))
    if run.init_from and not resumed:
        initial = checkpoint.load(run.init_from, kind)
        model = config_from_dict(type(model), initial["config"]["model"])
        if override(model, args) != model:
            raise UserError(f"--init-from {run.init_from} holds a model of other sizes than asked "
                            "for; leave the model's flags out")
    if run.deterministic:
        make_deterministic()
    training = override(training, args)
    if distributed.share(training.batch_size) % run.accumulate:
        raise UserError(f"--accumulate {run.accumulate} does not divide the "
                        f"{distributed.share(training.batch_size)} images that one process has of "
                        f"a batch of {training.batch_size}")
    return Setup(name, override(model, args), training, run,
                 distributed.local_device(run.device), out, resumed, initial, args.dry_run)


def make_parser(description: str, run: RunConfig, model: Checked,
                training: Checked) -> argparse.ArgumentParser:
    """The command line of a training script, with these defaults."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny", metavar="NAME",
                        help=f"{', '.join(PRESETS)}: gives the defaults shown below [tiny]")
    parser.add_argument("--recipe", choices=("paper",), help="all training settings are the "
                        "paper's, its epochs turned into steps for the pictures of --data, its "
                        "learning rate for --batch-size; the model is --preset's [small]")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, the "
                        "memory and the time that it needs (from a few measured steps), and stop")
    parser.add_argument("--resume", action="store_true",
                        help="go on from last.pt in --out; its settings are the defaults")
    parser.add_argument("--overwrite", action="store_true",
                        help="start anew even if --out holds a run already")
    for part, title in ((run, "run"), (model, "model"), (training, "training")):
        add_flags(parser, part, title)
    return parser


def open_folder(out: Path, args: argparse.Namespace) -> None:
    """Create the output folder and clear what a killed run left half written, but for a dry run.

    Raises UserError if it cannot be written, if it holds a run that is neither to be resumed nor
    overwritten, and for options that exclude each other.
    """
    for name in ("overwrite", "recipe", "dry_run"):
        if args.resume and getattr(args, name):
            raise UserError(f"give --resume or --{name.replace('_', '-')}, not both")
    if args.dry_run:
        return
    output_folder(str(out))
    holds_run = any(path.suffix == ".pt" for path in own_files(out))
    if holds_run and not (args.resume or args.overwrite):
        raise UserError(f"{out} holds a run already; add --resume to go on with it, --overwrite "
                        "to start anew, or choose another folder with --out")
    for folder in (out, out / "previews"):
        remove_leftovers(folder)


def make_deterministic() -> None:
    """Have CUDA give the same bits every time; kernels that cannot raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # their backward passes use atomics
    torch.backends.cuda.enable_cudnn_sdp(False)


def own_files(out: Path) -> list[Path]:
    """What a training leaves in its folder, but for the log."""
    patterns = ("last.pt", "last-[0-9]*.pt", "best.pt", "previews/[0-9]*.png")
    return [path for pattern in patterns for path in out.glob(pattern)]


class Log:
    """A JSONL file of scalars, one line per record; lines of steps not trained yet are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        kept = []
        if path.exists() and start:
            records = [line for line in path.read_text().splitlines(keepends=True)
                       if line.endswith("\n")]
            kept = [line for line in records if json.loads(line)["step"] <= start]
        with replacing(path) as file:
            file.write("".join(kept).encode())
        self.file = open(path, "a", buffering=1)

    def write(self, step: int, **scalars: float) -> None:
        """Append one record; `step` counts the optimizer steps done.

        Raises UserError if it cannot be written.
        """
        try:
            self.file.write(json.dumps({"step": step, **scalars}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}; make room, and go "
                            "on from the last checkpoint with --resume") from None


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
        """Leave the bar as it is."""
        self.bar.close()


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is finished and saved.

    A second one interrupts at once (not under torchrun).  A context: the usual handlers are back
    at its end.
    """

    def __init__(self, message: str = "stopping after this step; a checkpoint is written") -> None:
        self.asked, self.message = 0, message  # asked: the signal's number

    def __enter__(self) -> StopRequest:
        self.usual = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def share(self) -> None:
        """Let all processes stop after the same step, whichever was asked first."""
        if distributed.world_size() > 1:
            self.asked = int(distributed.largest(torch.tensor(self.asked)))

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and distributed.world_size() > 1:
            return  # torchrun hands on what the terminal has sent already; it kills in the end
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        if distributed.is_main():
            again = "" if distributed.world_size() > 1 else " (again to stop at once)"
            tqdm.write(f"{self.message}{again}")


class Trainer(Protocol):
    """What `fit` needs of a training script: the method itself, without the machinery."""

    model: nn.Module
    ema: Ema
    stepper: Stepper

    def step(self, step: int, data: Tensor, labels: Tensor) -> dict[str, float | list[float]]:
        """One training step on this process's share of a batch.

        Returns `loss`, `lr` and more, of the whole batch: the same on every process.
        """

    def validate(self, loader: DataLoader) -> dict[str, Any]:
        """Scores on held-out images, `val_loss` among them; `loader` has this process's share."""

    def preview(self, path: Path) -> None:
        """Draw a picture of how far the training is."""

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def start_from(self, state: dict[str, Any]) -> None:
        """Take the weights (EMA) of another run's checkpoint as the initial ones."""


def fit(kind: str, setup: Setup, trainer: Trainer, train: Dataset, val: Dataset,
        classes: list[str]) -> None:
    """The training of both scripts, from the first step or the resumed one to the last.

    Asked to stop by Ctrl-C or SIGTERM, it writes a checkpoint after the step and exits with the
    shell's code for that signal (130, 143), so that a chain of commands ends there.
    """
    out, best, main = setup.out, math.inf, distributed.is_main()
    if setup.resumed:
        if setup.resumed["classes"] != classes:
            raise UserError(f"the run to resume has the classes {setup.resumed['classes']}, the "
                            f"data has {classes}; to train it further on other classes, give "
                            f"--init-from {out / 'last.pt'} and another --out")
        trainer.load_state(setup.resumed)
        best, setup.resumed = setup.resumed["best_loss"], None
    else:
        if main:  # what an older run left, given up by --overwrite
            for path in own_files(out):
                path.unlink()
        if setup.initial:
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
        print(f"stopped at step {step}; go on with --resume")
        raise SystemExit(128 + stop.asked)


def train_steps(kind: str, setup: Setup, trainer: Trainer, train: Dataset, val: Dataset,
                best: float, save: Callable[[str, int, float], None], stop: StopRequest) -> int:
    """The loop: steps, log, validations, previews, checkpoints.  Returns the steps done.

    Only the main process writes.
    """
    cfg, opts, step, main = setup.training, setup.run, setup.start, distributed.is_main()
    log = Log(setup.out / "log.jsonl", step) if main else None
    val_loader = fixed_loader(val, distributed.share(cfg.batch_size), opts.val_images, shared=True)
    with closing(Progress(step, cfg.steps, cfg.batch_size, kind)) as progress:
        for data, labels, _ in training_loader(train, cfg.batch_size, opts, step, cfg.steps,
                                               setup.device.type == "cuda"):
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
