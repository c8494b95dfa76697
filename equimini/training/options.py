"""Options of the command line that several commands share: data, and how a training reports."""

from __future__ import annotations

import dataclasses

from equimini.config import Checked, flag

BUILT_IN = ("synthetic", "synthetic-object")  # data drawn by code
PRECISIONS = ("float32", "tf32", "bf16")


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Which pictures are read, and where the results go."""

    data: str = flag("synthetic", "folder of class sub-folders of images, one flat folder, .tar, "
                     ".zip or .parquet files (docs/data.md), or 'synthetic' / 'synthetic-object' "
                     "(drawn by code)")
    val_data: str = flag("", "held-out images, as --data; empty: --val-fraction of --data")
    val_fraction: float = flag(0.05, "share of --data that is held out", min=0.001, max=0.5)
    split: str = flag("name", "how it is chosen: by a hash of each picture's name, which no other "
                      "picture changes, or by the files' order and --seed, as in runs begun before "
                      "there was a choice", choices=("name", "order"), before="order")
    class_names: str = flag("", "file with the classes' names: a list, or lines of a folder's name "
                            "(a wnid) and words; empty: the folders' names")
    index: str = flag("", "folder for the index of a large --data, which several commands may "
                      "share; empty: index in --out")
    allow_truncated: bool = flag(False, "of an archive that is cut short, use what can be read")
    width: int = flag(0, "width of the crops, in pixels, a multiple of f; 0: square", min=0)
    out: str = flag("", "folder to write to")
    seed: int = flag(0, "seed of everything random", min=0, max=2**32 - 1)
    workers: int = flag(1, "processes that load images; 0: none but the main one", min=0)
    device: str = flag("auto", "where to compute: auto (CUDA, then MPS, then CPU), cpu, cuda, "
                       "cuda:N, mps")


@dataclasses.dataclass(frozen=True)
class RunConfig(DataConfig):
    """What both trainings need beyond the method: data, and how often they report."""

    cache_gb: float = flag(0.0, "memory for decoded pictures, in GB: they are read once, when "
                           "training starts; 0: each is read again every time", min=0)
    accumulate: int = flag(1, "micro-batches that a process splits its part of a batch into; their "
                           "gradients are added up: less memory, the same step", min=1)
    val_images: int = flag(512, "held-out images per validation, at most", min=1)
    val_every: int = flag(500, "steps between validations", min=1)
    preview_every: int = flag(500, "steps between preview pictures", min=1)
    save_every: int = flag(500, "steps between checkpoints", min=1)
    keep: int = flag(2, "checkpoints kept: last.pt, and the ones before it as last-1.pt, …", min=1)
    log_every: int = flag(10, "steps between lines of the log", min=1)
    init_from: str = flag("", "checkpoint whose weights (moving average) and sizes training starts "
                          "from; classes that it does not know begin as 'no class'")
    deterministic: bool = flag(False, "on CUDA: kernels that give the same bits every time, which "
                               "exact resuming needs there, and are slower (a CPU's always do)")
