"""Columns against a 2-D grid at equal tokens, steps and weights (Table 3).

    python -m equimini.experiments grid-vs-columns --data synthetic [--network inception.pt]

Both tokenizers cut the same feature map into as many tokens of the same size.  The losses of their
generators are of different tokens and cannot be compared, so pictures are drawn and compared with
held-out ones: by the features of --network, or, without one, as 8×8 thumbnails.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from equimini import load_generator
from equimini.experiments.common import Lab, Run, parse
from equimini.experiments.report import Report, spread, verdict
from equimini.experiments.samples import EULER_STEPS, Judge, SampledConfig
from equimini.presets import parameters
from equimini.utils import checkpoint
from equimini.utils.command_line import output_folder, pick_device
from equimini.utils.images import grid, save_png

PAPER = ("gFID of columns 5.57 (base) and 4.48 (large), of the grid with as many tokens 7.93 and "
         "7.49; of the grid with 256 tokens 3.99 (Table 3).")


def tokenizer_scores(run: Run) -> dict[str, float]:
    """Held-out PSNR in dB, from the end of a tokenizer's log."""
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "val_psnr" in r][-1]


def sizes(lab: Lab, runs: dict[str, list[Run]]) -> dict[str, tuple[int, int]]:
    """Weights of the tokenizer and of the generator, by layout."""
    return {layout: (parameters(checkpoint.load_tokenizer(lab.tokenizer(layout).last)),
                     parameters(load_generator(of[0].last).generator))
            for layout, of in runs.items()}


def main(argv: list[str]) -> None:
    """The command line."""
    cfg = parse("grid-vs-columns", __doc__, SampledConfig(), argv)
    lab, folder = Lab(cfg), output_folder(f"{cfg.out}/grid-vs-columns")
    runs = {"columns": [lab.columns(s) for s in range(cfg.seeds)],
            "grid": [lab.grid(s) for s in range(cfg.seeds)]}
    judge, counts, scales, distances = Judge(cfg, lab), sizes(lab, runs), {}, {}
    rows = [("model", "tokenizer, M", "generator, M", "tokenizer's PSNR, dB", "loss",
             "guidance", "Fréchet distance")]
    for layout, of in runs.items():
        scales[layout], distances[layout] = judge.best(of)
        rows.append((layout, *(f"{n / 1e6:.3f}" for n in counts[layout]),
                     f"{tokenizer_scores(lab.tokenizer(layout))['val_psnr']:.2f}",
                     spread([run.losses().mean() for run in of]), f"{scales[layout]:g}",
                     spread(distances[layout], 3)))
    rows.append(("training pictures (floor)", "", "", "", "", "", f"{judge.floor:.3f}"))
    show(runs, scales, folder / "samples.png", cfg.device)
    columns, grid_ = (np.array(distances[k]) for k in ("columns", "grid"))
    reading = (f"Samples lie {spread(columns, 3)} from held-out pictures with columns and "
               f"{spread(grid_, 3)} with the grid ({judge.name}); "
               f"{verdict('columns are closer, as in the paper', columns < grid_)}.")
    Report("grid-vs-columns", "Columns against a 2-D grid (Table 3)", PAPER, rows, reading, [
        f"Fréchet distance of {judge.samples} samples (features: {judge.name}), guidance scale "
        f"chosen for each model from the same sweep; floor: as many training pictures. Losses "
        "are of different tokens."], {"distances": distances, "guidance": scales,
                                      "floor": judge.floor}).write(cfg, lab, folder)


def show(runs: dict[str, list[Run]], scales: dict[str, float], path: Path, device: str) -> None:
    """Eight samples of the first run of each model."""
    rows: list[torch.Tensor] = []
    for layout, of in runs.items():
        model = load_generator(of[0].last, pick_device(device))
        rows.append(model.sample([i % len(model.classes) for i in range(8)], cfg=scales[layout],
                                 steps=EULER_STEPS).cpu())
    save_png(grid(rows, list(runs)), path)
