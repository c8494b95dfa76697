"""Tensors to pictures: PNG files, and labelled grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from equimini.utils.files import replacing


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


def read_rgb(path: Path | str, side: int | None = None) -> Image.Image:
    """Read a picture as RGB, upright, its first frame; transparent pixels are put on white.

    side: pixels that are enough for both sides, which lets a JPEG be decoded smaller.  Pictures
    of floating-point numbers are taken as 0…1 if no value exceeds 1, else as 0…255.
    Raises OSError, ValueError or Pillow's own errors for a file that is no readable image.
    """
    with Image.open(path) as opened:
        if side:
            opened.draft("RGB", (side, side))
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_bytes(np.asarray(image)))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels of 16 bits (or more, of which 16 are used), or floating-point, as uint8."""
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ValueError("it holds NaN or infinity")
        return (pixels * (255 if pixels.max() <= 1 else 1)).round().clip(0, 255).astype(np.uint8)
    pixels = pixels.astype(np.int64)
    return (pixels >> (8 if pixels.max() > 255 else 0)).clip(0, 255).astype(np.uint8)


def scale_to_fit(image: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """Scale so that a (height, width) crop just fits; width None: to `height` exactly."""
    scale = height / image.height
    if width is not None:
        scale = max(scale, width / image.width)
    size = max(round(image.width * scale), width or 1), max(round(image.height * scale), height)
    return image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image


def load_image(path: Path | str, height: int, width: int | None = None) -> Image.Image:
    """`read_rgb` and `scale_to_fit` in one."""
    return scale_to_fit(read_rgb(path, 4 * max(height, width or 0)), height, width)


def printable(path: Path | str) -> str:
    """A file's name as text that any terminal takes, on one line."""
    shown = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in shown)


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 to float32 −1…1."""
    return images.float() / 127.5 - 1
