"""Features of many pictures, computed in shards: resumable, and shared by several processes.

A set of pictures (samples, real ones, reconstructions) is cut into shards of 256.  Each shard's
features, class probabilities and scores are one .npz, written whole or not at all; a file that
is there is not made again.  Of several processes each takes every k-th shard.

Files of real pictures are named by a hash of all that their content depends on (the pictures'
bytes, their size, the networks), so they are right whoever finds them, and live in one folder for
all evaluations.  Files of samples lie in the evaluation's own folder, guarded by its plan.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini.autoencoder import Tokenizer
from equimini.evaluate.feature_networks import FeatureNetwork
from equimini.evaluate.metrics import ssim
from equimini.losses import psnr
from equimini.noise import rng
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.training import synthetic
from equimini.training.data import ImageFolder, Synthetic
from equimini.utils import distributed
from equimini.utils.checkpoint import tokenizer_hash
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import replacing
from equimini.utils.images import save_png, to_float, to_pixels
from equimini.utils.signals import leave_signals

FORMAT = 1   # of the files of real pictures; raised when what they hold is computed otherwise
SHARD = 256  # pictures per file
SHOWN = 12   # first pictures of a set that are kept, for the sheets
Batch = tuple[Tensor, dict[str, Tensor]]  # pictures uint8 (B, 3, H, W), scores (B,) by name


class RealPictures:
    """The first n pictures of a data set in a fixed random order, cropped at the centre.

    `batches` gives pictures first … last−1 with their scores, `path` is where their shard is kept,
    and `complete` tells whether it is there.
    """

    def __init__(self, data: ImageFolder | Synthetic, n: int, network: str, cache: Path,
                 batch_size: int, workers: int) -> None:
        """network: hash of the feature network."""
        if isinstance(data, ImageFolder):
            data = data.subset(slice(None))
        self.data, self.cache, self.batch_size = data, cache, batch_size
        self.order = rng("subset", 0).permutation(len(data))[:n].tolist()
        self.n = len(self.order)
        self.workers = getattr(data, "workers", workers)  # none for pixels that are at hand
        # all that is done to a picture (True: with probabilities, which once could be left out)
        self.process = f"{FORMAT} {network} True {data.height}x{data.width}"
        self._hashes: dict[int, str] = {}

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        loader = DataLoader(self.data, self.batch_size, num_workers=self.workers,
                            worker_init_fn=leave_signals,
                            sampler=[(0, index) for index in self.order[first:last]])
        for images, _, indices in loader:
            found = getattr(self.data, "found", None)  # what is known of files, once they are read
            yield images, {} if found is None else {"found": found[indices]}

    def hashes(self, first: int, last: int) -> list[str]:
        """SHA-256 of each picture's content (of what a drawn one depends on)."""
        for i in range(first, last):
            if i not in self._hashes:
                self._hashes[i] = content_hash(self.data, self.order[i])
        return [self._hashes[i] for i in range(first, last)]

    def path(self, first: int, last: int) -> Path:
        key = "\n".join((self.process, *self.hashes(first, last)))
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def complete(self, first: int, last: int) -> bool:
        return self.path(first, last).exists()


class Reconstructions(RealPictures):
    """What a tokenizer makes of real pictures (from the mode μ), with PSNR, SSIM and distances."""

    def __init__(self, originals: RealPictures, tokenizer: Tokenizer,
                 distances: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]]) -> None:
        """distances: by name, a network's hash and a function of (x, x̂) that gives (B,)."""
        vars(self).update(vars(originals))  # the same data, order and hashes
        self.tokenizer, self.distances = tokenizer, distances
        used = " ".join(f"{name} {sha256}" for name, (sha256, _) in distances.items())
        self.process += f" decoded {tokenizer_hash(tokenizer)} {used}"

    @torch.no_grad()
    def batches(self, first: int, last: int) -> Iterator[Batch]:
        device = next(self.tokenizer.parameters()).device
        for images, known in super().batches(first, last):
            x = to_float(images.to(device))
            x_hat = self.tokenizer.decode(self.tokenizer.encode(x)).clamp(-1, 1)
            scores = {**known, "psnr": psnr(x, x_hat)}
            if min(x.shape[-2:]) >= 11:
                scores["ssim"] = ssim(x.cpu(), x_hat.cpu())
            scores |= {name: f(x, x_hat) for name, (_, f) in self.distances.items()}
            yield to_pixels(x_hat), {name: v.cpu() for name, v in scores.items()}


class Samples:
    """Picture k of a generator: of class k mod classes, with the seed `seed` + k; read alike."""

    def __init__(self, model: ImageGenerator, n: int, columns: int, seed: int,
                 options: SamplingOptions, folder: Path, batch_size: int,
                 keep: Path | None = None) -> None:
        """keep: folder for the pictures as PNG."""
        self.model, self.n, self.columns, self.seed = model, n, columns, seed
        self.options, self.folder, self.batch_size, self.keep = options, folder, batch_size, keep

    def job(self, k: int) -> tuple[int, int]:
        """Class and seed of picture k."""
        return k % len(self.model.classes), self.seed + k

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for k in range(first, last, self.batch_size):
            jobs = [self.job(i) for i in range(k, min(k + self.batch_size, last))]
            labels, seeds = zip(*jobs)
            tokens = self.model.sample_tokens(labels, self.columns, seeds, self.options)
            pictures = to_pixels(self.model.decode(tokens))
            for i, picture in enumerate(pictures if self.keep else ()):
                save_png(picture.permute(1, 2, 0).numpy(), self.png(k + i))
            yield pictures, {}

    def path(self, first: int, last: int) -> Path:
        """The shortest file that holds these pictures; the one to write if there is none."""
        longer = [path for path in self.folder.glob(f"{first:08d}-*.npz")
                  if int(path.stem.split("-")[1]) >= last]  # all numbers have eight digits
        return min(longer, default=self.folder / f"{first:08d}-{last:08d}.npz")

    def complete(self, first: int, last: int) -> bool:
        return self.path(first, last).exists() and not (self.keep and any(
            not self.png(k).exists() for k in range(first, last)))

    def png(self, k: int) -> Path:
        label, seed = self.job(k)
        return self.keep / f"class{label:04d}_seed{seed:06d}.png"


PictureSet = RealPictures | Samples


def content_hash(data: ImageFolder | Synthetic, index: int) -> str:
    """SHA-256 of a picture file, or of the code and the numbers that draw a built-in picture."""
    if isinstance(data, Synthetic):
        what = f"{data.draw.__name__} {data.indices[index]} {data.seed}".encode()
        return hashlib.sha256(Path(synthetic.__file__).read_bytes() + what).hexdigest()
    try:
        return hashlib.sha256(data.content(index)).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the picture {data.where(index)}: "
                        f"{first_line(error)}") from None


def shards(n: int) -> list[tuple[int, int]]:
    """Pictures 0 … n−1 in parts (first, last) that are kept in a file each."""
    return [(i, min(i + SHARD, n)) for i in range(0, n, SHARD)]


def measure(pictures: PictureSet, net: FeatureNetwork, label: str) -> None:
    """Compute this process's share of the shards that are not there yet, and wait for the rest."""
    mine = shards(pictures.n)[distributed.rank()::distributed.world_size()]
    with tqdm(total=sum(last - first for first, last in mine), desc=label, dynamic_ncols=True,
              disable=not distributed.is_main()) as bar:
        for first, last in mine:
            if pictures.complete(first, last):
                bar.update(last - first)
                continue
            rows = measure_shard(pictures, first, last, net, bar)
            path = pictures.path(first, last)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **rows)
    distributed.barrier()


def measure_shard(pictures: PictureSet, first: int, last: int, net: FeatureNetwork,
                  bar: tqdm) -> dict[str, np.ndarray]:
    """Features and scores of one shard; of the first one also some pictures, `shown`."""
    rows: dict[str, list[Tensor]] = {}
    for x, scores in pictures.batches(first, last):
        features, probabilities = net(x)
        batch = {"features": features, "probabilities": probabilities, **scores}
        if first == 0:
            batch["shown"] = x[:max(0, SHOWN - sum(map(len, rows.get("shown", []))))]
        for name, values in batch.items():
            rows.setdefault(name, []).append(values)
        bar.update(len(x))
    return {name: torch.cat(values).numpy() for name, values in rows.items()}


def read(pictures: PictureSet) -> Iterator[dict[str, Tensor]]:
    """Shard by shard, what `measure` computed.  Raises UserError for a damaged file."""
    for first, last in shards(pictures.n):
        path = pictures.path(first, last)
        try:
            with np.load(path) as file:
                rows = {name: torch.from_numpy(file[name]) for name in file.files}
        except Exception as error:  # a damaged array can raise anything
            raise UserError(f"{path} is damaged ({first_line(error)}); delete it, and run the "
                            "same command again") from None
        yield {name: v if name == "shown" else v[:last - first] for name, v in rows.items()}


def read_all(pictures: PictureSet) -> dict[str, Tensor]:
    """All parts of `read`, joined."""
    parts = list(read(pictures))
    return {name: first if name == "shown" else torch.cat([part[name] for part in parts])
            for name, first in parts[0].items()}
