"""How many pictures a second the loader reads, decodes and crops.

    python -m equimini.bench data --data my/pictures [--workers 0,1,2]

One line for each number of loader processes, reading files, and one with the decoded pictures
kept in memory (--cache-gb of the training scripts).  Compare with the img/s that training shows.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from torch.utils.data import Dataset

from equimini.autoencoder import TokenizerConfig
from equimini.config import Checked, flag
from equimini.presets import PRESETS
from equimini.training.data import ImageFolder, load_data, training_loader
from equimini.training.options import RunConfig
from equimini.utils.command_line import parse
from equimini.utils.errors import UserError


@dataclass(frozen=True)
class DataBench(Checked):
    data: str = flag("", "folder of pictures, as for training")
    image_size: int = flag(PRESETS["tiny"].tokenizer.image_size, "height and width of the crops, "
                           "in pixels, a multiple of 16", min=32)
    workers: tuple[int, ...] = flag((0, 1, 2), "numbers of loader processes to try", min=0)
    batch_size: int = flag(64, "pictures per batch", min=1)
    images: int = flag(4096, "pictures read per line", min=1)


def images_per_second(data: Dataset, cfg: DataBench, workers: int) -> float:
    """Rate after the first batch, so that starting processes does not count."""
    run = RunConfig(workers=workers)
    batches = iter(training_loader(data, cfg.batch_size, run, 0, cfg.images // cfg.batch_size + 1))
    next(batches)
    start, count = time.perf_counter(), 0
    for images, _, _ in batches:
        count += len(images)
    return count / (time.perf_counter() - start)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.bench data", __doc__, DataBench(), argv)
    if not cfg.data:
        raise UserError("--data must name a folder of pictures")
    size = TokenizerConfig(image_size=cfg.image_size)
    train, _, classes = load_data(RunConfig(data=cfg.data), size)
    if not isinstance(train, ImageFolder):
        raise UserError("--data must name a folder of pictures; the built-in data is drawn by code")
    print(f"# {len(train)} pictures of {len(classes)} classes, crops of {cfg.image_size} pixels; "
          f"{os.cpu_count()} cores")
    for workers in cfg.workers:
        print(f"{workers} loader processes, files:  "
              f"{images_per_second(train, cfg, workers):8.0f} images/s", flush=True)
    kept = train.subset(slice(cfg.images))
    kept.augment = True
    kept.keep_in_memory(gigabytes=8, workers=max(cfg.workers))
    print(f"{cfg.workers[0]} loader processes, memory: "
          f"{images_per_second(kept, cfg, cfg.workers[0]):8.0f} images/s")
