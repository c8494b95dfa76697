"""What each token means: random tokens replaced one by one by a picture's own (Fig. 2).

    python -m equimini.show tokens --checkpoint runs/tokenizer/last.pt --image my/picture.jpg

Writes a strip of decoded pictures, the first from random tokens alone, the last from the
picture's own, and below it the original.  Then the shift test: two crops of the picture, one k
columns further right, are encoded apart; for every column that both hold, its two tokens'
distance is printed.  A tokenizer that is equivariant along x gives the same token twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equimini.autoencoder import Tokenizer, noise_variance
from equimini.config import Checked, flag
from equimini.noise import normal, rng
from equimini.utils.checkpoint import check_statistics, load_any_tokenizer
from equimini.utils.command_line import output_folder, parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.files import replacing
from equimini.utils.images import grid, load_columns, save_png, to_uint8


@dataclass(frozen=True)
class TokensConfig(Checked):
    checkpoint: str = flag("runs/tokenizer/last.pt", "checkpoint of a trained tokenizer, or of a "
                           "generator, which holds its tokenizer")
    image: str = flag("", "picture to encode, any size and format")
    out: str = flag("tokens.png", "the strip to write, a .png")
    animation: str = flag("", "also write every step as a moving picture: a .webp or .gif")
    pictures: int = flag(9, "pictures of the strip, evenly spaced from no token to all", min=2)
    milliseconds: int = flag(250, "time that the animation shows each step", min=20)
    shifts: tuple[int, ...] = flag((1, 2, 4), "shifts k to test, in columns of f pixels", min=1)
    seed: int = flag(0, "seed of the random tokens", min=0)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


@torch.no_grad()
def reveal(tokenizer: Tokenizer, tokens: Tensor, seed: int, batch: int = 16) -> Tensor:
    """Decoded pictures (N + 1, 3, H, W): the first i tokens are the given ones, the rest random.

    tokens: (1, N, D).  Random ones have the mean and the spread of the training set's tokens.
    """
    n, width = tokens.shape[1:]
    drawn = normal((n, width), [rng("reveal", seed)]).to(tokens.device)
    sequences = torch.stack([torch.cat((tokens[0, :i], tokenizer.denormalize(drawn)[0, i:]))
                             for i in range(n + 1)])
    return torch.cat([tokenizer.decode(part).cpu() for part in sequences.split(batch)])


def distance(a: Tensor, b: Tensor, std: Tensor) -> Tensor:
    """Root mean square over the channels of (a − b) / std; (..., D) to (...)."""
    return ((a - b) / std).square().mean(-1).sqrt()


@torch.no_grad()
def shift_test(tokenizer: Tokenizer, image: Tensor, k: int) -> Tensor:
    """Distances (N − 2k,) of the columns k … N−k−1, encoded in two crops k columns apart.

    image: (1, 3, H, N·f); both crops are N − k columns wide.
    """
    pixels = k * tokenizer.config.f
    here = tokenizer.encode(image[..., :-pixels])[0]  # columns 0 … N−k−1
    there = tokenizer.encode(image[..., pixels:])[0]  # columns k … N−1
    return distance(here[k:], there[:-k], tokenizer.latent_std)


def print_shift_test(tokenizer: Tokenizer, image: Tensor, shifts: tuple[int, ...]) -> None:
    """The table of all shifts, and what its numbers are to be compared with."""
    tokens, std = tokenizer.encode(image)[0], tokenizer.latent_std
    n = len(tokens)
    found = {k: shift_test(tokenizer, image, k).tolist() for k in shifts if n - 2 * k >= 1
             and n - k >= 2}
    if not found:
        print(f"no shift test: the picture has {n} columns, too few for a shift of {min(shifts)}")
        return
    print("shift test: distance between a column's tokens from two crops that are k columns "
          "apart\n\ncolumn" + "".join(f"  k = {k:<3}" for k in found))
    for i in range(n):
        cells = [f"{found[k][i - k]:7.3f}" if k <= i < n - k else " " * 7 for k in found]
        if any(c.strip() for c in cells):
            print(f"{i:6}" + "".join(f"  {c}" for c in cells))
    print("\nmedian" + "".join(f"  {np.median(v):7.3f}" for v in found.values()))
    apart = [distance(tokens[i], tokens[j], std).item() for i in range(n) for j in range(i)]
    neighbours = distance(tokens[1:], tokens[:-1], std)
    noise = (noise_variance(tokenizer.config.noise) / std.square()).mean().sqrt().item()
    print(f"\nto compare: {neighbours.median().item():.3f} between neighbouring columns (median)\n"
          f"            {np.median(apart):.3f} between any two columns of this picture (median)\n"
          f"            {math.sqrt(2):.3f} between two random tokens (expected)\n"
          f"            {noise:.3f} from the noise of tokens in training (root mean square)\n"
          "(root mean square over the channels, each in units of its standard deviation over the "
          "training set)")


def save_animation(frames: Tensor, path: Path, milliseconds: int) -> None:
    """Frames (n, 3, H, W) as .webp or .gif, the last one held for longer."""
    pictures = [Image.fromarray(p) for p in to_uint8(frames)]
    durations = [milliseconds] * (len(pictures) - 1) + [8 * milliseconds]
    options = {"lossless": True} if path.suffix.lower() == ".webp" else {}
    with replacing(path) as file:
        pictures[0].save(file, format=path.suffix[1:].upper(), save_all=True, loop=0,
                         append_images=pictures[1:], duration=durations, **options)


def main(argv: list[str] | None = None) -> None:
    cfg = parse("equimini.show tokens", __doc__, TokensConfig(), argv)
    out, animation = Path(cfg.out), Path(cfg.animation)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {cfg.out}")
    if cfg.animation and animation.suffix.lower() not in (".webp", ".gif"):
        raise UserError(f"--animation must end in .webp or .gif, got {cfg.animation}")
    for path in (out, animation):
        output_folder(path.parent)
    device = pick_device(cfg.device)
    tokenizer = load_any_tokenizer(cfg.checkpoint, device)
    check_statistics(tokenizer, cfg.checkpoint)
    if tokenizer.config.layout != "columns":
        raise UserError(f"{cfg.checkpoint} makes no columns that could be shown (its layout is "
                        f"{tokenizer.config.layout})")
    shape = tokenizer.config
    image = load_columns(cfg.image, shape.image_size, shape.f).to(device)
    with torch.no_grad():
        tokens = tokenizer.encode(image)
        frames = reveal(tokenizer, tokens, cfg.seed)
        n = tokens.shape[1]
        shown = sorted({round(i * n / (cfg.pictures - 1)) for i in range(cfg.pictures)})
        across = max(1, 1600 // image.shape[3])
        rows = [shown[i:i + across] for i in range(0, len(shown), across)]
        labels = [f"{row[0]} … {row[-1]} of {n} tokens" for row in rows]
        save_png(grid([frames[row] for row in rows] + [image], [*labels, "original"]), out)
        print(f"{n} tokens revealed one by one: {out}")
        if cfg.animation:
            save_animation(frames, animation, cfg.milliseconds)
            print(f"the same, moving: {animation}")
        print_shift_test(tokenizer, image, cfg.shifts)
