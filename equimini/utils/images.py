"""Tensors to pictures: PNG files, and labelled grids."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from equimini.utils.errors import UserError, first_line
from equimini.utils.files import replacing


def to_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] (clipped) to uint8, on the CPU."""
    return ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [−1, 1] (clipped) to (B, H, W, 3) uint8."""
    return to_pixels(images).permute(0, 2, 3, 1).numpy()


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


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # what puts a picture of this EXIF orientation upright
DEPTHS = (8, 10, 12, 16, 24, 32)  # bits of a value


def read_rgb(path: Path | str | BinaryIO, side: int | None = None) -> Image.Image:
    """Read a picture as RGB, upright, its first frame; transparent pixels are put on white.

    side: pixels that are enough for both sides, which lets a JPEG be decoded smaller.  Values of
    more than 8 bits, and floating-point numbers, are scaled by the range that they fit into.
    Raises OSError, ValueError or Pillow's own errors for a file that is no readable image.
    """
    with Image.open(path, formats=_formats()) as opened:
        if side:
            opened.draft("RGB", (side, side))
        image = upright(opened)
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_bytes(np.asarray(image)))
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")


@functools.cache
def _formats() -> list[str]:
    """All that Pillow reads; the usual ones first, since it tries them in turn."""
    Image.init()
    return sorted(Image.ID, key=lambda name: name not in ("JPEG", "PNG", "WEBP"))


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says; other tags, however odd, do not matter."""
    image.load()  # a PNG's EXIF data may stand at its end
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # EXIF data that Pillow cannot read tells no orientation
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels of many bits, or floating-point, as uint8; the first of DEPTHS that fits is theirs.

    Floating-point ones are 0…1 if no value exceeds 2 (some are a little above 1).
    """
    if not np.isfinite(pixels).all():
        raise ValueError("it holds NaN or infinity")
    top = float(pixels.max())
    depth = next((d for d in DEPTHS if top < 2**d), DEPTHS[-1])
    if pixels.dtype.kind == "f":
        pixels = (pixels * (255 / (1 if top <= 2 else 2**depth - 1))).round()
    else:
        pixels = pixels.astype(np.int64) >> (depth - 8)
    return pixels.clip(0, 255).astype(np.uint8)


def scale_to_fit(image: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """Scale so that a (height, width) crop just fits; width None: to `height` exactly."""
    scale = height / image.height
    if width is not None:
        scale = max(scale, width / image.width)
    size = max(round(image.width * scale), width or 1), max(round(image.height * scale), height)
    return image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image


def load_image(path: Path | str, height: int, width: int | None = None) -> Image.Image:
    """An RGB picture, scaled so that a (height, width) crop just fits; width None: to `height`."""
    return scale_to_fit(read_rgb(path, 4 * max(height, width or 0)), height, width)


def load_columns(path: Path | str, height: int, f: int, keep: str = "middle") -> Tensor:
    """A picture file as (1, 3, height, N·f) in [−1, 1]: N whole columns of f pixels.

    keep: which side of it stays where the rest is no column: left, middle or right.  Raises
    UserError for a file that is no picture, or narrower than two columns.
    """
    try:
        pixels = torch.from_numpy(np.array(load_image(path, height)))  # (height, W, 3)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"{printable(path) or 'nothing'} cannot be read as a picture: "
                        f"{first_line(error)}") from None
    n, rest = divmod(pixels.shape[1], f)
    if n < 2:
        raise UserError(f"{printable(path)} is too narrow: scaled to a height of {height} pixels "
                        f"it must have at least 2 columns ({2 * f} pixels), got {pixels.shape[1]}")
    left = {"left": 0, "middle": rest // 2, "right": rest}[keep]
    return to_float(pixels[:, left:left + n * f].permute(2, 0, 1)[None])


def printable(path: Path | str) -> str:
    """A file's name as text that any terminal takes, on one line."""
    shown = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in shown)


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 to float32 −1…1."""
    return images.float() / 127.5 - 1
