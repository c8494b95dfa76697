"""The index of a million pictures, and loaders of a folder and archives beside other packages.

    python -m equimini.bench archives [--pictures 1280000] [--compared 20000]

Makes, in a temporary folder, a tar of a thousand classes of tiny pictures, and measures its index;
then a folder, a tar and WebDataset shards of the same small JPEGs, and reads them with equimini,
and with torchvision's ImageFolder and the webdataset package where those are installed.  Every
measurement runs in a process of its own; memory is what a process has to itself (Private_Dirty).
"""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from equimini.config import Checked, flag
from equimini.training.data import ImageFolder
from equimini.training.index import open_source
from equimini.training.loaders import Batches
from equimini.training.split import part
from equimini.utils.command_line import parse

SIDE, BATCH = 128, 64  # of the pictures compared
READERS = ("equimini, folder", "equimini, tar", "ImageFolder", "webdataset")


@dataclass(frozen=True)
class ArchivesBench(Checked):
    """How much is measured."""

    pictures: int = flag(1_280_000, "pictures of the large tar", min=1000)
    compared: int = flag(20_000, "pictures of the comparison", min=1000)
    read: int = flag(4096, "pictures read in each measurement", min=128)
    workers: tuple[int, ...] = flag((0, 1, 2), "numbers of loader processes", min=0)
    repeats: int = flag(3, "measurements of each; the median is printed", min=1)


def private_mb() -> float:
    """Memory that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines()
               if line.startswith("Private_Dirty")) / 1024


def peak_mb() -> float:
    """The most memory this process had."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function, called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def forked(function: Callable[[], float]) -> float:
    """The result of a function, called in a copy of this process, as a loader is."""
    ours, theirs = os.pipe()
    if not os.fork():
        os.write(theirs, str(function()).encode())
        os._exit(0)
    os.wait()
    return float(os.read(ours, 100))


def make_large(path: Path, n: int) -> None:
    """A tar of n tiny pictures in 1000 classes, named as ImageNet's are."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    with open(path, "wb") as archive:
        for i in tqdm(range(n), desc="making a tar", leave=False):
            info = tarfile.TarInfo(f"n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000}.png")
            info.size = len(file.getvalue())
            archive.write(info.tobuf())
            archive.write(file.getvalue().ljust(512, b"\0"))
        archive.write(bytes(1024))


def touched(length: int, get: Callable[[int], Any]) -> float:
    """MB that a loader has of its own once it has looked at all entries."""
    before = private_mb()
    for i in range(length):
        get(i)
    return private_mb() - before


def measure_index(path: str, folder: str) -> dict[str, float]:
    """Open a source: seconds, MB more in this process, and in a loader that reads all of it."""
    before, start = private_mb(), time.perf_counter()
    source = open_source(path, folder)
    seconds, more = time.perf_counter() - start, private_mb() - before
    loader = forked(lambda: touched(len(source), lambda i: (source.name(i), source.labels[i])))
    kept = sum(p.stat().st_size for p in Path(folder).glob("*/*")) / 1e6
    return {"pictures": len(source), "seconds": seconds, "MB more": more, "peak MB": peak_mb(),
            "MB more in a loader": loader, "index MB": kept}


def make_compared(root: Path, n: int) -> None:
    """The same n small JPEGs as a folder, a tar and WebDataset shards of 1000."""
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(50)]
    shards, whole = [], tarfile.open(root / "all.tar", "w")
    for i in range(n):
        file = io.BytesIO()
        Image.fromarray(noise[i % 50]).resize((SIDE, SIDE)).save(file, "jpeg")
        path = root / f"folder/c{i % 100:02d}/{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        whole.add(path, f"c{i % 100:02d}/{i:06d}.jpg")
        if i % 1000 == 0:
            shards.append(tarfile.open(root / f"shard-{i // 1000:06d}.tar", "w"))
        shards[-1].add(path, f"{i:06d}.jpg")
        info = tarfile.TarInfo(f"{i:06d}.cls")
        info.size = len(str(i % 100))
        shards[-1].addfile(info, io.BytesIO(str(i % 100).encode()))
    for archive in (*shards, whole):
        archive.close()


def make_data(reader: str, root: Path, shards: int) -> Dataset | IterableDataset:
    """The data set of one package; all give uint8 pictures, cropped and mirrored at random."""
    if reader.startswith("equimini"):
        source = open_source(str(root / ("all.tar" if "tar" in reader else "folder")),
                             root / "index")
        return ImageFolder(*part(source), SIDE, SIDE, 0, augment=True)
    from torchvision import datasets, transforms
    change = transforms.Compose([transforms.RandomCrop(SIDE), transforms.RandomHorizontalFlip(),
                                 transforms.PILToTensor()])
    if reader == "ImageFolder":
        return datasets.ImageFolder(str(root / "folder"), change)
    import webdataset
    urls = str(root / f"shard-{{000000..{shards - 1:06d}}}.tar")
    return webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode("pil") \
        .to_tuple("jpg", "cls").map_tuple(change, int)


def measure_reader(reader: str, root: str, n: int, read: int, workers: int) -> dict[str, float]:
    """Images a second after the first batch, seconds to it, and MB more in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not reader.startswith("equimini"):
        importlib.import_module("torchvision")
        importlib.import_module("webdataset")
    before, start = private_mb(), time.perf_counter()
    data = make_data(reader, Path(root), n // 1000)
    more = private_mb() - before
    if reader.startswith("equimini"):
        loader = DataLoader(data, batch_sampler=Batches(n, BATCH, 0, 0, read // BATCH),
                            num_workers=workers)
    else:
        shuffled = {"shuffle": True} if reader == "ImageFolder" else {}
        loader = DataLoader(data, BATCH, num_workers=workers, **shuffled)
    batches, count = iter(loader), 0
    next(batches)
    first = time.perf_counter()
    for images, *_ in batches:
        count += len(images)
        if count >= read - BATCH:
            break
    return {"images/s": count / (time.perf_counter() - first), "first": first - start, "MB": more,
            "loader MB": forked(lambda: look_at_all(reader, data, n))}


def look_at_all(reader: str, data: Any, n: int) -> float:
    """MB that a loader comes to have of its own from the list of pictures alone."""
    if reader.startswith("equimini"):
        return touched(n, lambda i: (data.source.name(int(data.indices[i])), data.labels[i]))
    return touched(n, data.samples.__getitem__) if reader == "ImageFolder" else float("nan")


def available(reader: str) -> bool:
    """Whether the packages of a reader are installed."""
    needed = {"ImageFolder": ["torchvision"], "webdataset": ["torchvision", "webdataset"]}
    return all(importlib.util.find_spec(name) for name in needed.get(reader, ()))


def main(argv: list[str]) -> None:
    cfg = parse("equimini.bench archives", __doc__, ArchivesBench(), argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_large(root / "large.tar", cfg.pictures)
        time.sleep(3)  # a source that changed just now is not trusted
        for what in ("made", "opened"):
            found = apart(measure_index, str(root / "large.tar"), str(root / "index"))
            print(f"index {what}: {json.dumps({k: round(v, 2) for k, v in found.items()})}",
                  flush=True)
        (root / "large.tar").unlink()
        make_compared(root, cfg.compared)
        time.sleep(3)
        print("| reader | workers | images/s | first batch, s | MB more | MB more in a loader |")
        print("|---|---|---|---|---|---|")
        readers = [reader for reader in READERS if available(reader)]
        for workers in cfg.workers:
            runs: dict[str, list] = {reader: [] for reader in readers}
            for _ in range(cfg.repeats):
                for reader in readers:  # in turn, so that a busy moment is shared by all
                    runs[reader].append(apart(measure_reader, reader, str(root), cfg.compared,
                                              cfg.read, workers))
            for reader, all_of in runs.items():
                rate, first, more, loader = (statistics.median(run[k] for run in all_of)
                                             for k in all_of[0])
                print(f"| {reader} | {workers} | {rate:.0f} | {first:.2f} | {more:.1f} | "
                      f"{loader:.1f} |", flush=True)
