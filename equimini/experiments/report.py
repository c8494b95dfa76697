"""Results of an experiment: numbers with their spread, a table, JSON, one sentence of reading."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from equimini.config import Checked
from equimini.experiments.common import Lab, settings
from equimini.utils.command_line import pick_device
from equimini.utils.files import replacing
from equimini.utils.machine import machine


@dataclass
class Report:
    """What an experiment found; `write` leaves it in OUT/NAME.

    paper: what the paper reports; rows: of the table, the first is its head; reading: one
    sentence; notes: more paragraphs; values: numbers for the JSON.
    """

    name: str
    title: str
    paper: str
    rows: list[Sequence[str]]
    reading: str
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def write(self, cfg: Checked, lab: Lab | None, folder: Path) -> None:
        """table.md and results.json into `folder`; prints the table."""
        where = machine(pick_device(getattr(cfg, "device", "cpu")).type)
        budget = "no training"
        if lab and lab.used:
            budget = (f"{len(lab.used)} trainings (shared ones included), generators of "
                      f"{lab.steps} steps, {sum(lab.used.values()) / 60:.1f} minutes of processor "
                      f"time; scale {cfg.scale}, {cfg.seeds} seeds")
        command = f"python -m equimini.experiments {self.name} {flags_given(cfg)}".strip()
        text = "\n\n".join([
            f"# {self.title}", f"The paper: {self.paper}", markdown(self.rows),
            f"**{self.reading}**", *self.notes, f"`{command}`",
            f"Budget: {budget}. Machine: {where}."]) + "\n"
        result = {"name": self.name, "paper": self.paper, "table": self.rows,
                  "reading": self.reading, "notes": self.notes, "values": plain(self.values),
                  "settings": settings(cfg), "command": command, "budget": budget,
                  "machine": where, "finished": time.strftime("%Y-%m-%d %H:%M")}
        for name, content in (("table.md", text), ("results.json", json.dumps(result, indent=1))):
            with replacing(folder / name) as file:
                file.write(content.encode())
        print(f"\n{text}\nwritten to {folder}")


def flags_given(cfg: Checked) -> str:
    """The options that differ from their defaults, as they would be typed."""
    defaults = settings(type(cfg)())
    return " ".join(f"--{name.replace('_', '-')} {spelled(value)}"
                    for name, value in settings(cfg).items()
                    if value != defaults[name] and name not in ("out", "workers", "device"))


def spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def plain(value: Any) -> Any:
    """Arrays, tuples and numpy numbers as lists and numbers, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def markdown(rows: list[Sequence[str]]) -> str:
    """A table: text on the left, numbers on the right."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 4, sign: bool = False) -> str:
    """Mean ± sample standard deviation over seeds."""
    form = f"{'+' if sign else ''}.{digits}f"
    values = [round(v, digits + 2) + 0.0 for v in map(float, values)]
    if len(values) < 2:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):.{digits}f}"


def per_column(losses: np.ndarray) -> list[tuple[float, float]]:
    """Losses (seeds, N) to the points (subtask counted from 1, mean over the seeds)."""
    return [(i + 1, float(v)) for i, v in enumerate(losses.mean(0))]


def verdict(claim: str, holds: Sequence[bool]) -> str:
    """How often a claim held over the seeds."""
    n, of = sum(map(bool, holds)), len(holds)
    word = "holds" if n == of else "does not hold" if n == 0 else "is undecided"
    return f"{claim}: {word} ({n} of {of} seeds)"


def heat_map(matrix: np.ndarray, title: str, xlabel: str, ylabel: str) -> Image.Image:
    """A matrix (n, m) as coloured cells: blue is above 0, red below, white 0; with numbers."""
    cell, margin, top = 34, 46, 46
    n, m = matrix.shape
    largest = float(np.abs(matrix).max()) or 1.0
    sheet = Image.new("RGB", (margin + m * cell + 12, top + n * cell + 34), "white")
    draw = ImageDraw.Draw(sheet)
    small, font = (ImageFont.load_default(size=s) for s in (10, 12))
    draw.text((8, 6), title, "black", ImageFont.load_default(size=14))
    for i in range(n):
        y = top + i * cell
        draw.text((margin - 8, y + cell / 2), str(i + 1), "black", font, anchor="rm")
        for j in range(m):
            x, share = margin + j * cell, matrix[i, j] / largest
            fade = 255 - round(200 * abs(share))
            colour = (fade, fade, 255) if share >= 0 else (255, fade, fade)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), f"{100 * share:.0f}", "black", small,
                      anchor="mm")
    for j in range(m):
        draw.text((margin + j * cell + cell / 2, top - 4), str(j + 1), "black", font, anchor="ms")
    draw.text((margin, top + n * cell + 8), f"columns of the table: {xlabel}; rows: {ylabel}; "
              f"100 = {largest:.3g}", "black", small)
    return sheet
