"""What the experiments share: their options, their sizes, and the trainings they are made of.

Every training is an ordinary run of train_tokenizer.py or train_generator.py in a folder of its
own, named after its settings, under OUT/runs.  So variants and experiments share what they have in
common, a finished run is not trained again, and an interrupted one resumes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equimini.config import Checked, flag
from equimini.experiments.training_runs import TrainingRun
from equimini.training import cache_latents
from equimini.training.options import DataConfig
from equimini.training.split import as_trained
from equimini.utils.command_line import output_folder


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
    position_channels: int  # of a token that is one position; a picture has as many values in all


SCALES = {
    "toy": Scale("--image-size 32 --multipliers 1,2 --base-channels 8 --norm-groups 4 "
                 "--z-channels 4 --token-channels 8 --batch-size 4 --stats-images 16",
                 "--layers 1 --embed-dim 16 --heads 1 --class-tokens 2 --head-width 16 "
                 "--head-depth 1 --batch-size 4 --preview-steps 1 --preview-cfg 1",
                 4, 20, 64, 8, 8, 1),
    "small": Scale("--image-size 32 --multipliers 1,2 --base-channels 8 --norm-groups 4 "
                   "--z-channels 16 --token-channels 32 --batch-size 8 --lr-decay-every 150 "
                   "--stats-images 512",
                   "--layers 3 --embed-dim 64 --heads 2 --class-tokens 2 --head-width 64 "
                   "--head-depth 2 --batch-size 32 --preview-steps 1 --preview-cfg 1",
                   100, 200, 1024, 256, 256, 2),
    "default": Scale("--lr-decay-every 225", "--layers 4 --embed-dim 128 --heads 4 "
                     "--class-tokens 4 --head-width 128 --head-depth 3 --batch-size 32 "
                     "--preview-steps 5",
                     400, 500, 4096, 512, 512, 4),
    "large": Scale("", "--batch-size 64", 4000, 6000, 0, 1024, 2048, 4),
}


@dataclass(frozen=True)
class ExperimentConfig(Checked):
    data: str = flag("synthetic", "folder of class sub-folders of images, or 'synthetic' / "
                     "'synthetic-object' (drawn by code)")
    val_data: str = flag("", "folder of held-out images; empty: a share of --data")
    out: str = flag("runs/experiments", "folder to write to; experiments on the same data share "
                    "their trainings in it")
    scale: str = flag("default", "size of models and trainings: small, default (some minutes a training "
                      "on two cores), large (a GPU or patience); toy shows nothing",
                      choices=tuple(SCALES))
    seeds: int = flag(3, "trainings of every variant, which gives the spread", min=1)
    steps: int = flag(0, "training steps of every generator; 0: the scale's", min=0)
    tokenizer_steps: int = flag(0, "training steps of every tokenizer; 0: the scale's", min=0)
    grid_tokenizer_steps: int = flag(0, "those of the 2-D baseline's, such as stop both at equal "
                                     "PSNR; 0: the same", min=0)
    grid_shift: int = flag(1, "position augmentation of the 2-D baseline, as --position-shift of "
                           "train_generator.py; 1: none, it is a part of the equivariant method",
                           min=1)
    precision: str = flag("bf16", "arithmetic of the generators' matrix products; float32 is "
                          "faster where the processor has no bf16",
                          choices=("bf16", "float32"))
    workers: int = flag(1, "processes that load images; 0: none but the main one", min=0)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")

    def pictures(self, path: Path) -> DataConfig:
        """Its data set, with the pictures held out that were in the training of `path`."""
        data = DataConfig(data=self.data, val_data=self.val_data, out=self.out)
        return as_trained(data, str(path))


class Lab:
    """An experiment at work: trains what it asks for, or finds it done.

    name: of the experiment, which writes to OUT/NAME.
    """

    def __init__(self, name: str, cfg: ExperimentConfig) -> None:
        self.name, self.cfg, self.scale = name, cfg, SCALES[cfg.scale]
        self.steps = cfg.steps or self.scale.steps
        self.runs, self.folder = (output_folder(f"{cfg.out}/{part}") for part in ("runs", name))
        self.used: dict[Path, float] = {}  # CPU seconds of the runs that were used

    @property
    def budget(self) -> str:
        if not self.used:
            return "no training"
        return (f"{len(self.used)} trainings (shared ones included), generators of {self.steps} "
                f"steps, {sum(self.used.values()) / 60:.1f} minutes of processor time; scale "
                f"{self.cfg.scale}, {self.cfg.seeds} seeds")

    def data_flags(self, data: str) -> list[str]:
        """--data and what belongs to it; `data` '' is the experiment's own."""
        if data and data != self.cfg.data:
            return ["--data", data]
        held_out = ["--val-data", self.cfg.val_data] if self.cfg.val_data else []
        return ["--data", self.cfg.data, *held_out]

    def train(self, kind: str, name: str, steps: int, flags: list[str], seed: int,
              fork: TrainingRun | None = None) -> TrainingRun:
        """The training of this kind with these flags, done now if it is not done yet.

        fork: the same training stopped earlier, which this one continues.
        """
        flags = ["--preset", "tiny", *flags, "--seed", str(seed)]
        folder = self.runs / f"{kind}-{name}-s{seed}-{key([*flags, '--steps', str(steps)])}"
        run = TrainingRun(kind, folder, steps, flags, fork)
        run.train("--workers", str(self.cfg.workers), "--device", self.cfg.device, "--val-images",
                  str(self.scale.val_images), "--val-every", str(steps), "--save-every",
                  str(max(1, steps // 4)), "--preview-every", str(steps), "--keep", "1")
        (folder / "best.pt").unlink(missing_ok=True)  # as large as last.pt, and not used
        self.used[folder] = run.record()["cpu_seconds"]
        return run

    def tokenizer(self, layout: str = "columns", data: str = "", seed: int = 0) -> TrainingRun:
        own = self.cfg.grid_tokenizer_steps if layout == "grid" else 0
        steps = own or self.cfg.tokenizer_steps or self.scale.tokenizer_steps
        name = layout if not data or data == self.cfg.data else f"{layout}-{Path(data).name}"
        flags = [*self.scale.tokenizer.split(), "--layout", layout]
        if layout == "positions":
            flags += ["--token-channels", str(self.scale.position_channels)]
        return self.train("tokenizer", name, steps, [*flags, *self.data_flags(data)], seed)

    def latents(self, layout: str = "columns", data: str = "",
                seed: int = 0) -> tuple[TrainingRun, Path]:
        """A tokenizer, and the folder of its latents of the pictures, the same for all seeds."""
        tokenizer = self.tokenizer(layout, data, seed)
        folder = self.runs / tokenizer.folder.name.replace("tokenizer-", "latents-")
        if not (folder / "meta.json").exists():
            pictures = dict(zip(("data", "val_data"), self.data_flags(data)[1::2]))
            cache_latents.encode(cache_latents.CacheConfig(
                **pictures, tokenizer=str(tokenizer.last), out=str(output_folder(str(folder))),
                images=self.scale.images, workers=self.cfg.workers, device=self.cfg.device))
        return tokenizer, folder

    def tokens(self, layout: str = "columns") -> int:
        """How many tokens an image has: its subtasks."""
        views = np.load(self.latents(layout)[1] / "val-00000.npy", mmap_mode="r")
        return views.shape[2]  # (images, views, tokens, channels)

    def columns(self, flags: str = "", name: str = "columns", *, layout: str = "columns",
                data: str = "", steps: int = 0,
                initial: list[TrainingRun] | None = None,
                forks: list[TrainingRun] | None = None) -> list[TrainingRun]:
        """A generator over cached latents for every seed, which has a tokenizer of its own.

        flags: of the variant; without, the paper's model: columns, a window of 4, position
        augmentation.  steps: 0 is the experiment's; initial: the runs, by seed, that they
        start from (their EMA weights), with a shorter warm-up; forks: those that they continue.
        """
        runs = []
        for seed in range(self.cfg.seeds):
            tokenizer, latents = self.latents(layout, data, seed)
            start = (["--warmup-steps", "20", "--init-from", str(initial[seed].last)]
                     if initial else [])
            runs.append(self.train("generator", name, steps or self.steps, [
                *self.scale.generator.split(), *start, "--latents", str(latents), "--tokenizer",
                str(tokenizer.last), "--precision", self.cfg.precision, *flags.split()], seed,
                forks[seed] if forks else None))
        return runs

    def grid(self, flags: str = "", name: str = "grid", layout: str = "grid",
             **options: Any) -> list[TrainingRun]:
        """The 2-D baselines: patches, or positions, in raster order, full causal attention."""
        flags = f"--window {self.tokens(layout)} --position-shift {self.cfg.grid_shift} {flags}"
        return self.columns(flags, name, layout=layout, **options)


def key(flags: list[str]) -> str:
    """A short name for settings; folders under OUT/runs count by their names alone."""
    short = [Path(f).parent.name if f.endswith(".pt") else f for f in flags]
    short = [Path(f).name if "/latents-" in f else f for f in short]
    return hashlib.sha256(json.dumps(short).encode()).hexdigest()[:8]
