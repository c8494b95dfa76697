"""Full causal, real equivariant and windowed attention, trained alike (Table 4).

    python -m equimini.experiments attention --data synthetic

All three predict the same columns with the same numbers of weights, steps and tokens.  Real
equivariant (Eq. 6): trained on random crops of W columns, as many as give the same number of
tokens per step; column i is predicted from the W − 1 before it alone, column 0 from the class.
"""

from __future__ import annotations

import numpy as np

from equimini.cli import output_folder
from equimini.experiments.common import ExperimentConfig, Lab, parse
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.plot import curves
from equimini.window_attention import visible_pairs

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
    cfg = parse("attention", __doc__, ExperimentConfig(), argv)
    lab, folder = Lab(cfg), output_folder(f"{cfg.out}/attention")
    found: dict[str, list[np.ndarray]] = {k: [] for k in pairs(16)}
    for seed in range(cfg.seeds):
        found["windowed"].append(lab.columns(seed).losses())
        n = len(found["windowed"][-1])
        found["full causal"].append(lab.columns(seed, f"--window {n}", "full").losses())
        found["real equivariant"].append(
            lab.columns(seed, "--real-equivariant", "real").losses())
    losses = {name: np.stack(values) for name, values in found.items()}

    windowed, rows = losses["windowed"].mean(1), [(
        "attention", "loss", "over windowed, % (paired)", "loss from column 5 on",
        "pairs per layer and image")]
    for name, values in losses.items():
        rows.append((name, spread(values.mean(1)),
                     spread(100 * (values.mean(1) / windowed - 1), 2, sign=True),
                     spread(values[:, WINDOW:].mean(1)), str(pairs(n)[name])))
    full, real = (losses[k].mean(1) for k in ("full causal", "real equivariant"))
    reading = (f"Over windowed attention the loss is {spread(100 * (full / windowed - 1), 2, True)}"
               f" % with full causal and {spread(100 * (real / windowed - 1), 2, True)} % with "
               f"real equivariant attention; "
               f"{verdict('windowed at most full causal', windowed <= full)}, "
               f"{verdict('real equivariant last', (real > full) & (real > windowed))}.")
    curves(folder / "attention.png", {k: per_column(v) for k, v in losses.items()},
           "column", "held-out loss", "Loss per column by attention")
    Report("attention", "Attention variants (Table 4)", PAPER, rows, reading, [
        "The loss is taken on real columns before the predicted one; gFID also feels how errors "
        "add up while sampling, which this measure does not."],
        {"losses": losses, "pairs": pairs(n)}).write(cfg, lab, folder)
