"""Encode a data set once: the tokenizer's means of every image, for both mirrors, on disk.

    python -m equimini.training.cache_latents --tokenizer runs/tokenizer/last.pt --data my/pictures \\
        --out my/latents
    python train_generator.py --tokenizer runs/tokenizer/last.pt --latents my/latents

The generator then trains without running the encoder.  The posterior's noise is added afresh at
every use, so with one possible crop (square pictures) the training distribution is that of the
images; for others, --crops K stores K random crops of each instead of the centre one.  Under
torchrun several processes share the work.

Layout of the folder: train-00000.npy, … and val-00000.npy, … are float32 arrays (images, views,
columns, channels), a view being one crop and mirror; labels.npz holds the class numbers; meta.json,
written last, the tokenizer's hash and the class names.  An interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from equimini.autoencoder import Tokenizer
from equimini.config import flag
from equimini.noise import rng
from equimini.training.data import load_data, report_pictures
from equimini.training.options import BUILT_IN, DataConfig
from equimini.utils import checkpoint, distributed
from equimini.utils.checkpoint import latents_hash, tokenizer_hash
from equimini.utils.command_line import add_flags, output_folder, override, pick_device, run
from equimini.utils.errors import UserError, reading
from equimini.utils.files import claim, locked, read_plan, replacing, write_text
from equimini.utils.images import to_float
from equimini.utils.signals import leave_signals

SHARD = 1024  # images per file


@dataclass(frozen=True)
class CacheConfig(DataConfig):
    """What to encode, and where to."""

    tokenizer: str = flag("runs/tokenizer/last.pt", "checkpoint of the trained tokenizer")
    crops: int = flag(1, "random crops kept of every training picture; 1: the centre one", min=1)
    images: int = flag(0, "pictures kept of either split, chosen at random; 0: all", min=0)
    batch_size: int = flag(64, "pictures encoded at a time", min=1)


class Views(Dataset):
    """Every stored view of some images of a data set, as uint8 (V, 3, H, W)."""

    def __init__(self, data: Dataset, images: Sequence[int], first: int, crops: int,
                 augment: bool) -> None:
        """images: their numbers; first: the place of the first of them among all that are stored,
        which keys its crops."""
        self.data, self.images, self.first = data, images, first
        self.crops, self.mirrors = (crops, data.mirrors) if augment else (1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        views = []
        for crop in range(self.crops):
            for mirror in range(self.mirrors):
                key = self.data.seed, self.first + i, crop
                draw = rng("cache", *key) if self.crops > 1 else None
                image, label = self.data.view(self.images[i], draw, bool(mirror))
                views.append(image)
        return torch.stack(views), label


class CachedLatents(Dataset):
    """Means μ (columns, channels) read from a cache; a random view of each image and epoch.

    Raises UserError for a folder that is no complete cache, or one of another tokenizer.
    """

    def __init__(self, folder: str, split: str, tokenizer: Tokenizer, seed: int) -> None:
        meta = read_meta(folder)
        if meta["tokenizer"] not in (latents_hash(tokenizer), tokenizer_hash(tokenizer)):
            raise UserError(f"the latents in {folder} were made with another tokenizer; make them "
                            "again with python -m equimini.training.cache_latents, or give the --tokenizer "
                            "they belong to")
        self.classes, self.split, self.seed = meta["classes"], split, seed
        self.mirrors = 1 if meta.get("data") in BUILT_IN else 2  # as those of the data set
        with reading(folder):
            self.labels = np.asarray(np.load(Path(folder) / "labels.npz")[split], np.int64)
            files = sorted(Path(folder).glob(f"{split}-*.npy"))
            self.shards = [np.load(path, mmap_mode="r") for path in files]
            if sum(map(len, self.shards)) != len(self.labels):
                raise UserError(f"{folder} lacks some of its {split} files; make it again with "
                                "--overwrite")
            self._check_shapes(tokenizer)

    def _check_shapes(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for shards (n, V, N, C) that differ, or labels that are no class."""
        if self.labels.ndim != 1 or {*self.labels.tolist()} - {*range(len(self.classes))}:
            raise ValueError("its labels and classes do not fit together")
        for shard in self.shards:
            if (shard.shape[1:] != self.shards[0].shape[1:] or shard.ndim != 4 or 0 in shard.shape
                    or shard.shape[3] != tokenizer.config.token_channels
                    or shard.dtype != np.float32
                    or shard is not self.shards[-1] and len(shard) != SHARD):
                raise ValueError(f"its latents are {shard.dtype} {shard.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        views = self.shards[index // SHARD][index % SHARD]  # (V, N, C)
        draw = rng("view", self.seed, epoch, index) if self.split == "train" else None
        mean = torch.from_numpy(np.array(views[int(draw.integers(len(views))) if draw else 0]))
        if not mean.isfinite().all():
            raise UserError(f"the cached latents of {self.split} picture {index} are not finite")
        return mean, int(self.labels[index]), index


def read_meta(folder: str) -> dict[str, Any]:
    """The description of a finished cache; raises UserError if there is none."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder} is no finished cache of latents (it has no meta.json); make one "
                        "with python -m equimini.training.cache_latents")
    with reading(path):
        meta = json.loads(path.read_text())
        count = meta.get("images", {"train": 0})["train"]
        if not (isinstance(meta["tokenizer"], str) and isinstance(count, int)
                and {*map(type, meta["classes"])} == {str}):
            raise ValueError("it does not say what the latents are of")
        return meta


@torch.no_grad()
def encode_split(tokenizer: Tokenizer, data: Dataset, split: str, cfg: CacheConfig, out: Path,
                 device: torch.device) -> np.ndarray:
    """Write the shards of one split that are not there yet; returns all labels.

    Of several processes each takes every k-th shard.
    """
    images = range(len(data))
    if cfg.images:
        images = sorted(rng("chosen", data.seed).permutation(len(data))[:cfg.images].tolist())
    shards = [(first, min(first + SHARD, len(images)), out / f"{split}-{s:05d}.npy",
               out / f"{split}-{s:05d}.labels")
              for s, first in enumerate(range(0, len(images), SHARD))]
    mine = shards[distributed.rank()::distributed.world_size()]
    bar = tqdm(total=sum(last - first for first, last, *_ in mine), desc=f"encoding {split}",
               disable=not distributed.is_main())
    for first, last, path, label_path in mine:
        if not (path.exists() and label_path.exists()):
            views = Views(data, images[first:last], first, cfg.crops, split == "train")
            means, numbers = [], []
            for pixels, label in DataLoader(views, cfg.batch_size, num_workers=cfg.workers,
                                            worker_init_fn=leave_signals):
                flat = to_float(pixels.flatten(0, 1).to(device))
                means.append(tokenizer.encode(flat).unflatten(0, pixels.shape[:2]).cpu().numpy())
                numbers += label.tolist()
                bar.update(len(pixels))
            with replacing(path) as file:
                np.save(file, np.concatenate(means))
            write_text(label_path, json.dumps(numbers))
        else:
            bar.update(last - first)
    bar.close()
    distributed.barrier()
    found = []
    for first, last, _, path in shards:
        with reading(path):
            found.append(np.asarray(json.loads(path.read_text()), np.int64))
            if found[-1].shape != (last - first,):
                raise ValueError(f"it has not the {last - first} labels of its latents")
    return np.concatenate(found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--overwrite", action="store_true", help="start afresh")
    add_flags(parser, CacheConfig(out="runs/latents"), "options")
    args = parser.parse_args()
    cfg = override(CacheConfig(out="runs/latents"), args)
    device = distributed.local_device(cfg.device)
    out = output_folder(cfg.out)
    with distributed.processes(device), locked(out) if distributed.is_main() else nullcontext():
        encode(cfg, args.overwrite, device)


def encode(cfg: CacheConfig, overwrite: bool = False,
           device: torch.device | None = None) -> None:
    """Make the cache, or continue it; raises UserError for options that cannot be used."""
    device, out = device or pick_device(cfg.device), output_folder(cfg.out)
    tokenizer = checkpoint.load_tokenizer(cfg.tokenizer, device)
    checkpoint.check_statistics(tokenizer, cfg.tokenizer)
    if cfg.crops > 1 and cfg.data.startswith("synthetic"):
        raise UserError("--crops is for pictures; the built-in data has nothing to crop")
    begun = out / "plan.json"
    if begun.exists() and not overwrite and "split" not in read_plan(begun):
        cfg = replace(cfg, split="order")  # begun before there was a choice
    train, val, classes = load_data(cfg, tokenizer.config)
    counts = {split: min(len(data), cfg.images or len(data))
              for split, data in (("train", train), ("val", val))}
    plan = {"tokenizer": latents_hash(tokenizer), "classes": classes, "data": cfg.data,
            "images": counts, "crops": cfg.crops,
            "width": cfg.width, "seed": cfg.seed, "val_data": cfg.val_data,
            "val_fraction": cfg.val_fraction}
    if cfg.split == "name":  # caches made before there was a choice do not have the key
        plan["split"] = cfg.split
    with distributed.main_first():
        if distributed.is_main():
            if overwrite:
                drop_latents(out)
            claim(out, plan, "latents", "choose another --out, or add --overwrite")
    labels = {split: encode_split(tokenizer, data, split, cfg, out, device)
              for split, data in (("train", train), ("val", val))}
    report_pictures([train, val], out)
    if not distributed.is_main():
        return
    with replacing(out / "labels.npz") as file:
        np.savez(file, **labels)
    write_text(out / "meta.json", json.dumps(plan, indent=1))
    size = sum(p.stat().st_size for p in out.glob("*.npy")) / 1e6
    print(f"done: {out}, {counts['train']} + {counts['val']} pictures, {size:.0f} MB")


def drop_latents(out: Path) -> None:
    """Delete the latents in a folder, and last the note on what they were made with."""
    own = ("train-[0-9]*.npy", "val-[0-9]*.npy", "train-[0-9]*.labels", "val-[0-9]*.labels",
           "labels.npz", "meta.json", "plan.json")
    for path in (path for pattern in own for path in out.glob(pattern)):
        path.unlink()


if __name__ == "__main__":
    run(main)
