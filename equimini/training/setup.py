"""A training's configuration from its command line, and what it resumes or starts from."""

from __future__ import annotations

import argparse
import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import torch

from equimini.config import Checked
from equimini.presets import PRESETS, paper_training
from equimini.training.data import count_images
from equimini.training.options import RunConfig
from equimini.training.split import check_split
from equimini.utils import checkpoint, distributed
from equimini.utils.command_line import add_flags, config_from_dict, output_folder, override
from equimini.utils.errors import UserError, reading
from equimini.utils.files import locked, remove_leftovers

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

    def folder(self) -> AbstractContextManager:
        """A context in which no other training writes to the folder."""
        writes = distributed.is_main() and not self.dry_run
        return locked(self.out) if writes else nullcontext()


def set_up(kind: str, description: str, run: RunConfig, argv: list[str] | None = None,
           count: Callable[[Any], int] = count_images) -> Setup:
    """Parse the command line of train_{kind}.py and find what to resume.

    The preset gives the defaults, --recipe paper those of the training; with --resume, the
    checkpoint gives all; with --init-from, those of the model.  count: from a run's options to the
    number of its training pictures.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--recipe")
    known = first.parse_known_args(argv)[0]
    asked, name = known.preset, known.preset or ("small" if known.recipe else "tiny")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    model, training = (getattr(PRESETS[name], part) for part in (kind, f"{kind}_training"))
    args = make_parser(description, run, model, training).parse_args(argv)

    out = Path(getattr(args, "out", run.out))
    source, resumed, initial = out / "last.pt", None, None
    open_folder(out, args)
    if args.resume:
        resumed = checkpoint.load_newest(source, kind)
        with reading(source):
            saved, name = resumed["config"], resumed["config"]["preset"]
            if type(resumed["step"]) is not int or resumed["step"] < 0:
                raise ValueError(f"step {resumed['step']!r}")
            run = config_from_dict(type(run), saved["run"])
            training = config_from_dict(type(training), saved["training"])
        if asked not in (None, name):
            raise UserError(f"{source} was trained with --preset {name}, not {asked}")
    begun, run = run, override(run, args)
    if resumed:
        check_split(begun, run)
    if args.dry_run:
        run = dataclasses.replace(run, out="")  # where an index would be kept
    if run.init_from and not resumed:
        source = f"--init-from {run.init_from}"
        initial = checkpoint.load(run.init_from, kind)
    if known_model := resumed or initial:
        with reading(source):
            model = config_from_dict(type(model), known_model["config"]["model"])
        if initial:
            model = begin(model, args, source)
        check_model(model, args, source)
    if args.recipe:
        training = paper_training(kind, count(run), getattr(args, "batch_size", None))
    if run.deterministic:
        make_deterministic()
    training = override(training, args)
    local = distributed.local_batch(training.batch_size)
    if local % run.accumulate:
        raise UserError(f"--accumulate {run.accumulate} does not divide the {local} images that "
                        f"one process has of a batch of {training.batch_size}")
    return Setup(name, override(model, args), training, run,
                 distributed.local_device(run.device), out, resumed, initial, args.dry_run)


def begin(model: Checked, args: argparse.Namespace, source: str) -> Checked:
    """The model that starts with the weights of `source`, whose objective may be another one."""
    if getattr(model, "objective", "flow-matching") != "flow-matching":
        raise UserError(f"{source} was trained with --objective {model.objective}, which nothing "
                        "starts from; give a generator trained with flow-matching (--resume "
                        "trains this one longer)")
    return dataclasses.replace(model, **({"objective": args.objective} if "objective" in args else {}))


def check_model(model: Checked, args: argparse.Namespace, source: str) -> None:
    """Raise UserError where the command line asks for another model than `source` holds."""
    asked = override(model, args)
    if getattr(asked, "objective", "") != getattr(model, "objective", ""):
        raise UserError(f"{source} was trained with --objective {model.objective}, not "
                        f"{asked.objective}")
    if asked != model:
        raise UserError(f"{source} holds a model of other sizes than the flags; leave the "
                        "model's flags out, or begin another run")


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
                        help="continue from last.pt in --out; its settings are the defaults")
    parser.add_argument("--overwrite", action="store_true",
                        help="start afresh even if --out holds a run already")
    for part, title in ((run, "run"), (model, "model"), (training, "training")):
        add_flags(parser, part, title)
    return parser


def open_folder(out: Path, args: argparse.Namespace) -> None:
    """Create the output folder and clear what a killed run left half written, but for a dry run."""
    for name in ("overwrite", "recipe", "dry_run"):
        if args.resume and getattr(args, name):
            raise UserError(f"give --resume or --{name.replace('_', '-')}, not both")
    if args.dry_run:
        return
    output_folder(str(out))
    holds_run = any(path.suffix == ".pt" for path in own_files(out))
    if holds_run and not (args.resume or args.overwrite):
        raise UserError(f"{out} holds a run already; add --resume to continue it, --overwrite "
                        "to start afresh, or choose another folder with --out")
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
