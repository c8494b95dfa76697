"""Line plots as PNG files, drawn with Pillow."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from equimini.utils.images import clean_label, save_png

# Okabe and Ito's colours, which colour-blind readers can tell apart; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIZE, SCALE = (720, 440), 3  # in pixels; drawn SCALE times larger, then reduced: smooth lines
Point = tuple[float, float]


def curves(path: Path | str, series: dict[str, list[Point]], xlabel: str, ylabel: str, title: str,
           levels: dict[str, float] | None = None) -> None:
    """Draw one line with dots for each entry of `series`, and write the PNG.

    series: points (x, y) by label; those that are not finite are left out.  levels: values of
    dashed horizontal lines by label.  Raises ValueError if there is no point to draw.
    """
    levels = {k: v for k, v in (levels or {}).items() if math.isfinite(v)}
    series = {k: sorted(p for p in points if all(map(math.isfinite, p)))
              for k, points in series.items()}
    points = [p for line in series.values() for p in line]
    if not points:
        raise ValueError("series must hold at least one finite point")
    xs, ys = zip(*points)
    chart = _Chart(ticks([*xs]), ticks([*ys, *levels.values()]), [*series, *levels])
    chart.axes(xlabel, ylabel, title)
    for i, (label, value) in enumerate(levels.items(), len(series)):
        chart.level(i, label, value)
    for i, (label, line) in enumerate(series.items()):
        chart.line(i, label, line)
    save_png(chart.sheet.resize(SIZE, Image.Resampling.LANCZOS), path)


def ticks(values: list[float], about: int = 6) -> list[float]:
    """Round numbers that span the values: steps of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


class _Chart:
    """A sheet with axes; places are given in data units."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float], labels: list[str]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks
        self.sheet = Image.new("RGB", tuple(SCALE * n for n in SIZE), "white")
        self.draw = ImageDraw.Draw(self.sheet)
        self.font, self.bold = (ImageFont.load_default(size=SCALE * s) for s in (12, 15))
        width, height = self.sheet.size
        legend = max(self.font.getlength(clean_label(label, 32)) for label in labels)
        y_width = max(self.font.getlength(_number(t)) for t in y_ticks)
        self.left, self.right = int(y_width) + SCALE * 46, width - int(legend) - SCALE * 50
        self.top, self.bottom = SCALE * 40, height - SCALE * 50

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Data units to pixels."""
        return (_between(x, self.x_ticks, self.left, self.right),
                _between(y, self.y_ticks, self.bottom, self.top))

    def axes(self, xlabel: str, ylabel: str, title: str) -> None:
        """Grid, numbers, names of the axes, title."""
        draw, gap, middle = self.draw, SCALE * 6, (self.left + self.right) / 2
        for t in self.x_ticks:
            x, _ = self.place(t, self.y_ticks[0])
            draw.line((x, self.top, x, self.bottom), fill="#E4E4E4", width=SCALE)
            draw.text((x, self.bottom + gap), _number(t), "black", self.font, anchor="mt")
        for t in self.y_ticks:
            _, y = self.place(self.x_ticks[0], t)
            draw.line((self.left, y, self.right, y), fill="#E4E4E4", width=SCALE)
            draw.text((self.left - gap, y), _number(t), "black", self.font, anchor="rm")
        draw.line((self.left, self.top, self.left, self.bottom, self.right, self.bottom),
                  fill="black", width=SCALE)
        draw.text((middle, self.sheet.height - SCALE * 8), xlabel, "black", self.font, anchor="ms")
        draw.text((middle, SCALE * 12), title, "black", self.bold, anchor="mt")
        text = Image.new("L", (int(self.font.getlength(ylabel)) + 2, SCALE * 20), 0)
        ImageDraw.Draw(text).text((0, SCALE * 2), ylabel, 255, self.font)
        text = text.rotate(90, expand=True)
        top = int((self.top + self.bottom - text.height) / 2)
        self.sheet.paste("black", (SCALE * 8, max(0, top)), text)

    def line(self, i: int, label: str, points: list[Point]) -> None:
        """One line with dots (without, where there are many), and its entry in the legend."""
        colour, places = COLOURS[i % len(COLOURS)], [self.place(*p) for p in points]
        if len(places) > 1:
            self.draw.line(places, fill=colour, width=2 * SCALE, joint="curve")
        y = self._legend(i, label)
        self.draw.line((self.right + SCALE * 12, y, self.right + SCALE * 34, y), fill=colour,
                       width=2 * SCALE)
        for x, y in [*places, (self.right + SCALE * 23, y)] if len(places) <= 40 else []:
            r = 3.5 * SCALE
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def level(self, i: int, label: str, value: float) -> None:
        """A dashed horizontal line, and its entry in the legend."""
        colour, (_, y) = COLOURS[i % len(COLOURS)], self.place(self.x_ticks[0], value)
        self._dashes(self.left, self.right, y, colour)
        y = self._legend(i, label)
        self._dashes(self.right + SCALE * 12, self.right + SCALE * 34, y, colour)

    def _dashes(self, left: float, right: float, y: float, colour: str) -> None:
        x = left
        while x < right:
            end = min(x + 6 * SCALE, right)
            self.draw.line((x, y, end, y), fill=colour, width=round(1.5 * SCALE))
            x += 9 * SCALE

    def _legend(self, i: int, label: str) -> float:
        """Write the label of entry i; returns its height on the sheet."""
        y = self.top + SCALE * (10 + 20 * i)
        self.draw.text((self.right + SCALE * 40, y), clean_label(label, 32), "black", self.font,
                       anchor="lm")
        return y


def _between(value: float, span: list[float], start: float, end: float) -> float:
    return start + (value - span[0]) / (span[-1] - span[0]) * (end - start)


def _number(value: float) -> str:
    """A tick's number, short: 0, 0.05, 1500, 2e+06."""
    return f"{0 if abs(value) < 1e-12 else value:.5g}"
