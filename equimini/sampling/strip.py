"""Columns drawn one by one into a strip, and shown at once: what the page draws with.

A strip is an array of columns with the fields token (C,) float32, pixels (H, f, 3) uint8, label and
seed.  Its pixels are what was shown last: a change paints its own columns and the FADE ones on
either side, all others stay as they are, to the bit.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equimini.sampling.edit import FADE, UNKNOWN, paste
from equimini.sampling.fit import fill_gap
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.utils.images import to_float, to_uint8

CONTEXT = 16  # columns that are decoded on either side of what is shown


def row_type(model: ImageGenerator) -> np.dtype:
    """What is known of a column."""
    shape = model.tokenizer.config
    return np.dtype([("token", "<f4", shape.token_channels),
                     ("pixels", "u1", (shape.image_size, shape.f, 3)),
                     ("label", "<i8"), ("seed", "<i8")])


def flat(strip: np.ndarray) -> np.ndarray:
    """A strip's pixels (H, N·f, 3)."""
    n, height, f, _ = strip["pixels"].shape
    return strip["pixels"].transpose(1, 0, 2, 3).reshape(height, n * f, 3)


def image(strip: np.ndarray) -> Tensor:
    """The same as (1, 3, H, N·f) in [−1, 1]."""
    return to_float(torch.tensor(flat(strip)).permute(2, 0, 1)[None])


def cut(pixels: Tensor, f: int) -> np.ndarray:
    """Pixels (1, 3, H, N·f) in [−1, 1] to those of N columns, (N, H, f, 3)."""
    return np.stack(np.split(to_uint8(pixels)[0], pixels.shape[3] // f, 1))


def decode(model: ImageGenerator, tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) to pixels (B, 3, H, N·f), on the CPU; also of one column alone."""
    n = tokens.shape[1]
    x = tokens if n > 1 else tokens.repeat(1, 2, 1)  # the decoder takes two at least
    return model.decode(x.to(model.device))[..., :n * model.tokenizer.config.f].cpu()


def encode(model: ImageGenerator, strip: np.ndarray) -> np.ndarray:
    """The tokens (N, C) of a strip's pixels."""
    return model.encode(image(strip))[0].cpu().numpy()


def mirrored(strip: np.ndarray) -> np.ndarray:
    """A strip seen in a mirror; its tokens are those of the other side still."""
    strip = strip[::-1].copy()
    strip["pixels"] = strip["pixels"][:, :, ::-1]
    return strip


def fill(model: ImageGenerator, strip: np.ndarray, gap: range, seeds: Sequence[int],
         options: SamplingOptions, fit: int, ring: bool) -> tuple[Tensor, Iterator]:
    """Tokens (B, N, C) of a strip, one version a seed, and what draws a gap into them (`fill_gap`).

    Columns of no class count as of the gap's first one.
    """
    labels = torch.tensor(strip["label"])
    labels[labels == UNKNOWN] = labels[gap.start]
    tokens = torch.tensor(strip["token"]).repeat(len(seeds), 1, 1)
    tokens[:, gap.start:gap.stop] = torch.nan
    return tokens, fill_gap(model, tokens, labels, gap, seeds, options, fit, ring)


def preview(model: ImageGenerator, tokens: Tensor, start: int, end: int) -> np.ndarray:
    """Pixels (B, H, w, 3) of columns start to end of tokens (B, N, C), not seeing their right."""
    first = max(0, start - CONTEXT)
    pixels = to_uint8(decode(model, tokens[:, first:end]))
    return pixels[:, :, (start - first) * model.tokenizer.config.f:]


def painted(model: ImageGenerator, strip: np.ndarray, start: int, end: int,
            ring: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Places and columns of what is new, start to end, and of what it fades into, with pixels."""
    n = len(strip)
    around = min(CONTEXT, (n - end + start) // 2) if ring else CONTEXT
    places = np.arange(start - around, end + around)
    places = places % n if ring else places[(places >= 0) & (places < n)]
    near, new = strip[places], (places >= start) & (places < end)
    pixels = paste(image(near), decode(model, torch.tensor(near["token"])[None]),
                   torch.from_numpy(new), model.tokenizer.config.f)
    near["pixels"] = cut(pixels, model.tokenizer.config.f)
    first = int(new.argmax())
    shown = slice(max(0, first - FADE), first + end - start + FADE)
    return places[shown], near[shown]
