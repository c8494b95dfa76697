"""How well long pictures are decoded piece by piece: are there seams, what is the difference.

    python -m equimini.show seams --checkpoint runs/generator/last.pt
    python -m equimini.show seams --tokens panoramas.pt --windows "32 8 2, 64 8 2"

For every choice of windows (length, overlap and discarded columns; see
equimini/sampling/tiled_decoder.py):

    seam     mean absolute horizontal gradient of the brightness, across the pixel borders where
             windows meet (all those of a fade, or the cut), over that across pixel borders
             elsewhere that lie at the same place within a column; 1: nothing to be seen
    control  the same ratio, at the same places, where the picture was decoded whole
    whole    difference from the picture decoded whole, as PSNR in dB
    tint     by how much two windows differ in the mean colour of a column where they overlap
             (mean absolute difference, 0 to 255), and the same per column of the fade: the slope
             that fading makes of it; the first line says how much neighbouring columns differ
             anyway

With --ring, for the pictures of `sample.py --ring --save-tokens`, also the seam where their ends
meet: decoded around the ring, and as a strip.  With --pictures and --join, the seam alone, of PNGs
that `sample.py --continue-from` or `--continue-left-from` wrote: before the first of their columns
on the right side of the join.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from equimini import load_generator
from equimini.config import Checked, flag
from equimini.losses import psnr
from equimini.sampling.edit import decode_ring, load_tokens
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.tiled_decoder import Windows
from equimini.utils.command_line import parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.images import load_columns


@dataclass(frozen=True)
class SeamsConfig(Checked):
    checkpoint: str = flag("runs/generator/last.pt", "checkpoint of a trained generator")
    tokens: str = flag("", "token file with long pictures; empty: draw some")
    windows: str = flag("", "choices to compare, each 'length overlap discard' in columns, with "
                        "commas; empty: several around the default")
    ring: bool = flag(False, "the pictures in --tokens are rings: measure where their ends meet")
    pictures: str = flag("", "folder of PNGs of one size, of which the seam is measured")
    join: int = flag(0, "the column of --pictures that the right side begins with", min=0)
    columns: int = flag(128, "length of the pictures that are drawn, in columns", min=16)
    count: int = flag(8, "pictures that are drawn, of the classes in turn", min=1)
    cfg: float = flag(3.0, "guidance scale for drawing", min=0)
    steps: int = flag(10, "steps of the midpoint rule per column for drawing", min=1)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


def brightness(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] to luma (B, H, W), 0 to 255."""
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return ((images * weights[:, None, None]).sum(1) + 1) * 127.5


def seam_borders(windows: Windows, columns: int, f: int) -> list[int]:
    """Pixel borders (between pixels p and p + 1) at which windows meet."""
    fade = (windows.overlap - 2 * windows.discard) * f
    last = columns - windows.length
    starts = range(windows.stride, last + windows.stride, windows.stride) if last > 0 else []
    return [p for s in starts for p in range((s + windows.discard) * f - 1,
                                             (s + windows.discard) * f + fade)]


def seam_ratio(images: Tensor, borders: list[int], f: int) -> float:
    """Mean gradient across `borders`, over that across the others at the same place mod f."""
    light = brightness(images)
    gradient = light.diff().abs().mean((0, 1))
    at = torch.zeros(len(gradient), dtype=torch.bool)
    at[borders] = True
    total = matched = 0.0
    for phase in range(f):
        seam, other = gradient[phase::f][at[phase::f]], gradient[phase::f][~at[phase::f]]
        if len(seam) and len(other):
            total, matched = total + seam.sum(), matched + len(seam) * other.mean()
    return float(total / matched) if matched else math.nan


def closing_seam(images: Tensor, f: int) -> float:
    """`seam_ratio` where the right end of rings (B, 3, H, W) meets the left one."""
    middle = images.shape[3] // f // 2 * f
    return seam_ratio(images.roll(middle, 3), [middle - 1], f)


def column_colours(images: Tensor, f: int) -> Tensor:
    """Mean colour of every column, (B, 3, N), 0 to 255."""
    return (images.mean(2).unflatten(2, (-1, f)).mean(-1) + 1) * 127.5


def tint(model: ImageGenerator, tokens: Tensor, windows: Windows) -> float:
    """Mean absolute difference of columns' colours between windows, over what both show."""
    f, d = model.tokenizer.config.f, windows.discard if windows.overlap > 2 * windows.discard else 0
    if windows.overlap == 0:
        return math.nan
    starts = range(0, tokens.shape[1] - windows.length + 1, windows.stride)
    colours = [column_colours(model.decode_whole(tokens[:, s:s + windows.length]), f)
               for s in starts]
    first, second = slice(windows.stride + d, windows.length - d), slice(d, windows.overlap - d)
    differences = [(a[..., first] - b[..., second]).abs().mean()
                   for a, b in zip(colours, colours[1:])]
    return float(torch.stack(differences).mean()) if differences else math.nan


def choices(text: str, columns: int) -> list[Windows]:
    """The windows to compare; raises UserError for text that does not describe any."""
    if not text:
        n = columns
        sizes = [(n, 0, 0), (n, n // 2, n // 8), (2 * n, n, n // 4), (4 * n, 0, 0),
                 (4 * n, n // 2, n // 8), (4 * n, n, n // 4), (4 * n, 2 * n, 0),
                 (4 * n, 2 * n, n // 4), (8 * n, 4 * n, n // 4)]
        return [Windows(*size) for size in sizes]
    try:
        return [Windows(*(int(number) for number in part.split())) for part in text.split(",")]
    except (ValueError, TypeError) as error:
        raise UserError(f"--windows takes 'length overlap discard', with commas between choices, "
                        f"got {text!r} ({error})") from None


def main(argv: list[str]) -> None:
    cfg = parse("equimini.show seams", __doc__, SeamsConfig(), argv)
    if cfg.ring and not cfg.tokens:
        raise UserError("--ring needs --tokens: pictures that sample.py --ring --save-tokens wrote")
    model = load_generator(cfg.checkpoint, pick_device(cfg.device))
    model.needs_columns("seams")
    if cfg.pictures:
        f, paths = model.tokenizer.config.f, sorted(Path(cfg.pictures).glob("*.png"))
        images = [load_columns(path, model.tokenizer.config.image_size, f) for path in paths]
        n = min((image.shape[3] // f for image in images), default=0)
        if not 0 < cfg.join < n or any(image.shape != images[0].shape for image in images):
            raise UserError(f"--pictures {cfg.pictures} must hold PNGs of one size, longer than "
                            f"--join {cfg.join}, got {len(images)} of at least {n} columns")
        ratio = seam_ratio(torch.cat(images), [cfg.join * f - 1], f)
        return print(f"seam before column {cfg.join} of {len(images)} pictures: {ratio:.3f}")
    windows = choices(cfg.windows, model.columns)
    if cfg.tokens:
        tokens = load_tokens(cfg.tokens, model).tokens.to(model.device)
    else:
        classes = [i % len(model.classes) for i in range(cfg.count)]
        tokens = model.sample_tokens(
            classes, cfg.columns, range(cfg.count),
            SamplingOptions(cfg=cfg.cfg, solver="midpoint", steps=cfg.steps),
            lambda drawn: tqdm(drawn, "columns", cfg.columns))
    f, n = model.tokenizer.config.f, tokens.shape[1]
    whole = model.decode_whole(tokens)
    if cfg.ring:
        print(f"seam where the ends meet: {closing_seam(decode_ring(model, tokens), f):.3f} around "
              f"the ring, {closing_seam(whole, f):.3f} as a strip")
    usual = column_colours(whole, f).diff(dim=2).abs().mean()
    print(f"{len(tokens)} pictures of {n} columns; colours of neighbouring columns differ by "
          f"{usual:.2f}\nlength overlap discard   seam control    whole   tint  per column")
    for w in windows:
        if w.length >= n:
            print(f"{w.length:6} {w.overlap:7} {w.discard:7}   not shorter than the pictures")
            continue
        pieces, borders = model.decode(tokens, w), seam_borders(w, n, f)
        decibels = psnr(whole[None], pieces[None]).item()
        mark, differs = "  (default)" if w == model.windows else "", tint(model, tokens, w)
        print(f"{w.length:6} {w.overlap:7} {w.discard:7} {seam_ratio(pieces, borders, f):6.3f} "
              f"{seam_ratio(whole, borders, f):7.3f} {decibels:5.1f} dB {differs:6.2f} "
              f"{differs / max(1, w.overlap - 2 * w.discard):11.3f}{mark}", flush=True)
