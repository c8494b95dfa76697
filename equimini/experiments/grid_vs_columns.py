"""Columns against a 2-D grid at equal tokens, steps and weights (Table 3).

    python -m equimini.experiments grid-vs-columns --data synthetic [--network inception.pt]

Both tokenizers cut the same feature map into as many tokens of the same size.  The losses of their
generators are of different tokens and cannot be compared, so pictures are drawn and compared with
held-out ones: by the features of --network, or, without one, as 8×8 thumbnails.  And with held-out
pictures as either tokenizer shows them: what is then left is the generator's.  --positions adds the
other grid of the table: every position of the map is a token, and a picture has as many values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equimini import load_generator
from equimini.config import flag
from equimini.evaluate.metrics import frechet_distance
from equimini.experiments.common import Lab
from equimini.experiments.report import Report, spread, verdict
from equimini.experiments.samples import EXACT, Judge, SampledConfig, scales_text
from equimini.experiments.training_runs import losses
from equimini.presets import parameters
from equimini.utils.command_line import parse
from equimini.utils.images import grid, save_png

PAPER = ("gFID of columns 5.57 (base) and 4.48 (large), of the grid with as many tokens 7.93 and "
         "7.49; of the grid with 256 tokens 3.99 (Table 3).")


@dataclass(frozen=True)
class GridConfig(SampledConfig):
    positions: bool = flag(False, "also the grid of single positions: 256 tokens in place of 16, "
                                  "and some fifteen times the time to train and draw")


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments grid-vs-columns", __doc__, GridConfig(), argv)
    lab = Lab("grid-vs-columns", cfg)
    runs = {"columns": lab.columns(), "grid": lab.grid()}
    if cfg.positions:
        runs["positions"] = lab.grid(name="positions", layout="positions")
    judge, judges = Judge(cfg, lab), {layout: Judge(cfg, lab, layout) for layout in runs}
    scales, distances, limits, own, pictures = {}, {}, {}, {}, []
    rows = [("model", "tokens", "tokenizer, M", "generator, M", "training, s",
             "tokenizer's PSNR, dB", "reconstructions' distance", "loss", "guidance",
             "Fréchet distance", "distance to decoded pictures")]
    for layout, of in runs.items():
        scales[layout], distances[layout] = judge.best(of)
        own[layout] = judges[layout].best(of)[1]
        limits[layout] = np.array([frechet_distance(judge.real[0], decoded)
                                   for decoded in judges[layout].real])
        psnr = [lab.tokenizer(layout, seed=s).logged("val_psnr") for s in range(cfg.seeds)]
        model = load_generator(of[0].last, judge.device)
        sizes = (f"{parameters(part) / 1e6:.3f}" for part in (model.tokenizer, model.generator))
        rows.append((layout, str(lab.tokens(layout)), *sizes,
                     spread([run.record()["cpu_seconds"] for run in of], 0), spread(psnr, 2),
                     spread(limits[layout], 3), spread(losses(of).mean(1)),
                     scales_text(scales[layout]), spread(distances[layout], 3),
                     spread(own[layout], 3)))
        pictures.append(model.sample([i % len(model.classes) for i in range(8)],
                                     cfg=scales[layout][0], **EXACT).cpu())
    rows.append(("training pictures (floor)", *[""] * 8, f"{judge.floor:.3f}", ""))
    rows += [(f"the same, decoded by {layout}", *[""] * 9, f"{of.floor:.3f}")
             for layout, of in judges.items()]
    save_png(grid(pictures, list(runs)), lab.folder / "samples.png")
    closer, better, left = (v["grid"] - v["columns"] for v in (distances, limits, own))
    reading = (f"Samples lie {spread(distances['columns'], 3)} from held-out pictures with columns "
               f"and {spread(distances['grid'], 3)} with the grid ({judge.name}); "
               f"{verdict('columns are closer, as in the paper', closer)}. Of the tokenizers "
               f"alone: {verdict('the columns reconstruct closer', better)}. To pictures that its "
               f"own tokenizer has decoded: {verdict('columns are closer', left)}.")
    if cfg.positions:
        reading += " Single positions: " + "; ".join(
            verdict(f"{what} closer than columns", v["columns"] - v["positions"])
            for what, v in (("samples", distances), ("reconstructions", limits),
                            ("samples to decoded pictures", own))) + "."
    Report("Columns against a 2-D grid (Table 3)", PAPER, rows, reading, [
        f"{judge.how} Losses are of different tokens. Training: processor time of a generator's. "
        "Reconstructions' distance: of held-out pictures, encoded and decoded, to themselves, the "
        "tokenizer's own limit."],
        {"distances": distances, "guidance": scales, "reconstructions": limits, "to_decoded": own,
         "floor": judge.floor,
         "decoded_floors": {layout: of.floor for layout, of in judges.items()}}).write(lab)
