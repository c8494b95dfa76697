"""Randomness as a function of a key.

Every draw is keyed by what it is for, (seed, purpose, step, place in the batch, …), instead of
being taken from one running stream.  So it does not depend on the batch it is drawn in, on the
number of processes, or on whether the run was interrupted.
"""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

FEW = 2**18  # numbers that one thread draws within a few milliseconds
MOST_THREADS = 8


def rng(purpose: str, *key: int) -> np.random.Generator:
    """A fresh generator for this purpose and key (non-negative integers)."""
    words = [zlib.crc32(purpose.encode()), *key]
    if max(words) < 2**32:  # an array is taken in half the time; larger numbers are several words
        words = np.array(words, np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(shape: tuple[int, ...], rngs: list[np.random.Generator]) -> Tensor:
    """Standard normal (len(rngs), *shape), float32; row i drawn from rngs[i] alone."""
    return _rows(np.random.Generator.standard_normal, shape, rngs)


def uniform(shape: tuple[int, ...], rngs: list[np.random.Generator]) -> Tensor:
    """Uniform in [0, 1), (len(rngs), *shape), float32; row i drawn from rngs[i] alone."""
    return _rows(np.random.Generator.random, shape, rngs)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rows(draw: Callable[..., Any], shape: tuple[int, ...],
          rngs: list[np.random.Generator]) -> Tensor:
    """Rows filled by `draw`; many numbers by several threads (numpy lets them run side by side)."""
    out = np.empty((len(rngs), *shape), np.float32)
    threads = min(cores(), MOST_THREADS, len(rngs)) if out.size > FEW else 1

    def fill(first: int) -> None:
        for i in range(first, len(rngs), threads):
            draw(rngs[i], dtype=np.float32, out=out[i:i + 1])

    if threads == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(threads)))
    return torch.from_numpy(out)


def seed_torch(*key: int) -> None:
    """Seed torch's global streams (dropout masks) from a key."""
    torch.manual_seed(int(rng("torch", *key).integers(2**62)))
