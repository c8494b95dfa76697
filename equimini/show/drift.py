"""Do long pictures stay what they were: statistics of column k over many panoramas.

    python -m equimini.show drift --checkpoint runs/generator/last.pt --positions hold,grow
    python -m equimini.show drift --tokens panoramas.pt --data scenes/val

Of every column, over all pictures:

    token       root mean square of the normalised token values; about 1 in the training set
    contrast    standard deviation of the brightness (0 to 255) within the column
    gradient x  mean absolute difference of the brightness of neighbouring pixels, horizontally
    gradient y  the same, vertically
    brightness  its mean (0 to 255)
    variety     standard deviation, over the pictures, of the column's mean brightness: falls where
                all pictures drift to the same
    saturation  mean of (largest − smallest of red, green, blue) / largest, in percent; 0: grey
    red, blue   mean of red − green and of blue − green (0 to 255): does the tint wander

A curve that falls or rises along the picture is a model that drifts; one that jumps shows that
positions are not alike.  --data adds the columns of real pictures, encoded and decoded.

Repetition is seen in windows of 8 columns: how far the nearest one is that lies at least 16 columns
away in the same picture, over the same in another picture of the class.  1: a picture is not more
like itself than like others; 0: it repeats itself exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from equimini import load_generator
from equimini.config import flag
from equimini.evaluate.options import sampling
from equimini.sampling.commands import check_device
from equimini.sampling.edit import load_tokens
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import POSITIONS, SamplingOptions
from equimini.show.seams import brightness
from equimini.training.data import fixed_loader, load_data
from equimini.training.options import DataConfig
from equimini.utils.command_line import output_folder, parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.images import grid, save_png, to_float
from equimini.utils.plot import curves

SHOWN = 8  # pictures of each choice on the sheet
WINDOW, APART = 8, 16  # columns, see `repetition`
Statistics = dict[str, Tensor]  # name: value of every column, (N,)


@dataclass(frozen=True)
class DriftConfig(SamplingOptions):
    checkpoint: str = flag("runs/generator/last.pt", "checkpoint of a trained generator")
    tokens: str = flag("", "token file to measure instead of drawing")
    positions: str = flag("hold", "positions that cross-attention sees: hold, grow (see "
                          "sample.py), or both with a comma")
    columns: int = flag(128, "length of the pictures, in columns", min=4)
    lead_in: int = flag(0, "columns drawn before the pictures and cut off", min=0)
    count: int = flag(24, "pictures, of the classes in turn", min=1)
    seed: int = flag(0, "seed of the first picture", min=0)
    data: str = flag("", "folder of pictures to compare with")
    images: int = flag(256, "pictures of --data, at most", min=1)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")
    out: str = flag("drift", "folder for the plots and pictures")


DEFAULTS = DriftConfig(cfg=3.0, solver="midpoint", steps=10)


def column_statistics(tokens: Tensor, images: Tensor, f: int) -> Statistics:
    """Statistics of every column of tokens (B, N, C) and their pictures (B, 3, H, N·f)."""
    light = brightness(images)
    columns = light.unflatten(2, (-1, f))  # (B, H, N, f)
    mean = columns.mean((1, 3))  # (B, N)
    rgb = (images + 1) / 2
    saturation = (rgb.amax(1) - rgb.amin(1)) / rgb.amax(1).clamp_min(1e-3)  # (B, H, N·f)
    x = torch.nn.functional.pad(light.diff(dim=2).abs().mean((0, 1)), (0, 1))
    x = x.unflatten(0, (-1, f))  # border f−1 is the one to the next column
    inside = torch.full((len(x),), f, device=x.device)
    inside[-1] = f - 1  # the last column has no next one
    tint = (images - images[:, 1:2]).mean((0, 2)).unflatten(1, (-1, f)).mean(-1) * 127.5  # (3, N)
    found = {"token": tokens.square().mean((0, 2)).sqrt(), "contrast": columns.std((1, 3)).mean(0),
             "gradient x": x.sum(1) / inside,
             "gradient y": columns.diff(dim=1).abs().mean((0, 1, 3)), "brightness": mean.mean(0),
             "variety": mean.std(0, correction=0),
             "saturation": 100 * saturation.mean((0, 1)).unflatten(0, (-1, f)).mean(-1),
             "red": tint[0], "blue": tint[2]}
    return {name: values.cpu() for name, values in found.items()}


def repetition(tokens: Tensor, labels: Tensor) -> float:
    """How much pictures repeat themselves (see above), 1: not at all; NaN if it cannot be measured.

    tokens: (B, N, C); labels: (B, N).  Needs 24 columns and two pictures of the same classes.
    """
    if tokens.shape[1] < WINDOW + APART:
        return math.nan
    windows = tokens.unfold(1, WINDOW, 1).flatten(2)  # (B, n, C·WINDOW)
    n = windows.shape[1]
    away = (torch.arange(n)[:, None] - torch.arange(n)).abs() >= APART
    nearest = {True: [], False: []}  # to windows of the same picture, of another
    for i in range(len(tokens)):
        for j in (i, next((j for j in (*range(i + 1, len(tokens)), *range(i))
                           if torch.equal(labels[i], labels[j])), None)):
            if j is None:
                return math.nan
            apart = torch.cdist(windows[i], windows[j]).masked_fill(~away, math.inf)
            lowest = apart.amin(1)
            nearest[i == j].append(lowest[lowest.isfinite()].mean())
    return (torch.stack(nearest[True]).mean() / torch.stack(nearest[False]).mean()).item()


def of_pictures(model: ImageGenerator, folder: str, count: int) -> Statistics:
    """The same of real pictures, encoded and decoded."""
    _, data, _ = load_data(DataConfig(data=folder, val_data=folder), model.tokenizer.config)
    tokens, images = [], []
    for pixels, _, _ in fixed_loader(data, 32, min(count, len(data))):
        x = to_float(pixels).to(model.device)
        tokens.append(model.tokenizer.normalize(model.tokenizer.encode(x)))
        images.append(model.decode(tokens[-1]))
    return column_statistics(torch.cat(tokens), torch.cat(images), model.tokenizer.config.f)


def spans(columns: int) -> list[tuple[int, int]]:
    """Ranges of columns for the table: 0, 1, 2-3, 4-7, … doubling, first and last."""
    edges = [0, 1]
    while edges[-1] < columns:
        edges.append(min(2 * edges[-1], columns))
    return list(zip(edges, edges[1:]))


def table(measured: dict[str, Statistics]) -> str:
    """Means over ranges of columns, one line for each statistic and each of `measured`."""
    longest = max(len(s["token"]) for s in measured.values())
    width = max(len(name) for name in measured) + 2
    lines = ["columns".ljust(12 + width) + "".join(
        f"{f'{a}-{b - 1}' if b - a > 1 else a:>8}" for a, b in spans(longest))]
    for key in next(iter(measured.values())):
        for name, statistics in measured.items():
            values = [statistics[key][a:b] for a, b in spans(longest)]
            lines.append(key.ljust(12) + name.ljust(width) + "".join(
                f"{v.mean():8.2f}" if len(v) else " " * 8 for v in values))
    return "\n".join(lines)


def draw(cfg: DriftConfig, model: ImageGenerator, positions: str) -> tuple[Tensor, Tensor]:
    """The panoramas' tokens, (count, columns, C), and their classes, (count, columns)."""
    labels, n = torch.arange(cfg.count) % len(model.classes), cfg.lead_in + cfg.columns
    tokens = model.sample_tokens(labels.tolist(), n, range(cfg.seed, cfg.seed + cfg.count),
                                 sampling(cfg, positions=positions),
                                 lambda drawn: tqdm(drawn, positions, n))
    return tokens[:, cfg.lead_in:], labels[:, None].expand(-1, cfg.columns)


@torch.no_grad()
def main(argv: list[str]) -> None:
    cfg = parse("equimini.show drift", __doc__, DEFAULTS, argv)
    wanted = [name.strip() for name in cfg.positions.split(",")]
    if not set(wanted) <= set(POSITIONS):
        raise UserError(f"--positions takes {' or '.join(POSITIONS)}, or both with a comma, got "
                        f"{cfg.positions}")
    out, device = output_folder(cfg.out), pick_device(cfg.device)
    check_device(cfg, device)
    model = load_generator(cfg.checkpoint, device)
    model.needs_columns("drift")
    measured, repeated, rows, names = {}, {}, [], []
    if cfg.data:
        measured["pictures"] = of_pictures(model, cfg.data, cfg.images)
    for name in ["tokens"] if cfg.tokens else wanted:
        if cfg.tokens:
            found = load_tokens(cfg.tokens, model)
            tokens, labels = found.tokens.to(model.device), found.labels
        else:
            tokens, labels = draw(cfg, model, name)
        repeated[name] = repetition(tokens.cpu(), labels)
        images = model.decode(tokens).cpu()
        measured[name] = column_statistics(tokens.cpu(), images, model.tokenizer.config.f)
        shown = images[:SHOWN].split(1)
        rows += shown
        names += [name if cfg.tokens else f"{name} {model.classes[i % len(model.classes)]}"
                  for i in range(len(shown))]
    print(table(measured))
    for name, value in repeated.items():
        print(f"repetition  {name}  {value:.3f} (1: none)")
    for key in next(iter(measured.values())):
        series = {name: list(enumerate(s[key].tolist())) for name, s in measured.items()}
        curves(out / f"{key.replace(' ', '-')}.png", series, "column", key, f"{key} of column k")
    save_png(grid(rows, names), out / "pictures.png")
    print(f"plots and pictures: {out}")
