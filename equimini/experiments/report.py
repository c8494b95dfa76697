"""Results of an experiment: numbers with their spread, a table, JSON, one sentence of reading."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import permutations
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from equimini.config import Checked
from equimini.experiments.common import Lab
from equimini.utils.command_line import pick_device, spelled
from equimini.utils.files import write_text
from equimini.utils.machine import machine

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1, 2, … df
SEEDS_NOTE = ("Intervals: 95 %, of the mean difference between models of the same seed (paired, "
              "Student's t); a claim holds if the interval lies above 0. Every seed has a "
              "tokenizer of its own, which its models of one layout share; held-out pictures are "
              "the same for all, so the intervals leave out their choice. ± is the standard "
              "deviation over seeds.")


@dataclass
class Report:
    """What an experiment found.

    paper: what the paper reports; rows: of the table, the first is its head; reading: one
    sentence; notes: more paragraphs, empty ones left out; values: numbers for the JSON;
    intervals: what they hold, where seeds were trained.
    """

    title: str
    paper: str
    rows: list[Sequence[str]]
    reading: str
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    intervals: str = SEEDS_NOTE

    def write(self, lab: Lab) -> None:
        """table.md, results.json, values.json into OUT/NAME; prints the table."""
        self.save(lab.name, lab.cfg, lab.folder, lab.budget, [self.intervals] if lab.used else [])

    def save(self, name: str, cfg: Checked, folder: Path, budget: str = "no training",
             more: Sequence[str] = ()) -> None:
        """The same for an experiment that trains nothing."""
        where = machine(pick_device(getattr(cfg, "device", "cpu")).type)
        notes = [note for note in (*self.notes, *more) if note]
        command = " ".join(["python -m equimini.experiments", name, *flags_given(cfg)])
        text = "\n\n".join([
            f"# {self.title}", f"The paper: {self.paper}", markdown(self.rows),
            f"**{self.reading}**", *notes, f"`{command}`",
            f"Budget: {budget}. Machine: {where}."]) + "\n"
        result = {"name": name, "paper": self.paper, "table": self.rows, "reading": self.reading,
                  "notes": notes, "values": plain(self.values), "settings": asdict(cfg),
                  "command": command, "budget": budget, "machine": where,
                  "finished": time.strftime("%Y-%m-%d %H:%M")}
        write_text(folder / "table.md", text)
        write_text(folder / "results.json", json.dumps(result, indent=1))
        write_text(folder / "values.json", short({"command": command} | result["values"]))
        print(f"\n{text}\nwritten to {folder}")


def flags_given(cfg: Checked, of: type[Checked] | None = None,
                left_out: Sequence[str] = ("out", "workers", "device")) -> list[str]:
    """The options that differ from their defaults, as they would be typed; of: those of this
    configuration alone."""
    found = []
    for f in fields(of or cfg):
        value = getattr(cfg, f.name)
        if value != f.default and f.name not in left_out:
            found += [f"--{f.name.replace('_', '-')}", *([] if value is True else [spelled(value)])]
    return found


def plain(value: Any) -> Any:
    """Arrays, tuples and numpy numbers as lists and numbers, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def short(values: dict[str, Any]) -> str:
    """JSON, a line a name, numbers to eight digits: what is kept of a report beside its table."""
    digits = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.8g}"))
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in digits.items())
    return "{" + ",\n".join(lines) + "}\n"


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


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of differences (one per seed), by Student's t.

    Without bounds for a single one, or one that is not a number.
    """
    n = len(differences)
    if n < 2 or not np.isfinite(differences).all():
        return -math.inf, math.inf
    middle, error = np.mean(differences), np.std(differences, ddof=1) / n ** 0.5
    half = _t_quantile(n - 1) * error
    return middle - half, middle + half


def _t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t: the table, then Cornish and Fisher's expansion."""
    if df <= len(T_975):
        return T_975[df - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def verdict(claim: str, differences: Sequence[float], digits: int = 3) -> str:
    """Whether a claim, that a quantity is above 0, holds; differences: that quantity, by seed.

    It holds if the whole interval lies above 0, does not if all of it lies below.
    """
    low, high = paired_interval(differences)
    word = "holds" if low > 0 else "does not hold" if high < 0 else "is undecided"
    if math.isinf(low):
        return f"{claim}: {word} (no interval from one seed, or from what is not finite)"
    return (f"{claim}: {word} (difference {np.mean(differences):+.{digits}f}, interval "
            f"{low:+.{digits}f} to {high:+.{digits}f})")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's, and its p: the share of all orders in which it is at least as far from 0."""
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    every = [np.corrcoef(ranks[0], order)[0, 1] for order in permutations(ranks[1])]
    found = np.corrcoef(*ranks)[0, 1]
    return found, float(np.mean(np.abs(every) > abs(found) - 1e-9))


def per_column(losses: np.ndarray) -> list[tuple[float, float]]:
    """Losses (seeds, N) to the points (subtask counted from 1, mean over the seeds)."""
    return [(i + 1, float(v)) for i, v in enumerate(losses.mean(0))]
