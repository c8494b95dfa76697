"""Line plots as PNG files, drawn by matplotlib; where it is missing they are left out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np

from equimini.utils.errors import UserError
from equimini.utils.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INSTALL = 'it needs matplotlib: pip install "equimini[plots]" or pip install matplotlib'
Point = tuple[float, float]


def new_figure(what: str, **options: Any) -> Any:
    """An empty matplotlib figure; raises UserError, naming the picture, where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{what} cannot be drawn: {INSTALL}") from None
    return Figure(layout="constrained", **options)


def curves(path: Path | str, series: dict[str, list[Point]], xlabel: str, ylabel: str, title: str,
           levels: dict[str, float] | None = None) -> str:
    """Draw one line with dots for each entry of `series`, and write the PNG.

    series: points (x, y) by label; those that are not finite are left out.  levels: values of
    dashed horizontal lines by label.  Returns nothing, or, where matplotlib is missing, what a
    report says of it.  Raises ValueError if there is no point to draw.
    """
    series = {label: sorted(p for p in points if all(map(math.isfinite, p)))
              for label, points in series.items()}
    if not any(series.values()):
        raise ValueError("series must hold at least one finite point")
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(series) + len(levels or {}))]

    def draw(sheet: Any) -> None:
        axes = sheet.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.grid(alpha=0.3)
        for (label, points), colour in zip(series.items(), colours):
            axes.plot(*zip(*points or [(math.nan, math.nan)]), color=colour, label=label,
                      marker="o" if len(points) <= 40 else "")
        for (label, value), colour in zip((levels or {}).items(), colours[len(series):]):
            if math.isfinite(value):
                axes.axhline(value, color=colour, label=label, linestyle="--")
        sheet.legend(loc="outside right upper", frameon=False, fontsize="small")

    return _save(path, (7.2, 4.4), draw)


def heat_map(path: Path | str, matrix: np.ndarray, xlabel: str, ylabel: str, title: str) -> str:
    """Draw a matrix as cells, blue above 0 and red below, with its values in % of the largest.

    Returns what `curves` does.
    """
    n, m = matrix.shape
    largest = float(np.abs(matrix).max()) or 1.0

    def draw(sheet: Any) -> None:
        axes = sheet.add_subplot(
            title=title, xlabel=xlabel, ylabel=f"{ylabel} (100 = {largest:.3g})", xticks=range(m),
            yticks=range(n), xticklabels=range(1, m + 1), yticklabels=range(1, n + 1))
        axes.imshow(matrix, cmap="RdBu", vmin=-largest, vmax=largest)
        for (i, j), value in np.ndenumerate(100 * matrix / largest):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if abs(value) > 60 else "black")

    return _save(path, (0.4 * m + 1.2, 0.4 * n + 1.2), draw)


def _save(path: Path | str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    try:
        sheet = new_figure(str(path), figsize=size)
    except UserError:
        print(f"{path} was left out: {INSTALL}", file=sys.stderr)
        return f"{Path(path).name} was left out: {INSTALL}"
    draw(sheet)
    with replacing(path) as file:
        sheet.savefig(file, format="png", dpi=100)
    return ""
