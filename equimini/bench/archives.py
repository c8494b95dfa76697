"""The index of a million pictures, and loaders of a folder and archives beside other packages.

    python -m equimini.bench archives [--pictures 1280000] [--compared 20000] [--names 200000]

Makes, in a temporary folder, a tar of a thousand classes of tiny pictures, and measures its index;
then a folder, a tar and WebDataset shards of the same small JPEGs, and reads them with equimini,
and with torchvision's ImageFolder and the webdataset package where those are installed; last a
folder and a tar of many names, for the memory that these take.  Every measurement runs in a process
of its own; memory is what a process has to itself (Private_Dirty).
"""

from __future__ import annotations

import importlib.util
import io
import os
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini.bench.timing import apart, peak_memory
from equimini.config import Checked, flag
from equimini.training.data import Batches, ImageFolder
from equimini.training.index import open_source
from equimini.training.split import part
from equimini.utils.command_line import parse

SIDE, BATCH = 128, 64  # of the pictures compared
READERS = {"equimini, folder": "torch", "equimini, tar": "torch", "ImageFolder": "torchvision",
           "webdataset": "webdataset"}  # and the package that each needs


@dataclass(frozen=True)
class ArchivesBench(Checked):
    pictures: int = flag(1_280_000, "pictures of the large tar", min=1000)
    compared: int = flag(20_000, "pictures of the comparison, a multiple of 1000", min=1000)
    names: int = flag(200_000, "pictures of the comparison of memory", min=1000)
    read: int = flag(4096, "pictures read in each measurement", min=128)
    workers: tuple[int, ...] = flag((0, 1, 2), "numbers of loader processes", min=0)
    repeats: int = flag(3, "measurements of each; the median is printed", min=1)


def private_mb() -> float:
    """Memory that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Private_Dirty:")[1].split()[0]) / 1024


def processor_seconds() -> float:
    """Of this process and the loaders that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2])
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def forked(function: Callable[[], float]) -> float:
    """The result of a function, called in a copy of this process, as a loader is."""
    ours, theirs = os.pipe()
    if not os.fork():
        os.write(theirs, str(function()).encode())
        os._exit(0)
    os.wait()
    return float(os.read(ours, 100))


def make_tar(path: Path, n: int, classes: int = 1000) -> None:
    """A tar of n tiny pictures, named as ImageNet's are."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    with open(path, "wb") as archive:
        for i in tqdm(range(n), desc="making a tar", leave=False):
            name = f"n{i % classes:08d}/n{i % classes:08d}_{i // classes}.png"
            archive.write(member(name, file.getvalue()))
        archive.write(bytes(1024))


def member(name: str, content: bytes) -> bytes:
    """A member of a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % 512)


def make_compared(root: Path, n: int) -> None:
    """The same n small JPEGs as a folder, a tar and WebDataset shards of 1000."""
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(50)]
    for first in range(0, n, 1000):
        shard, whole = b"", b""
        for i in range(first, min(n, first + 1000)):
            file, path = io.BytesIO(), root / f"folder/c{i % 100:02d}/{i:06d}.jpg"
            Image.fromarray(noise[i % 50]).resize((SIDE, SIDE)).save(file, "jpeg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
            whole += member(f"c{i % 100:02d}/{i:06d}.jpg", file.getvalue())
            shard += member(f"{i:06d}.jpg", file.getvalue())
            shard += member(f"{i:06d}.cls", str(i % 100).encode())
        (root / f"shard-{first // 1000:06d}.tar").write_bytes(shard + bytes(1024))
        with open(root / "all.tar", "ab") as archive:
            archive.write(whole + bytes(1024 if first + 1000 >= n else 0))


def make_names(root: Path, n: int) -> None:
    """n tiny pictures in 1000 classes, as a tar and as a folder (of links to one file a class)."""
    make_tar(root / "all.tar", n)
    for k in range(1000):
        (root / f"folder/n{k:08d}").mkdir(parents=True)
        Image.new("RGB", (1, 1)).save(first := root / f"folder/n{k:08d}/n{k:08d}_0.png")
        for i in range(1, n // 1000):
            os.link(first, root / f"folder/n{k:08d}/n{k:08d}_{i}.png")


def make_data(reader: str, root: Path) -> Any:
    """The data set of one package; all give uint8 pictures, cropped and mirrored at random."""
    if reader.startswith("equimini"):
        source = open_source(str(root / ("all.tar" if "tar" in reader else "folder")),
                             root / "index")
        return ImageFolder(*part(source), SIDE, SIDE, 0, augment=True)
    from torchvision import datasets, transforms
    usual = "BMP", "DIB", "GIF", "JPEG", "PPM", "PNG"  # Pillow tries these first, unless all
    Image.ID.sort(key=lambda name: name not in usual)  # formats were asked for, as equimini does
    change = transforms.Compose([transforms.RandomCrop(SIDE), transforms.RandomHorizontalFlip(),
                                 transforms.PILToTensor()])
    if reader == "ImageFolder":
        return datasets.ImageFolder(str(root / "folder"), change)
    import webdataset
    urls = str(root / f"shard-{{000000..{len(list(root.glob('shard-*'))) - 1:06d}}}.tar")
    return webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode("pil") \
        .to_tuple("jpg", "cls").map_tuple(change, int)


def open_apart(reader: str, root: str) -> tuple[Any, float, float]:
    """A data set, the MB it takes of this process, and when opening it began."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    importlib.import_module(READERS[reader])
    before, start = private_mb(), time.perf_counter()
    return make_data(reader, Path(root)), private_mb() - before, start


def measure_names(reader: str, root: str) -> dict[str, float]:
    """Open many names: seconds, MB in this process, and in a loader that looks at all of them."""
    data, more, start = open_apart(reader, root)
    seconds = time.perf_counter() - start
    look = data.samples.__getitem__ if reader == "ImageFolder" else \
        lambda i: (data.source.name(int(data.indices[i])), data.labels[i])
    return {"opened, s": seconds, "MB more": more, "peak MB": peak_memory() / 2**20,
            "MB more in a loader": forked(lambda: touched(len(data), look)), "index MB":
            sum(p.stat().st_size for p in Path(root).glob("index/*")) / 1e6}


def touched(length: int, get: Callable[[int], Any]) -> float:
    """MB that a loader has of its own once it has looked at all entries."""
    before = private_mb()
    for i in range(length):
        get(i)
    return private_mb() - before


def measure_reader(reader: str, root: str, n: int, read: int, workers: int) -> dict[str, float]:
    """Images a second after the first batch, seconds to it, and processor time of all."""
    data, _, start = open_apart(reader, root)
    options: dict[str, Any] = {"batch_size": BATCH, "shuffle": reader == "ImageFolder" or None}
    if reader.startswith("equimini"):
        options = {"batch_sampler": Batches(n, BATCH, 0, 0, n // BATCH)}
    batches, count = iter(DataLoader(data, num_workers=workers, multiprocessing_context="fork"
                                     if workers else None, **options)), 0
    next(batches)
    first, before = time.perf_counter(), processor_seconds()
    for images, *_ in batches:
        count += len(images)
        if count >= read - BATCH:
            break
    rate = count / (time.perf_counter() - first)
    del batches  # ends the loaders, whose processor time counts from their start
    each = 1e6 * (processor_seconds() - before) / count
    return {"images/s": rate, "µs of a processor each": each, "first batch, s": first - start}


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Medians, as Markdown."""
    columns = list(next(iter(rows.values()))[0])
    print(f"\n| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, found in rows.items():
        medians = [statistics.median(run[column] for run in found) for column in columns]
        print(f"| {name} | {' | '.join(f'{m:.0f}' if m > 99 else f'{m:.2f}' for m in medians)} |",
              flush=True)


def main(argv: list[str]) -> None:
    cfg = parse("equimini.bench archives", __doc__, ArchivesBench(), argv)
    readers = [r for r, package in READERS.items() if importlib.util.find_spec(package)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("large", "compared", "names"):
            (root / folder).mkdir()
        make_tar(root / "large/all.tar", cfg.pictures)
        make_compared(root / "compared", cfg.compared)
        make_names(root / "names", cfg.names)
        time.sleep(3)  # a source that changed just now is not trusted
        table({f"index {what}": [apart(measure_names, "equimini, tar", name + "/large")]
               for what in ("made", "opened")})
        (root / "large/all.tar").unlink()
        table({r: [apart(measure_names, r, name + "/names") for _ in range(2)][1:]
               for r in readers if r != "webdataset"})  # which has no list
        rows: dict[tuple, list] = {(r, w): [] for w in cfg.workers for r in readers}
        for _ in range(cfg.repeats):  # in turn, so that a busy moment is shared by all
            for (reader, workers), found in rows.items():
                found.append(apart(measure_reader, reader, name + "/compared", cfg.compared,
                                   cfg.read, workers))
        table({f"{reader}, {workers} loaders": found for (reader, workers), found in rows.items()})
