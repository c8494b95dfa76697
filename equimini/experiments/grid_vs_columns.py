"""Columns against a 2-D grid at equal tokens, steps and weights (Table 3).

    python -m equimini.experiments grid-vs-columns --data synthetic [--network inception.pt]

Both tokenizers cut the same feature map into as many tokens of the same size.  The losses of their
generators are of different tokens and cannot be compared, so pictures are drawn and compared with
held-out ones: by the features of --network, or, without one, as 8×8 thumbnails.
"""

from __future__ import annotations

import numpy as np

from equimini import load_generator
from equimini.experiments.common import Lab
from equimini.experiments.report import Report, spread, verdict
from equimini.experiments.samples import EULER_STEPS, Judge, SampledConfig
from equimini.experiments.training_runs import losses
from equimini.presets import parameters
from equimini.utils.command_line import parse
from equimini.utils.images import grid, save_png

PAPER = ("gFID of columns 5.57 (base) and 4.48 (large), of the grid with as many tokens 7.93 and "
         "7.49; of the grid with 256 tokens 3.99 (Table 3).")


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments grid-vs-columns", __doc__, SampledConfig(), argv)
    lab = Lab("grid-vs-columns", cfg)
    runs = {"columns": lab.columns(), "grid": lab.grid()}
    judge, scales, distances, pictures = Judge(cfg, lab), {}, {}, []
    rows = [("model", "tokenizer, M", "generator, M", "tokenizer's PSNR, dB", "loss",
             "guidance", "Fréchet distance")]
    for layout, of in runs.items():
        scales[layout], distances[layout] = judge.best(of)
        model = load_generator(of[0].last, judge.device)
        rows.append((layout, *(f"{parameters(part) / 1e6:.3f}"
                               for part in (model.tokenizer, model.generator)),
                     f"{lab.tokenizer(layout).logged('val_psnr'):.2f}",
                     spread(losses(of).mean(1)), f"{scales[layout]:g}",
                     spread(distances[layout], 3)))
        pictures.append(model.sample([i % len(model.classes) for i in range(8)],
                                     cfg=scales[layout], steps=EULER_STEPS).cpu())
    rows.append(("training pictures (floor)", "", "", "", "", "", f"{judge.floor:.3f}"))
    save_png(grid(pictures, list(runs)), lab.folder / "samples.png")
    of_columns, of_grid = (np.array(distances[k]) for k in ("columns", "grid"))
    reading = (f"Samples lie {spread(of_columns, 3)} from held-out pictures with columns and "
               f"{spread(of_grid, 3)} with the grid ({judge.name}); "
               f"{verdict('columns are closer, as in the paper', of_grid - of_columns)}.")
    Report("Columns against a 2-D grid (Table 3)", PAPER, rows, reading, [
        f"Fréchet distance of {judge.samples} samples (features: {judge.name}), guidance scale "
        f"chosen for each model from the same sweep; floor: as many training pictures. Losses "
        "are of different tokens."], {"distances": distances, "guidance": scales,
                                      "floor": judge.floor}).write(lab)
