"""Full causal, real equivariant and windowed attention, trained alike (Table 4).

    python -m equimini.experiments attention --data synthetic [--network inception.pt]

All three predict the same columns with the same numbers of weights, steps and tokens.  Real
equivariant (Eq. 6): trained on random crops of W columns, as many as give the same number of
tokens per step; column i is predicted from the W − 1 before it alone, column 0 from the class.
Losses are taken on real columns; pictures are drawn as well, since errors add up there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equimini.config import flag
from equimini.experiments.common import Lab
from equimini.experiments.report import Report, per_column, spread, verdict
from equimini.experiments.samples import Judge, SampledConfig, scales_text
from equimini.experiments.training_runs import losses
from equimini.kernel.operators import visible_pairs
from equimini.utils.command_line import parse
from equimini.utils.plot import curves

PAPER = "gFID of full causal 7.35, real equivariant 8.87, windowed 7.21 (Table 4)."
WINDOW = 4


@dataclass(frozen=True)
class AttentionConfig(SampledConfig):
    windows: tuple[int, ...] = flag((), "lengths of more windows to compare, such as 1,2,8",
                                    min=1)


def pairs(n: int) -> dict[str, int]:
    """Pairs of columns that one layer attends over, in an image of n columns.

    Real equivariant is counted as in training: n tokens in crops of W.  (Sampling and validation
    recompute W − 1 tokens for every column.)
    """
    return {"full causal": visible_pairs(n, n, n),
            "real equivariant": n // WINDOW * visible_pairs(WINDOW, WINDOW, WINDOW),
            "windowed": visible_pairs(n, n, WINDOW)}


def order(values: dict[str, np.ndarray]) -> str:
    """Whether the paper's order holds; values: of the three by name, one per seed."""
    full, real, windowed = (values[k] for k in ("full causal", "real equivariant", "windowed"))
    return (f"{verdict('windowed below full causal', full - windowed)}, "
            f"{verdict('real equivariant last', real - np.maximum(full, windowed))}")


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments attention", __doc__, AttentionConfig(), argv)
    lab = Lab("attention", cfg)
    n = lab.tokens()
    counts = pairs(n) | {f"window of {w}": visible_pairs(n, n, w) for w in cfg.windows}
    runs = {"full causal": lab.columns(f"--window {n}", "full"),
            "real equivariant": lab.columns("--real-equivariant", "real"),
            "windowed": lab.columns()}
    runs |= {f"window of {w}": lab.columns(f"--window {w}", f"window-{w}") for w in cfg.windows}
    found = {name: losses(of) for name, of in runs.items()}  # (seeds, N) each
    judge, scales, distances = Judge(cfg, lab, "columns"), {}, {}
    for name, of in runs.items():
        scales[name], distances[name] = judge.best(of)

    means = {name: values.mean(1) for name, values in found.items()}
    over = {name: 100 * (mean / means["windowed"] - 1) for name, mean in means.items()}
    rows = [("attention", "loss", "over windowed, % (paired)", f"loss from column {WINDOW + 1} on",
             "pairs per layer and image", "guidance", "Fréchet distance")]
    for name, values in found.items():
        rows.append((name, spread(means[name]), spread(over[name], 2, sign=True),
                     spread(values[:, WINDOW:].mean(1)), str(counts[name]),
                     scales_text(scales[name]), spread(distances[name], 3)))
    rows.append(("training pictures, decoded (floor)", "", "", "", "", "", f"{judge.floor:.3f}"))
    each = ", ".join(f"{spread(v, 3)} ({k})" for k, v in distances.items())
    reading = (f"Over windowed attention the loss is {spread(over['full causal'], 2, True)} % with "
               f"full causal and {spread(over['real equivariant'], 2, True)} % with real "
               f"equivariant attention; {order(means)}. Samples lie {each} from decoded held-out "
               f"pictures ({judge.name}); {order(distances)}.")
    left_out = curves(lab.folder / "attention.png", {k: per_column(v) for k, v in found.items()},
                      "column", "held-out loss", "Loss per column by attention")
    Report("Attention variants (Table 4)", PAPER, rows, reading, [
        "The loss is taken on real columns before the predicted one; distances also feel how "
        f"errors add up while sampling. {judge.how}", left_out],
        {"losses": found, "pairs": counts, "distances": distances, "guidance": scales,
         "floor": judge.floor}).write(lab)
