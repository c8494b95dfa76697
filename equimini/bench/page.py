"""How long the page takes to show what was asked for, and what a thousand edits cost.

    python -m equimini.bench page [--checkpoint scenes-mean-flow] [--edits 1000]

Medians, as the server spends them, from the order to the PNG that the browser is sent: elapsed
milliseconds, and in brackets those of all processor cores together, which other work on the machine
changes less.  --edits draws a column again and takes it, so many times.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equimini import load_generator
from equimini.bench.timing import peak_memory
from equimini.config import Checked, flag
from equimini.page.drawing import Studio, read_order
from equimini.page.server import png
from equimini.sampling.commands import QUICK
from equimini.utils.checkpoint import DRAWN_WITH
from equimini.utils.command_line import parse, pick_device


@dataclass(frozen=True)
class PageBench(Checked):
    checkpoint: str = flag(DRAWN_WITH, "checkpoint of a trained generator, or a model in the box")
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")
    repeats: int = flag(7, "of every order", min=1)
    columns: int = flag(128, "drawn on at a time", min=1, max=4096)
    edits: int = flag(0, "columns drawn again and taken, to see memory and disk grow", min=0)


def measure(studio: Studio, **order: Any) -> list[tuple[float, float]]:
    """Seconds, and those of the processor, until the first piece and until the end."""
    begun = time.perf_counter(), time.process_time()
    marks = []
    for piece in studio.draw(read_order(order)):
        png(piece["pixels"])
        marks.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return [marks[0], marks[-1]]


def row(name: str, studio: Studio, repeats: int, **order: Any) -> float:
    """Print a line of medians; returns seconds until the end."""
    measure(studio, **order)
    found = [measure(studio, **order) for _ in range(repeats)]
    medians = [[statistics.median(values) for values in zip(*part)] for part in zip(*found)]
    print(f"{name:38}" + "".join(f"{1e3 * wall:8.0f} ({1e3 * cpu:5.0f})" for wall, cpu in medians),
          flush=True)
    return medians[1][0]


def main(argv: list[str]) -> None:
    cfg = parse("equimini.bench page", __doc__, PageBench(), argv)
    model = load_generator(cfg.checkpoint, pick_device(cfg.device))
    how: dict[str, Any] = {} if model.generator.head.scales else dict(QUICK)
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(model, Path(folder), cfg.checkpoint)
        print(f"{'milliseconds (of processor time)':38}{'first piece':>16}{'the whole':>16}")
        label = [len(model.classes) - 1] * cfg.columns
        seconds = row(f"draw on, {cfg.columns} columns", studio, cfg.repeats, columns=cfg.columns,
                      classes=label, **how)
        again = {"do": "redraw", "start": 30, "end": 31, **how}
        row("a column again, one drawing", studio, cfg.repeats, candidates=1, fit=1, **again)
        row("a column again, four candidates", studio, cfg.repeats, fit=1, **again)
        row("the same, each the fitting one of 4", studio, cfg.repeats, fit=4, **again)
        if model.mirrored:
            row("8 columns on the left", studio, cfg.repeats, do="left", columns=8, **how)
        print(f"{cfg.columns / seconds:.0f} columns a second while it draws on")
        for k in range(cfg.edits):
            measure(studio, **again, candidates=1, fit=1)
            studio.choose(0)
            if k + 1 in (10, cfg.edits):
                size = sum(path.stat().st_size for path in Path(folder).iterdir())
                print(f"after {k + 1} edits: {peak_memory() / 2**20:.0f} MiB of memory at most, "
                      f"{size / 2**20:.2f} MiB on disk")
