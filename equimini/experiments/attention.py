"""Full causal, real equivariant and windowed attention, trained alike (Table 4).

    python -m equimini.experiments attention --data synthetic [--network inception.pt]

All three predict the same columns with the same numbers of weights, steps and tokens.  Real
equivariant (Eq. 6): trained on random crops of W columns, as many as give the same number of
tokens per step; column i is predicted from the W − 1 before it alone, column 0 from the class.
Losses are taken on real columns; pictures are drawn, too, since errors add up there.
"""

from __future__ import annotations

import numpy as np

from equimini.attention import visible_pairs
from equimini.experiments.common import Lab, Run, parse
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.samples import Judge, SampledConfig
from equimini.utils.command_line import output_folder
from equimini.utils.plot import curves

PAPER = "gFID of full causal 7.35, real equivariant 8.87, windowed 7.21 (Table 4)."
WINDOW = 4


def pairs(n: int) -> dict[str, int]:
    """Pairs of columns that one layer attends over, in an image of n columns.

    Real equivariant is counted as in training: n tokens in crops of W.  (Sampling and validation
    recompute W − 1 tokens for every column.)
    """
    return {"full causal": visible_pairs(n, n, n),
            "real equivariant": n // WINDOW * visible_pairs(WINDOW, WINDOW, WINDOW),
            "windowed": visible_pairs(n, n, WINDOW)}


def main(argv: list[str]) -> None:
    """The command line."""
    cfg = parse("attention", __doc__, SampledConfig(), argv)
    lab, folder = Lab(cfg), output_folder(f"{cfg.out}/attention")
    runs: dict[str, list[Run]] = {k: [] for k in pairs(16)}
    for seed in range(cfg.seeds):
        runs["windowed"].append(lab.columns(seed))
        n = len(runs["windowed"][-1].losses())
        runs["full causal"].append(lab.columns(seed, f"--window {n}", "full"))
        runs["real equivariant"].append(lab.columns(seed, "--real-equivariant", "real"))
    losses = {name: np.stack([run.losses() for run in of]) for name, of in runs.items()}
    judge, scales, distances = Judge(cfg, lab, decoded=True), {}, {}
    for name, of in runs.items():
        scales[name], distances[name] = judge.best(of)

    windowed, rows = losses["windowed"].mean(1), [(
        "attention", "loss", "over windowed, % (paired)", "loss from column 5 on",
        "pairs per layer and image", "guidance", "Fréchet distance")]
    for name, values in losses.items():
        rows.append((name, spread(values.mean(1)),
                     spread(100 * (values.mean(1) / windowed - 1), 2, sign=True),
                     spread(values[:, WINDOW:].mean(1)), str(pairs(n)[name]),
                     f"{scales[name]:g}", spread(distances[name], 3)))
    rows.append(("training pictures, decoded (floor)", "", "", "", "", "", f"{judge.floor:.3f}"))
    full, real = (losses[k].mean(1) for k in ("full causal", "real equivariant"))
    reading = (f"Over windowed attention the loss is {spread(100 * (full / windowed - 1), 2, True)}"
               f" % with full causal and {spread(100 * (real / windowed - 1), 2, True)} % with "
               f"real equivariant attention; "
               f"{verdict('windowed at most full causal', windowed <= full)}, "
               f"{verdict('real equivariant last', (real > full) & (real > windowed))}. "
               f"{distances_reading(judge, distances)}")
    curves(folder / "attention.png", {k: per_column(v) for k, v in losses.items()},
           "column", "held-out loss", "Loss per column by attention")
    Report("attention", "Attention variants (Table 4)", PAPER, rows, reading, [
        "The loss is taken on real columns before the predicted one; distances also feel how "
        f"errors add up while sampling. Fréchet distance of {judge.samples} samples to held-out "
        "pictures, encoded and decoded, since all three share the tokenizer's limit; guidance "
        "scale chosen for each model from the same sweep; floor: as many training pictures."],
        {"losses": losses, "pairs": pairs(n), "distances": distances, "guidance": scales,
         "floor": judge.floor}).write(cfg, lab, folder)


def distances_reading(judge: Judge, distances: dict[str, list[float]]) -> str:
    """The sentence on drawn pictures; distances: by attention, one for each seed."""
    full, real, windowed = (np.array(distances[k]) for k in
                            ("full causal", "real equivariant", "windowed"))
    each = ", ".join(f"{spread(v, 3)} ({k})" for k, v in distances.items())
    return (f"Samples lie {each} from decoded held-out pictures ({judge.name}); "
            f"{verdict('windowed at most full causal', windowed <= full)}, "
            f"{verdict('real equivariant last', (real > full) & (real > windowed))}.")
