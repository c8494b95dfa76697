"""Columns drawn one by one into a strip, and shown at once: what the page draws with.

A strip is an array of columns with the fields token (C,) float32, pixels (H, f, 3) uint8, label and
seed.  Its pixels are what was shown last: a change paints its own columns and the FADE ones on
either side, all others stay as they are, to the bit.
"""

from __future__ import annotations

from itertools import groupby, repeat
from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equimini.sampler import Stream
from equimini.sampling.edit import FADE, UNKNOWN, paste
from equimini.sampling.fit import FITTED, LOOK_AHEAD, draw_ends, ranking, reach, stream_near
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


@torch.no_grad()
def decode(model: ImageGenerator, tokens: np.ndarray) -> Tensor:
    """Tokens (N, C) to pixels (1, 3, H, N·f)."""
    x = torch.tensor(tokens, device=model.device)[None]
    x = x if len(tokens) > 1 else x.repeat(1, 2, 1)  # the decoder takes two at least
    return model.decode(x)[..., :len(tokens) * model.tokenizer.config.f].cpu()


@torch.no_grad()
def encode(model: ImageGenerator, pixels: Tensor) -> np.ndarray:
    """Pixels (1, 3, H, N·f) to tokens (N, C)."""
    tokenizer = model.tokenizer
    return tokenizer.normalize(tokenizer.encode(pixels.to(model.device)))[0].cpu().numpy()


def draw_columns(model: ImageGenerator, strip: np.ndarray, start: int, fresh: np.ndarray,
                 seeds: Sequence[int], options: SamplingOptions, fit: int = 1,
                 ring: bool = False) -> Iterator[tuple[Sequence[int], int]]:
    """Draw the columns from `start` on into fresh (B, n, C), one version a seed.

    Yields which versions have how many columns now.  Where columns are kept behind them (in a
    ring: from the beginning on), the last ones are chosen to fit, as `fit.fill_gap` does it for
    one version alone.
    """
    total, end, b = len(strip), start + fresh.shape[1], len(seeds)
    labels, tokens = torch.tensor(strip["label"]), torch.tensor(strip["token"])
    labels[labels == UNKNOWN] = labels[start]
    kept = range(end, end + min(LOOK_AHEAD, reach(model.generator.config)))
    kept = [i % total if ring else i for i in kept if ring or i < total]
    kept = [i for i in kept if not start <= i < end]
    first = max(start, end - FITTED) if kept and fit > 1 else end
    stream = stream_near(model, start, tokens.expand(b, -1, -1), labels, seeds, options)
    for label, run in groupby(range(stream.column, start), lambda i: int(labels[i])):
        stream.set_class(torch.full((b,), label))
        feed_together(stream, tokens[[*run]].expand(b, -1, -1))
    for i in range(start, first):
        stream.set_class(labels[i].expand(b))
        fresh[:, i - start] = stream.draw().cpu()
        yield range(b), i + 1 - start
    if first == end:
        return
    for k, seed in enumerate(seeds):
        drawn, weights = draw_ends(model, stream, k, labels[[*range(first, end), *kept]],
                                   end - first, tokens[kept], seed, options, fit, repeat(None), total)
        fresh[k, first - start:] = drawn[ranking(weights, seed, start)[0]].cpu()
        yield [k], end - start


@torch.no_grad()
def feed_together(stream: Stream, x: Tensor) -> None:
    """`stream.feed` for columns x (B, n, C) of one class, in one pass: equal up to rounding."""
    x = x.to(stream.device)
    before = x[:, :-1]
    if stream.column:
        before = torch.cat((stream.last[:, None], before), 1)
    if before.shape[1]:
        stream.step(before.repeat(stream.branches, 1, 1), stream.context,
                    max(0, stream.column - 1), stream.cache)
    stream.last, stream.column = x[:, -1], stream.column + x.shape[1]


def preview(model: ImageGenerator, before: np.ndarray, fresh: np.ndarray, shown: int) -> np.ndarray:
    """Pixels (H, w, 3) of columns fresh (n, C) behind a strip, from number `shown` on."""
    new = len(fresh) - shown
    tokens = np.concatenate((before["token"][-CONTEXT:], fresh))[-CONTEXT - new:]
    return to_uint8(decode(model, tokens))[0][:, -new * model.tokenizer.config.f:]


def painted(model: ImageGenerator, strip: np.ndarray, start: int, end: int,
            ring: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Places and columns of what is new, start to end, and of what it fades into, with pixels."""
    n = len(strip)
    around = min(CONTEXT, (n - end + start) // 2) if ring else CONTEXT
    places = np.arange(start - around, end + around)
    places = places % n if ring else places[(places >= 0) & (places < n)]
    near, new = strip[places], (places >= start) & (places < end)
    pixels = paste(image(near), decode(model, near["token"]), torch.from_numpy(new),
                   model.tokenizer.config.f)
    near["pixels"] = cut(pixels, model.tokenizer.config.f)
    first = int(new.argmax())
    shown = slice(max(0, first - FADE), first + end - start + FADE)
    return places[shown], near[shown]
