"""Tensors to pictures: PNG files, and labelled grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from equimini.files import replacing


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [−1, 1] (clipped) to (B, H, W, 3) uint8."""
    x = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def save_png(image: np.ndarray | Image.Image, path: Path | str) -> None:
    """Write a picture under a temporary name, then rename it, so that it is never half there."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(path) as file:
        picture.save(file, format="PNG")


def grid(rows: list[Tensor], labels: list[str] | None = None, gap: int = 2) -> Image.Image:
    """A white sheet with one row of pictures for each (n, 3, H, W) tensor of `rows`.

    Rows may differ in length and size; labels stand in a margin on the left.
    """
    font = ImageFont.load_default(size=12)
    names = [clean_label(label) for label in labels or []]
    margin = int(max((font.getlength(name) for name in names), default=-8)) + 8
    sizes = [(len(r), r.shape[2], r.shape[3]) for r in rows]
    width = margin + max(n * (w + gap) for n, _, w in sizes) + gap
    sheet = Image.new("RGB", (width, sum(h + gap for _, h, _ in sizes) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for i, (row, (_, h, w)) in enumerate(zip(rows, sizes)):
        if names:
            draw.text((4, y + h / 2), names[i], fill="black", font=font, anchor="lm")
        for j, picture in enumerate(to_uint8(row)):
            sheet.paste(Image.fromarray(picture), (margin + gap + j * (w + gap), y))
        y += h + gap
    return sheet


def clean_label(text: str, longest: int = 24) -> str:
    """A label that fits on one line: control characters replaced, long ones cut."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= longest else shown[:longest - 1] + "…"
