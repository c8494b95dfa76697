"""What the experiments share: their options, their sizes, and the trainings they are made of.

Every training is an ordinary run of train_tokenizer.py or train_generator.py in a folder of its
own, named after its settings, under OUT/runs.  So variants and experiments share what they have in
common, a finished run is not trained again, and an interrupted one goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from equimini.config import Checked, flag
from equimini.training import cache_latents
from equimini.utils.command_line import add_flags, output_folder, override
from equimini.utils.errors import UserError
from equimini.utils.files import replacing

Config = TypeVar("Config", bound="ExperimentConfig")
ROOT = Path(__file__).parents[2]  # where the training scripts lie


@dataclass(frozen=True)
class Scale:
    """How large an experiment is: flags on top of the preset `tiny`, steps, pictures measured."""

    tokenizer: str
    generator: str
    tokenizer_steps: int
    steps: int
    images: int  # pictures whose latents are kept, 0: all
    val_images: int
    samples: int  # pictures drawn where samples are judged


SCALES = {
    "toy": Scale("--image-size 32 --multipliers 1,2 --base-channels 8 --norm-groups 4 "
                 "--z-channels 4 --token-channels 8 --batch-size 4 --stats-images 16",
                 "--layers 1 --embed-dim 16 --heads 1 --class-tokens 2 --head-width 16 "
                 "--head-depth 1 --batch-size 4 --preview-steps 1 --preview-cfg 1",
                 4, 20, 64, 8, 8),
    "default": Scale("--lr-decay-every 225", "--layers 4 --embed-dim 128 --heads 4 "
                     "--class-tokens 4 --head-width 128 --head-depth 3 --batch-size 32 "
                     "--preview-steps 5",
                     400, 500, 4096, 512, 512),
    "large": Scale("", "--batch-size 64", 4000, 6000, 0, 1024, 2048),
}


@dataclass(frozen=True)
class ExperimentConfig(Checked):
    """The options of every experiment."""

    data: str = flag("synthetic", "folder of class sub-folders of images, or 'synthetic' / "
                     "'synthetic-object' (drawn by code)")
    val_data: str = flag("", "folder of held-out images; empty: a share of --data")
    out: str = flag("runs/experiments", "folder to write to; experiments on the same data share "
                    "their trainings in it")
    scale: str = flag("default", "size of models and trainings: default takes at most half an hour "
                      "on two cores, large takes a GPU or patience, toy shows nothing",
                      choices=tuple(SCALES))
    seeds: int = flag(3, "trainings of every variant, which gives the spread", min=1)
    steps: int = flag(0, "training steps of every generator; 0: the scale's", min=0)
    tokenizer_steps: int = flag(0, "training steps of every tokenizer; 0: the scale's", min=0)
    grid_shift: int = flag(1, "position augmentation of the 2-D baseline, as --position-shift of "
                           "train_generator.py; 1: none, it is a part of the equivariant method",
                           min=1)
    precision: str = flag("bf16", "arithmetic of the generators' matrix products",
                          choices=("bf16", "float32"))
    workers: int = flag(1, "processes that load images; 0: none but the main one", min=0)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


def parse(name: str, doc: str, defaults: Config, argv: list[str]) -> Config:
    """The options of experiment `name` from its command line."""
    parser = argparse.ArgumentParser(prog=f"python -m equimini.experiments {name}",
                                     allow_abbrev=False, description=doc.split("\n")[0])
    add_flags(parser, defaults, "options")
    return override(defaults, parser.parse_args(argv))


def script(name: str) -> ModuleType:
    """train_tokenizer.py or train_generator.py, which lie beside the package.

    Raises UserError where they do not.
    """
    path = ROOT / f"{name}.py"
    if not path.exists():
        raise UserError(f"{path} is not there; run experiments from a checkout of the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Run:
    """A finished training."""

    folder: Path

    @property
    def last(self) -> Path:
        """Its checkpoint."""
        return self.folder / "last.pt"

    def losses(self) -> np.ndarray:
        """The held-out loss per column of its EMA generator at its last step, (N,)."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        scores = [r for r in map(json.loads, lines) if "val_loss_per_column" in r]
        return np.array(scores[-1]["val_loss_per_column"])

    def record(self) -> dict[str, float]:
        """`cpu_seconds` of its training so far, and `steps` once it is finished."""
        path = self.folder / "record.json"
        return json.loads(path.read_text()) if path.exists() else {"cpu_seconds": 0.0}


class Lab:
    """Trains what an experiment asks for, or finds it done.

    Raises UserError for an output folder that cannot be written.
    """

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.cfg, self.scale = cfg, SCALES[cfg.scale]
        self.steps = cfg.steps or self.scale.steps
        self.runs = output_folder(f"{cfg.out}/runs")
        self.used: dict[Path, float] = {}  # CPU seconds of the runs that were asked for
        self.ready: dict[tuple[str, str], tuple[Run, Path]] = {}  # tokenizers and latents

    def data_flags(self, data: str) -> list[str]:
        """--data and what belongs to it; `data` '' is the experiment's own."""
        if data and data != self.cfg.data:
            return ["--data", data]
        held_out = ["--val-data", self.cfg.val_data] if self.cfg.val_data else []
        return ["--data", self.cfg.data, *held_out]

    def train(self, kind: str, name: str, steps: int, flags: list[str]) -> Run:
        """The training of this kind with these flags, done now if it is not done yet."""
        flags = ["--preset", "tiny", *flags, "--steps", str(steps)]
        run = Run(self.runs / f"{kind}-{name}-{key(flags)}")
        if run.record().get("steps") != steps:
            self._train(kind, steps, flags, run)
        self.used[run.folder] = run.record()["cpu_seconds"]
        return run

    def _train(self, kind: str, steps: int, flags: list[str], run: Run) -> None:
        flags = [*flags, "--out", str(run.folder), "--workers", str(self.cfg.workers), "--device",
                 self.cfg.device, "--val-images", str(self.scale.val_images), "--val-every",
                 str(steps), "--save-every", str(max(1, steps // 4)), "--preview-every",
                 str(steps), "--keep", "1", *(["--resume"] if run.last.exists() else [])]
        print(f"$ python train_{kind}.py {' '.join(flags)}", flush=True)
        began, before, done = time.process_time(), run.record()["cpu_seconds"], {}
        try:
            script(f"train_{kind}").main(flags)
            done = {"steps": steps}
        except SystemExit as stop:
            print("the same command again goes on here")
            raise stop
        finally:
            if run.folder.exists():
                seconds = before + time.process_time() - began
                with replacing(run.folder / "record.json") as file:
                    file.write(json.dumps({"cpu_seconds": seconds, **done}).encode())
        (run.folder / "best.pt").unlink(missing_ok=True)  # as large as last.pt, and not used

    def tokenizer(self, layout: str = "columns", data: str = "") -> Run:
        """A tokenizer of this layout."""
        steps = self.cfg.tokenizer_steps or self.scale.tokenizer_steps
        name = layout if not data or data == self.cfg.data else f"{layout}-{Path(data).name}"
        return self.train("tokenizer", name, steps, [
            *self.scale.tokenizer.split(), "--layout", layout, *self.data_flags(data)])

    def latents(self, layout: str = "columns", data: str = "") -> tuple[Run, Path]:
        """A tokenizer, and the folder of its latents of the pictures."""
        if (layout, data) in self.ready:
            return self.ready[layout, data]
        tokenizer = self.tokenizer(layout, data)
        folder = self.runs / tokenizer.folder.name.replace("tokenizer-", "latents-")
        if not (folder / "meta.json").exists():
            pictures = dict(zip(("data", "val_data"), self.data_flags(data)[1::2]))
            cache_latents.encode(cache_latents.CacheConfig(
                **pictures, tokenizer=str(tokenizer.last), out=str(output_folder(str(folder))),
                images=self.scale.images, workers=self.cfg.workers, device=self.cfg.device))
        self.ready[layout, data] = tokenizer, folder
        return tokenizer, folder

    def tokens(self, layout: str = "columns") -> int:
        """How many tokens an image has: its subtasks."""
        views = np.load(self.latents(layout)[1] / "val-00000.npy", mmap_mode="r")
        return views.shape[2]  # (images, views, tokens, channels)

    def generator(self, name: str, seed: int, flags: str = "", *, layout: str = "columns",
                  data: str = "", steps: int = 0, initial: Run | None = None) -> Run:
        """A generator over cached latents.

        flags: of the variant; steps: 0 is the experiment's; initial: the run that it starts from
        (its EMA weights), with a shorter warm-up.
        """
        more = ["--warmup-steps", "20", "--init-from", str(initial.last)] if initial else []
        tokenizer, latents = self.latents(layout, data)
        return self.train("generator", f"{name}-s{seed}", steps or self.steps, [
            *self.scale.generator.split(), *more, "--latents", str(latents), "--tokenizer",
            str(tokenizer.last), "--seed", str(seed), "--precision",
            self.cfg.precision, *flags.split()])

    def columns(self, seed: int, flags: str = "", name: str = "columns", **options: Any) -> Run:
        """The paper's model: columns, a window of 4, position augmentation."""
        return self.generator(name, seed, flags, **options)

    def grid(self, seed: int, flags: str = "", name: str = "grid", **options: Any) -> Run:
        """The 2-D baseline: patches in raster order, full causal attention."""
        flags = f"--window {self.tokens('grid')} --position-shift {self.cfg.grid_shift} {flags}"
        return self.generator(name, seed, flags, layout="grid", **options)


def key(flags: list[str]) -> str:
    """A short name for settings; folders under OUT/runs are told by their names alone."""
    short = [Path(f).parent.name if f.endswith(".pt") else f for f in flags]
    short = [Path(f).name if "/latents-" in f else f for f in short]
    return hashlib.sha256(json.dumps(short).encode()).hexdigest()[:8]


def settings(cfg: Checked) -> dict[str, Any]:
    """The options as plain values, for the report."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg)}
