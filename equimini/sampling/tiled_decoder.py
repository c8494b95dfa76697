"""Decoding long pictures on overlapping windows of columns, in constant memory.

The decoder's GroupNorm and attention span the whole width, so a picture cannot be decoded column
by column, nor a very long one at once.  Here it sees a window of `length` columns, then one that
begins `length − overlap` columns further right, and so on:

    window k      ├─────────────────┼ d ┼── fade ──┼ d ┤
    window k+1                      ├ d ┼── fade ──┼ d ┼─────────────────┤

Of an overlap, the outer `discard` columns on either side are thrown away (a convolution near the
border of its window sees reflections in place of neighbours), and over the rest one window is
faded into the next.  The last window ends with the picture and begins as much earlier as it must.
docs/sampling.md measures lengths and overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Sizes in columns.  Raises ValueError for sizes that leave nothing between the overlaps."""

    length: int
    overlap: int
    discard: int

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.discard <= self.overlap <= self.length // 2 or self.length < 2:
            raise ValueError("windows must have 0 <= 2*discard <= overlap <= length/2, got length "
                             f"{self.length}, overlap {self.overlap}, discard {self.discard}")

    @property
    def stride(self) -> int:
        return self.length - self.overlap

    def fade(self, f: int) -> Tensor:
        """Weights of the new window over the fade, (fade columns · f,): a rising half cosine."""
        n = (self.overlap - 2 * self.discard) * f
        return (1 - torch.cos((torch.arange(n) + 0.5) * (math.pi / max(n, 1)))) / 2


class TiledDecoder:
    """Tokens in, from left to right; pixels out, as soon as they are final.

    decode: tokens (B, n, C) to pixels (B, 3, H, n·f).  Kept are at most one window of tokens and
    one overlap of pixels, however long the picture is.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], f: int, windows: Windows) -> None:
        self.decode, self.f, self.windows = decode, f, windows
        self.columns = 0  # pushed so far
        self.start = 0  # first column of the next window
        self.tokens: Tensor | None = None  # (B, n, C), the last ones
        self.tail: Tensor | None = None  # pixels of the window before, from the fade to its end

    def state(self) -> dict[str, Any]:
        """What a new decoder needs (as attributes) to continue from here."""
        return {name: getattr(self, name) for name in ("columns", "start", "tokens", "tail")}

    def push(self, tokens: Tensor) -> Iterator[Tensor]:
        """Add columns (B, n, C); yields the pixels (B, 3, H, w) that become final, in order."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        self.columns += tokens.shape[1]
        while self.columns >= self.start + self.windows.length:
            pixels = self._window(self.start)
            kept = (self.windows.overlap - self.windows.discard) * self.f
            self.tail = pixels[..., pixels.shape[-1] - kept:].clone()  # a slice would hold it all
            self.start += self.windows.stride
            yield pixels[..., :pixels.shape[-1] - kept]
        first = max(0, min(self.start, self.columns - self.windows.length))
        self.tokens = self.tokens[:, first - self.columns:].clone()

    def finish(self) -> Tensor:
        """The rest, up to the last column pushed."""
        if self.tail is None:  # shorter than one window
            return self.decode(self.tokens)
        if self.columns == self.start + self.windows.overlap:  # the last window ended here
            return self.tail
        return self._window(self.columns - self.windows.length)

    def _window(self, first: int) -> Tensor:
        """The window from column `first` on, faded into the one before: from there to its end."""
        here = first - self.columns + self.tokens.shape[1]
        pixels = self.decode(self.tokens[:, here:here + self.windows.length])
        if self.tail is None:
            return pixels
        pixels = pixels[..., (self.start + self.windows.discard - first) * self.f:]
        weight = self.windows.fade(self.f).to(pixels)
        n = len(weight)
        return torch.cat((torch.lerp(self.tail[..., :n], pixels[..., :n], weight),
                          pixels[..., n:]), -1)


def decode_windows(decode: Callable[[Tensor], Tensor], tokens: Tensor, f: int,
                   windows: Windows) -> Tensor:
    """Tokens (B, N, C) to pixels (B, 3, H, N·f), window by window.

    Equal to decode(tokens) where N is at most one window, or where decode is local and `discard`
    covers its reach.
    """
    decoder = TiledDecoder(decode, f, windows)
    return torch.cat((*decoder.push(tokens), decoder.finish()), -1)
