"""Solvers of the head's ODE: error and Fréchet distance over the number of head evaluations.

    python -m equimini.bench solvers --checkpoint runs/generator/last.pt
    python -m equimini.bench solvers --checkpoint … --network inception.pt --data pictures

Every solver draws the same images from the same noise.  They are compared with the truth, the
midpoint rule with 500 steps, in RMS over normalised tokens (channels of about unit variance):
  columns  each column alone, after the truth's columns: the error that the solver makes itself
  images   whole images: column i + 1 is drawn after what the solver made of column i, so small
           errors grow from column to column, and a large one means another, no worse picture
With --network, whole images are also compared with --data: what the error costs in quality.
Tables go to the screen, pictures of the curves and results.json into --out.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini import load_generator
from equimini.config import Checked, flag
from equimini.evaluate.feature_networks import load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance
from equimini.sampler import (SCHEDULES, SOLVERS, ColumnSampler, Guidance, column_noise,
                              evaluation_times, time_grid)
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.training.data import load_data
from equimini.training.options import RunConfig
from equimini.utils.command_line import command, output_folder, override, pick_device
from equimini.utils.errors import UserError
from equimini.utils.files import write_text
from equimini.utils.images import to_pixels
from equimini.utils.machine import machine
from equimini.utils.plot import curves

TRUTH = {"solver": "midpoint", "steps": 500}


@dataclass(frozen=True)
class SolverBench(Checked):
    checkpoint: str = flag("runs/generator/last.pt", "checkpoint of a trained generator")
    evaluations: tuple[int, ...] = flag((4, 6, 10, 20, 30, 50, 100), "numbers of head evaluations "
                                        "per column; second-order solvers take two a step", min=1)
    solvers: str = flag("euler,midpoint,heun", "solvers to compare, with commas; also mean-flow")
    time_shifts: str = flag("1", "time shifts to compare, with commas")
    count: int = flag(32, "images whose error is measured", min=1)
    columns: int = flag(0, "length of the images; 0: square", min=0)
    cfg: float = flag(2.0, "guidance scale; 1: none", min=0)
    cfg_schedule: str = flag("linear", "guidance from 1 up to --cfg over the columns, or --cfg "
                             "throughout", choices=SCHEDULES)
    precision: str = flag("float32", "arithmetic of the matrix products; the truth's is float32",
                          choices=("float32", "bf16"))
    seed: int = flag(0, "seed of the first image; the next ones count up", min=0)
    batch_size: int = flag(64, "images drawn at a time", min=1)
    network: str = flag("", "TorchScript feature network for the Fréchet distance, or 'download' "
                        "(see equimini.evaluate); empty: no distance")
    data: str = flag("", "folder of pictures that the distance is to, all of them")
    distance_count: int = flag(1000, "images whose distance is measured", min=8)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")
    out: str = flag("runs/solvers", "folder to write to")


class Case:
    """The images of one benchmark: their classes, seeds, guidance."""

    def __init__(self, model: ImageGenerator, cfg: SolverBench, count: int) -> None:
        self.model, self.cfg, self.count = model, cfg, count
        self.columns = cfg.columns or model.tokenizer.config.columns

    def batches(self, count: int) -> Iterator[tuple[list[int], list[int]]]:
        """Classes (in turn) and seeds of the first `count` images."""
        for first in range(0, count, self.cfg.batch_size):
            images = range(first, min(first + self.cfg.batch_size, count))
            yield ([k % len(self.model.classes) for k in images],
                   [self.cfg.seed + k for k in images])

    def images(self, count: int, label: str, **how: Any) -> Tensor:
        """Whole images by one solver, as tokens (count, columns, C)."""
        options = SamplingOptions(cfg=self.cfg.cfg, cfg_schedule=self.cfg.cfg_schedule, **how)
        batches = tqdm(list(self.batches(count)), desc=label, leave=False)
        return torch.cat([self.model.sample_tokens(labels, self.columns, seeds, options)
                          for labels, seeds in batches])

    @torch.no_grad()
    def single_columns(self, truth: Tensor, **how: Any) -> Tensor:
        """Each column by one solver, after the columns before it of `truth` (count, N, C)."""
        generator = self.model.packed(self.model.generator, self.cfg.precision)
        draw, drawn = ColumnSampler(generator.head, **how), []
        n, cfg = truth.shape[1], self.cfg
        guidance = Guidance(cfg.cfg, cfg.cfg_schedule, n)
        s = truth.new_tensor([guidance.scale(i) for i in range(n)])
        branches = (False, True) if cfg.cfg != 1 else (False,)
        for (labels, seeds), tokens in zip(self.batches(len(truth)), truth.split(cfg.batch_size)):
            given = torch.tensor(labels, device=truth.device)
            z = torch.cat([generator.predict(tokens, given, torch.full_like(given, drop).bool())
                           for drop in branches])  # (branches·B, N, d)
            noise = torch.stack([column_noise(seeds, i, tokens.shape[2]) for i in range(n)], 1)
            column = draw(z.flatten(0, 1), noise.to(truth).flatten(0, 1), s.repeat(len(tokens)))
            drawn.append(column.view_as(tokens))
        return torch.cat(drawn)


def settings(cfg: SolverBench) -> list[dict[str, Any]]:
    """Solver, time shift and steps of every point; raises UserError for what does not exist."""
    found = []
    for solver in map(str.strip, cfg.solvers.split(",")):
        if solver not in SOLVERS:
            raise UserError(f"--solvers takes {', '.join(SOLVERS)}, got {solver!r}")
        per_step = len(evaluation_times(solver, time_grid(1)))
        steps = sorted({max(1, n // per_step) for n in cfg.evaluations})
        found += [{"solver": solver, "time_shift": shift, "steps": n}
                  for shift in shifts(cfg.time_shifts) for n in steps]
    return found


def shifts(text: str) -> list[float]:
    """Values of --time-shifts; raises UserError for what is none."""
    try:
        found = [float(part) for part in text.split(",")]
        for shift in found:
            time_grid(1, shift)
    except ValueError:
        raise UserError("--time-shifts takes numbers above 0, with commas between, got "
                        f"{text!r}") from None
    return found


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def distance_from(cfg: SolverBench, model: ImageGenerator) -> Callable[[Tensor], float]:
    """The Fréchet distance of tokens' pictures to the pictures of --data, as a function."""
    net = load_network(cfg.network, device=model.device)
    data = load_data(RunConfig(data=cfg.data, val_data=cfg.data), model.tokenizer.config)[1]
    loader = DataLoader(data, cfg.batch_size, sampler=[(0, i) for i in range(len(data))])

    def fit(batches: Iterable[Tensor]) -> Gaussian:
        return Gaussian.fit(torch.cat([net.features(x) for x in batches]))

    reference = fit(x for x, _, _ in tqdm(loader, desc=f"features of {cfg.data}"))
    return lambda tokens: frechet_distance(
        fit(to_pixels(model.decode(x)) for x in tokens.split(cfg.batch_size)), reference)


def rows_of(case: Case, distance: Callable[[Tensor], float] | None) -> Iterator[dict[str, Any]]:
    """One row (a dict) for every point of every curve."""
    cfg = case.cfg
    truth = case.images(cfg.count, "truth", **TRUTH)
    for how in settings(cfg):
        n = len(evaluation_times(how["solver"], time_grid(how["steps"], how["time_shift"])))
        tokens = case.images(case.count, f"{how['solver']}, {n} evaluations",
                             precision=cfg.precision, **how)
        row = {**how, "evaluations": n,
               "column_error": rms(case.single_columns(truth, **how) - truth),
               "image_error": rms(tokens[:cfg.count] - truth)}
        yield row | ({"frechet": distance(tokens)} if distance else {})


def curve_label(row: dict[str, Any]) -> str:
    shift = "" if row["time_shift"] == 1 else f", shift {row['time_shift']:g}"
    return row["solver"] + shift


def draw_curves(rows: list[dict[str, Any]], out: Path, cfg: SolverBench) -> list[Path]:
    """Pictures of all measures that there are, over the number of evaluations.

    Returns those that were drawn (none without matplotlib).
    """
    about = {"column_error": "Error of single columns", "image_error": "Error of whole images",
             "frechet": f"{cfg.distance_count} images against {Path(cfg.data).name}"}
    written = []
    for name, title in about.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows if name in rows[0] else ():
            y = row[name] if name == "frechet" else math.log10(row[name])
            series.setdefault(curve_label(row), []).append((row["evaluations"], y))
        ylabel = "Fréchet distance" if name == "frechet" else "log10 of the RMS error"
        path = out / f"{name.replace('_', '-')}.png"
        if series and not curves(path, series, "head evaluations per column", ylabel, title):
            written.append(path)
    return written


def comparisons(rows: list[dict[str, Any]]) -> Iterator[str]:
    """For each other curve: the fewest evaluations that are as good as plain Euler's most."""
    plain = [row for row in rows if curve_label(row) == "euler"]
    if not plain:
        return
    best = max(plain, key=lambda row: row["evaluations"])
    for label in dict.fromkeys(map(curve_label, rows)):
        enough = [row for row in rows if curve_label(row) == label
                  and row["column_error"] <= best["column_error"]]
        if label != "euler":
            yield (f"{label}: " + (f"{min(row['evaluations'] for row in enough)} evaluations give"
                                   if enough else "no number of evaluations here gives")
                   + f" columns as exact as euler's {best['evaluations']}")


def main(argv: list[str]) -> None:
    parser = command("equimini.bench solvers", __doc__, SolverBench())
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    cfg = override(SolverBench(), args)
    settings(cfg)
    if bool(cfg.network) != bool(cfg.data):
        raise UserError("a Fréchet distance takes both --network and --data")
    device, out = pick_device(cfg.device), output_folder(cfg.out)
    model = load_generator(cfg.checkpoint, device)
    distance = distance_from(cfg, model) if cfg.network else None
    case = Case(model, cfg, max(cfg.count, cfg.distance_count) if distance else cfg.count)

    if not args.json:
        print(f"# {machine(device.type)}\n# {cfg.count} images of {case.columns} columns, guidance "
              f"{cfg.cfg:g} ({cfg.cfg_schedule}); RMS errors against {TRUTH['solver']} with "
              f"{TRUTH['steps']} steps\n     solver  shift  steps  evaluations  columns' error  "
              f"images' error{'  Fréchet distance' * bool(distance)}")
    rows = []
    for row in rows_of(case, distance):
        rows.append(row)
        if not args.json:
            print(f"{row['solver']:>11} {row['time_shift']:6g} {row['steps']:6} "
                  f"{row['evaluations']:12} {row['column_error']:15.4g} {row['image_error']:14.4g}"
                  + (f"{row['frechet']:18.2f}" if distance else ""), flush=True)
    result = {"machine": machine(device.type), "settings": asdict(cfg), "rows": rows}
    write_text(out / "results.json", json.dumps(result, indent=1))
    written = draw_curves(rows, out, cfg)
    print(json.dumps(result, indent=1) if args.json else "\n".join(
        [*comparisons(rows), "curves: " + ", ".join(map(str, written))]))
