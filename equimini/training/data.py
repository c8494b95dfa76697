"""Images for training, and their batches: of folders and archives, or landscapes drawn by code.

A dataset's items are indexed by (epoch, index), so that its random crop and flip are a function of
the seed and these two; `Batches` makes their order a function of the step alone.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from equimini.autoencoder import TokenizerConfig
from equimini.noise import rng
from equimini.training import synthetic
from equimini.training.index import Source
from equimini.training.options import BUILT_IN, DataConfig, RunConfig
from equimini.training.split import split_pictures
from equimini.utils import distributed
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import replacing
from equimini.utils.images import printable, read_rgb, scale_to_fit
from equimini.utils.signals import leave_signals

Item = tuple[Tensor, int, int]  # image (3, H, W) uint8, class number, index
SYNTHETIC_IMAGES = 20_000  # scrolls in the built-in training set
SCALED_UP, UNREADABLE = 1, 2  # what ImageFolder.found says of a file; 0: nothing
CHUNK = 2**26  # bytes of one shared piece of memory with decoded pictures


class ImageFolder(Dataset[Item]):
    """Pictures of a folder or an archive.

    Each is scaled so that its shorter side (or its width, if a wider crop needs it) fits the
    crop, cropped at random and mirrored with probability ½; with augment=False cropped at the
    centre.  One that cannot be read is reported once and replaced by the next one of its class.
    """

    mirrors = 2  # views that a cache keeps of every crop

    def __init__(self, source: Source, indices: np.ndarray, labels: np.ndarray, height: int,
                 width: int, seed: int, augment: bool) -> None:
        """indices: of the pictures in `source`; labels: their classes."""
        self.source, self.indices, self.labels = source, indices, labels
        self.height, self.width = height, width
        self.seed, self.augment = seed, augment
        # what is known of every file, in memory that loader processes share
        self.found = torch.zeros(len(indices), dtype=torch.uint8).share_memory_()
        self.kept: dict[int, Tensor] = {}  # decoded pictures, see `keep_in_memory`

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        draw = rng("crop", self.seed, epoch, index) if self.augment else None
        return *self.view(index, draw, flip=bool(draw.integers(2)) if draw else False), index

    def subset(self, chosen: slice) -> ImageFolder:
        """Some of the pictures, cropped at the centre."""
        return ImageFolder(self.source, self.indices[chosen], self.labels[chosen], self.height,
                           self.width, self.seed, augment=False)

    def where(self, index: int) -> str:
        """The file of picture `index`, for messages."""
        return printable(self.source.where(int(self.indices[index])))

    def content(self, index: int) -> bytes:
        """The bytes of its file.  Raises OSError or ValueError."""
        return self.source.read(int(self.indices[index]))

    def view(self, index: int, draw: np.random.Generator | None,
             flip: bool) -> tuple[Tensor, int]:
        """Picture `index`, cropped at random (draw None: at the centre), and its class."""
        for i in self._stand_ins(index):
            picture = self.kept[i].numpy() if i in self.kept else self.decode(i)
            if picture is not None:
                return self._crop(picture, draw, flip), int(self.labels[i])
        raise UserError(f"none of the {len(self)} pictures can be read, {self.where(index)} among "
                        "them")

    def _stand_ins(self, index: int) -> Iterator[int]:
        """`index`, then the next ones of its class, then the next of any."""
        yield index
        ring = np.roll(np.arange(len(self)), -index)[1:]
        alike = self.labels[ring] == self.labels[index]
        yield from ring[alike].tolist()
        yield from ring[~alike].tolist()

    def decode(self, i: int) -> np.ndarray | None:
        """Picture i, scaled, uint8 (h, w, 3); None, after one warning, if it cannot be read."""
        if self.found.numpy()[i] == UNREADABLE:
            return None
        try:
            image = read_rgb(BytesIO(self.content(i)), 4 * max(self.height, self.width))
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            self.found[i] = UNREADABLE
            warnings.warn(f"cannot read {self.where(i)}, using the next picture instead: "
                          f"{first_line(error)}", stacklevel=4)
            return None
        if image.width < self.width or image.height < self.height:
            if not (self.found == SCALED_UP).any():
                warnings.warn(f"{self.where(i)} is smaller ({image.width}x{image.height} pixels) "
                              f"than the crops of {self.width}x{self.height}; such pictures are "
                              "scaled up, and counted", stacklevel=4)
            self.found[i] = SCALED_UP
        return np.asarray(scale_to_fit(image, self.height, self.width))

    def keep_in_memory(self, gigabytes: float, workers: int) -> None:
        """Decode pictures once, now, and keep them until so much memory is full.

        Those that do not fit are read from their files each time, as without this.  The memory is
        shared with loader processes.
        """
        chunk, used, free = torch.empty(0, dtype=torch.uint8), 0, 0
        loader = DataLoader(range(len(self)), batch_size=None, collate_fn=self._whole,
                            num_workers=workers, worker_init_fn=leave_signals)
        for i, picture in enumerate(tqdm(loader, desc="reading pictures into memory",
                                         disable=not distributed.is_main())):
            if picture.numel() > free:
                free = max(CHUNK, picture.numel())
                if used + free > gigabytes * 1e9:
                    break
                chunk = torch.empty(free, dtype=torch.uint8)
                used += free
            if picture.numel():
                place = chunk[len(chunk) - free:][:picture.numel()].view(picture.shape)
                self.kept[i] = place.copy_(picture)
                free -= picture.numel()
        if len(self.kept) < len(self) - len(self.unreadable()):
            print(f"{len(self.kept)} of {len(self)} pictures fit into --cache-gb {gigabytes:g}; "
                  "the others are read from their files each time")

    def _whole(self, i: int) -> Tensor:
        picture = self.decode(i)
        return torch.from_numpy(np.empty(0, np.uint8) if picture is None else picture.copy())

    def unreadable(self) -> list[str]:
        """The files found so far that cannot be read."""
        return [self.where(i) for i in (self.found == UNREADABLE).nonzero().flatten().tolist()]

    def lost_classes(self) -> list[int]:
        """Classes of which no picture can be read."""
        broken = (self.found == UNREADABLE).numpy()
        return sorted({*self.labels[broken].tolist()} - {*self.labels[~broken].tolist()})

    def scaled_up(self) -> int:
        """How many pictures found so far are smaller than the crops."""
        return int((self.found == SCALED_UP).sum())

    def _crop(self, x: np.ndarray, draw: np.random.Generator | None, flip: bool) -> Tensor:
        room = x.shape[0] - self.height, x.shape[1] - self.width
        top, left = (int(draw.integers(n + 1)) if draw and n else n // 2 for n in room)
        x = x[top:top + self.height, left:left + self.width]
        x = x[:, ::-1] if flip else x
        return torch.from_numpy(np.array(x.transpose(2, 0, 1), order="C"))  # the only copy


class Synthetic(Dataset[Item]):
    """Landscapes drawn by `equimini.synthetic`; classes in turn, the same for the same index."""

    mirrors = 1  # a scroll's mirror image is another scroll

    def __init__(self, kind: str, indices: range, height: int, width: int, seed: int) -> None:
        self.draw = synthetic.with_object if kind == "synthetic-object" else synthetic.landscape
        names = synthetic.OBJECT_CLASSES if kind == "synthetic-object" else synthetic.CLASSES
        self.classes = list(names)
        self.indices, self.height, self.width, self.seed = indices, height, width, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        return *self.view(key[1], None, False), key[1]

    def view(self, index: int, draw: None, flip: bool) -> tuple[Tensor, int]:
        """Picture `index` and its class; there is nothing to crop or mirror."""
        number = self.indices[index]
        label = number % len(self.classes)
        image = self.draw(number, label=label, height=self.height, width=self.width,
                          seed=self.seed)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), label


def report_pictures(sets: list[Dataset], out: Path, shown: int = 10) -> None:
    """Print how many pictures could not be read, or were scaled up; the names go to a file.

    Called by all processes, whose findings are put together.
    """
    folders = [data for data in sets if isinstance(data, ImageFolder)]
    for data in folders:
        data.found = distributed.largest(data.found)
    if not distributed.is_main():
        return
    if count := sum(data.scaled_up() for data in folders):
        print(f"{count} pictures are smaller than the crops and were scaled up; larger ones, or a "
              "smaller --image-size or --width, would look sharper")
    if lost := sorted({data.source.classes[k] for data in folders[:1] for k in
                       data.lost_classes()}):
        print(f"{len(lost)} classes have no picture that can be read: "
              f"{', '.join(map(printable, lost[:shown]))}; pictures of others stood in for theirs")
    if unreadable := [path for data in folders for path in data.unreadable()]:
        with replacing(out / "unreadable.txt") as file:
            file.write("".join(f"{name}\n" for name in unreadable).encode())
        more = f" and {len(unreadable) - shown} more" if len(unreadable) > shown else ""
        print(f"{len(unreadable)} files could not be read and were left out (all named in "
              f"{out / 'unreadable.txt'}): {', '.join(unreadable[:shown])}{more}")


def load_data(run: DataConfig,
              tokenizer: TokenizerConfig) -> tuple[Dataset, Dataset, list[str]]:
    """Training set, validation set and class names for a run.

    Crops are as high as the tokenizer's images and --width wide (0: square).  Raises
    UserError for folders that cannot be used, or a width that the tokenizer does not take.
    """
    height, width = tokenizer.image_size, run.width or tokenizer.image_size
    if width % tokenizer.f or width < 2 * tokenizer.f:
        raise UserError(f"--width must be a multiple of f = {tokenizer.f} and at least "
                        f"{2 * tokenizer.f}, got {width}")
    if tokenizer.layout != "columns" and width != height:
        raise UserError(f"--width: a tokenizer of layout {tokenizer.layout} takes square pictures "
                        f"only, {height} pixels, got {width}")
    if run.data in BUILT_IN:
        if run.val_data:
            raise UserError("--val-data goes with a folder as --data; the built-in data has its "
                            "own held-out pictures")
        n_val = round(SYNTHETIC_IMAGES * run.val_fraction)
        train = Synthetic(run.data, range(SYNTHETIC_IMAGES), height, width, run.seed)
        val = Synthetic(run.data, range(SYNTHETIC_IMAGES, SYNTHETIC_IMAGES + n_val), height,
                        width, run.seed)
        return train, val, train.classes
    train, val, classes = split_pictures(run)
    for source in {id(part.source): part.source for part in (train, val)}.values():
        warn_of_left_out(source)
    return (ImageFolder(*train, height, width, run.seed, augment=True),
            ImageFolder(*val, height, width, run.seed, augment=False), classes)


def warn_of_left_out(source: Source) -> None:
    """Say what a source holds that is not used, and which classes are empty."""
    if not distributed.is_main():
        return
    where = printable(source.path)
    for reason, (count, example) in source.left_out.items():
        warnings.warn(f"{where}: {printable(reason)}: {count}, for example {printable(example)}",
                      stacklevel=2)
    used = np.bincount(source.labels, minlength=len(source.classes))
    if empty := [printable(source.classes[k]) for k in np.flatnonzero(used == 0)]:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        warnings.warn(f"{where}: {len(empty)} classes without a picture, which keep their number: "
                      f"{', '.join(empty[:10])}{more}", stacklevel=2)


def count_images(run: DataConfig) -> int:
    """How many pictures a run trains on, without reading them; raises as `load_data`."""
    if run.data in BUILT_IN:
        return SYNTHETIC_IMAGES
    return len(split_pictures(run)[0].indices)


class Batches:
    """Batch sampler whose order is a function of (seed, step): each epoch a new permutation.

    Yields, for each step from `start` to `stop` − 1, the (epoch, index) pairs of this process's
    local batch; a batch that crosses the end of an epoch is completed from the next.
    """

    def __init__(self, n: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)
        local = distributed.local_batch(self.batch_size)
        for step in range(self.start, self.stop):
            batch, first = [], step * self.batch_size + distributed.rank() * local
            for place in range(first, first + local):
                if place // self.n != epoch:
                    epoch = place // self.n
                    order = rng("order", self.seed, epoch).permutation(self.n)
                batch.append((epoch, int(order[place % self.n])))
            yield batch


def training_loader(data: Dataset, batch_size: int, run: RunConfig, start: int,
                    stop: int, pinned: bool = False) -> DataLoader:
    """Batches (images uint8 (B, 3, H, W), labels (B,), indices (B,)) of steps start … stop−1.

    Of several processes each gets a local batch: B is batch_size / processes.  pinned: in memory
    from which a GPU copies while it computes.
    """
    sampler = Batches(len(data), batch_size, run.seed, start, stop)
    return DataLoader(data, batch_sampler=sampler, num_workers=run.workers,
                      worker_init_fn=leave_signals, pin_memory=pinned)


def fixed_loader(data: Dataset, batch_size: int, count: int, workers: int = 0,
                 seed: int = 0, shared: bool = False) -> DataLoader:
    """The same `count` random items (at most all), in the same order, every time.

    shared: of several processes each gets a part of them; else each gets all.
    """
    order = rng("subset", seed).permutation(len(data))[:count]
    if shared:
        order = order[distributed.rank()::distributed.world_size()]
    keys = [(0, int(i)) for i in order]
    return DataLoader(data, batch_size=batch_size, sampler=keys, num_workers=workers,
                      worker_init_fn=leave_signals)
