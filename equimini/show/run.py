"""Curves of trainings: loss, loss per column, learning rate, speed, in one picture.

    python -m equimini.show run runs/generator
    python -m equimini.show run runs/float32 runs/bf16 --out both.png

Reads log.jsonl of the folders (of both training scripts, also while they run) and draws what
there is:

    loss             of training steps (smoothed, and faint as it is); held out as dots
    loss per column  held-out where it is logged, by column, early, halfway and late in the run
    loss per t       the same over the flow's time t
    learning rate, images per second, gradient norm before clipping
    EMA distance     of the moving average from the weights, relative to them
    PSNR             held out, of a tokenizer

Needs matplotlib: pip install "equimini[plots]".
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

from equimini.config import Checked, flag
from equimini.utils.command_line import command, output_folder, override
from equimini.utils.errors import UserError
from equimini.utils.files import replacing
from equimini.utils.plot import COLOURS, new_figure

STAGES = {"early": (0.0, ":"), "halfway": (0.5, "--"), "late": (1.0, "-")}  # place, line style
MEASURED = 1e-9  # images per second are logged as 0 until they are known
Curve = tuple[list[float], list[float]]  # x and y


@dataclass(frozen=True)
class RunPlot(Checked):
    out: str = flag("run.png", "picture to write, a .png")
    smooth: int = flag(0, "lines of the log that the smoothed loss looks back over; 0: a fiftieth "
                       "of them, at least 5", min=0)


class RunLog:
    """The records of a run's log.jsonl, in order."""

    def __init__(self, folder: str, label: str) -> None:
        path, self.label = Path(folder) / "log.jsonl", label
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); give folders that "
                            "train_tokenizer.py or train_generator.py wrote to") from None
        self.records, damaged = [], []
        for k, line in enumerate(lines):
            try:
                self.records.append({"step": 0, **json.loads(line)})
            except (ValueError, TypeError):
                damaged.append(k)
        if [k for k in damaged if k < len(lines) - 1]:  # the last may be being written
            warnings.warn(f"{path}: left out {len(damaged)} damaged lines", stacklevel=2)
        if not self.records:
            raise UserError(f"{path} holds no record yet")

    def curve(self, key: str, least: float = -math.inf) -> Curve:
        """Steps and values of a scalar; those that are not finite, or under `least`, left out."""
        points = [(r["step"], r[key]) for r in self.records
                  if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])
                  and r[key] >= least]
        return [p[0] for p in points], [p[1] for p in points]

    def profiles(self, key: str) -> dict[str, tuple[int, list[float]]]:
        """A list of values early, halfway and late in the run: {stage: (step, values)}.

        Each is the mean over a tenth of the records that have it, so that single noisy batches
        do not matter; of few records, one.  step is the last one's.
        """
        found = [r for r in self.records if isinstance(r.get(key), list) and r[key]]
        found = [r for r in found if len(r[key]) == len(found[-1][key])]
        share, result = max(1, len(found) // 10), {}
        for stage, (place, _) in STAGES.items():
            first = round(place * (len(found) - share))
            part = found[first:first + share]
            if part and part[-1]["step"] not in [step for step, _ in result.values()]:
                result[stage] = part[-1]["step"], [mean(v) for v in zip(*(r[key] for r in part))]
        return result


def mean(values: Sequence[float | None]) -> float:
    """Mean of those that are finite numbers; NaN if none is."""
    kept = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    return sum(kept) / len(kept) if kept else math.nan


def smoothed(values: list[float], n: int) -> list[float]:
    """Exponential moving average over about n values, of the first ones over fewer."""
    total, weight, result = 0.0, 0.0, []
    for v in values:
        total, weight = total * (1 - 1 / n) + v / n, weight * (1 - 1 / n) + 1 / n
        result.append(total / weight)
    return result


def labels(folders: Sequence[str]) -> list[str]:
    """Short names that tell the folders apart: without what they all begin with."""
    paths = [os.path.abspath(f) for f in folders]
    start = os.path.dirname(paths[0]) if len(set(paths)) == 1 else os.path.commonpath(paths)
    return [os.path.basename(p) if p == start else os.path.relpath(p, start) for p in paths]


def draw_noisy(axes: Any, curve: Curve, smooth: int, style: dict[str, Any]) -> None:
    """A smoothed line, and faint behind it what it was made of."""
    steps, values = curve
    axes.plot(steps, values, **style | {"alpha": 0.2, "linewidth": 0.8})
    axes.plot(steps, smoothed(values, smooth or max(5, len(values) // 50)), **style)


def draw_loss(axes: Any, run: RunLog, smooth: int, style: dict[str, Any]) -> None:
    """That of training, and dots for the held-out one."""
    draw_noisy(axes, run.curve("loss"), smooth, style)
    axes.plot(*run.curve("val_loss"), "o", color=style["color"], markersize=2 + 2 *
              style["linewidth"], markeredgecolor="white", markeredgewidth=0.6)


def scalar(key: str, least: float = -math.inf, noisy: bool = False) -> Callable[..., None]:
    """A panel that draws the values logged under `key`, none below `least`."""
    def draw(axes: Any, run: RunLog, smooth: int, style: dict[str, Any]) -> None:
        curve = run.curve(key, least)
        if noisy:
            draw_noisy(axes, curve, smooth, style)
        else:
            axes.plot(*curve, marker="." if len(curve[0]) < 30 else "", **style)
    return draw


def profile(keys: Sequence[str], centred: bool = False) -> Callable[..., None]:
    """Draws a list of the log, the first of `keys` that is there, early, halfway and late.

    centred: the values are of equal bins from 0 to 1, else of columns 0, 1, …
    """
    def draw(axes: Any, run: RunLog, smooth: int, style: dict[str, Any]) -> None:
        found = next((p for p in map(run.profiles, keys) if p), {})
        for stage, (step, values) in found.items():
            x = [(k + 0.5) / len(values) if centred else k for k in range(len(values))]
            axes.plot(x, values, STAGES[stage][1], label=f"step {step}", marker=".", **style)
    return draw


# title, label of the x axis, whether y may be logarithmic, how to draw one run's part
PANELS = (
    ("loss (dots: held out)", "step", True, draw_loss),
    ("loss per column", "column", False, profile(("val_loss_per_column", "loss_per_column"))),
    ("loss per t", "t (0: token, 1: noise)", False, profile(("loss_per_t",), centred=True)),
    ("learning rate", "step", False, scalar("lr")),
    ("images per second", "step", False, scalar("images_per_s", MEASURED, noisy=True)),
    ("gradient norm", "step", True, scalar("grad_norm", noisy=True)),
    ("EMA distance", "step", False, scalar("ema_distance")),
    ("PSNR in dB, held out", "step", False, scalar("val_psnr")),
)


def figure(runs: list[RunLog], smooth: int = 0) -> Any:
    """A matplotlib figure with the panels that any of the runs has something for."""
    styles = [{"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4} for i in range(len(runs))]
    if len(runs) > 1:
        styles[0]["linewidth"] = 3.0  # seen also where another run covers it
    sheet = new_figure("the curves of a run", figsize=(13, 12))
    drawn = 0
    for title, xlabel, log, draw in PANELS:
        axes = sheet.add_subplot(3, 3, drawn + 1)
        for run, style in zip(runs, styles):
            draw(axes, run, smooth, style)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.remove()
            continue
        drawn += 1
        finish(axes, title, xlabel, log, alone=len(runs) == 1)
    if not drawn:
        raise UserError("the logs hold nothing to draw")
    place(sheet, drawn)
    from matplotlib.lines import Line2D
    sheet.legend(handles=[Line2D([], [], label=run.label, **style)
                          for run, style in zip(runs, styles)],
                 loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    return sheet


def place(sheet: Any, drawn: int) -> None:
    """Panels in rows of three, as many rows as needed."""
    columns, rows = min(3, drawn), math.ceil(drawn / 3)
    sheet.set_size_inches(4.4 * columns, 3.2 * rows + 0.4)
    grid = sheet.add_gridspec(rows, columns)
    for k, axes in enumerate(sheet.axes):
        axes.set_subplotspec(grid[k // columns, k % columns])


def finish(axes: Any, title: str, xlabel: str, log: bool, alone: bool) -> None:
    """Title, grid, legend of line styles; y on a log scale where it spans more than 20 times."""
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    values = [v for line in axes.lines for v in line.get_ydata()]
    if log and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    elif title in ("learning rate", "images per second"):
        axes.set_ylim(bottom=0)
    if not alone and "per" in title and xlabel != "step":  # colours are of runs, styles of stages
        for stage, (_, style) in STAGES.items():
            axes.plot([], [], style, color="grey", label=stage)
        axes.legend(handles=axes.lines[-len(STAGES):], fontsize="small")
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def summary(run: RunLog) -> str:
    """The line of figures that is printed for a run."""
    steps, loss = run.curve("loss")
    val_steps, val = run.curve("val_loss")
    parts = [f"{run.label}: {run.records[-1]['step']} steps"]
    if loss:
        last = loss[-max(1, len(loss) // 10):]
        parts.append(f"loss {mean(last):.5g} (last tenth)")
    if val:
        best = min(range(len(val)), key=val.__getitem__)
        parts.append(f"held out {val[-1]:.5g}, best {val[best]:.5g} at step {val_steps[best]}")
    rates = sorted(run.curve("images_per_s", MEASURED)[1])
    if rates:
        parts.append(f"{rates[len(rates) // 2]:.4g} images/s (median)")
    skipped = run.curve("skipped")[1]
    if skipped and skipped[-1]:
        parts.append(f"{skipped[-1]:.0f} steps skipped")
    return "; ".join(parts)


def main(argv: list[str]) -> None:
    parser = command("equimini.show run", __doc__, RunPlot())
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="output folder of a training")
    args = parser.parse_args(argv)
    cfg = override(RunPlot(), args)
    out = Path(cfg.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {cfg.out}")
    runs = [RunLog(folder, label) for folder, label in zip(args.folders, labels(args.folders))]
    sheet = figure(runs, cfg.smooth)
    output_folder(out.parent)
    with replacing(out) as file:
        sheet.savefig(file, format="png", dpi=110)
    print("\n".join(map(summary, runs)) + f"\npicture: {out}")
