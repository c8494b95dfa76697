"""Randomness as a function of a key.

Every draw is keyed by what it is for, (seed, purpose, step, place in the batch, …), instead of
being taken from one running stream.  So it does not depend on the batch it is drawn in, on the
number of processes, or on whether the run was interrupted.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def rng(purpose: str, *key: int) -> np.random.Generator:
    """A fresh generator for this purpose and key (non-negative integers)."""
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
    return np.random.Generator(np.random.Philox(sequence))


def normal(shape: tuple[int, ...], rngs: list[np.random.Generator]) -> Tensor:
    """Standard normal (len(rngs), *shape), float32; row i drawn from rngs[i] alone."""
    rows = [r.standard_normal(shape, dtype=np.float32) for r in rngs]
    return torch.from_numpy(np.stack(rows))


def uniform(shape: tuple[int, ...], rngs: list[np.random.Generator]) -> Tensor:
    """Uniform in [0, 1), (len(rngs), *shape), float32; row i drawn from rngs[i] alone."""
    return torch.from_numpy(np.stack([r.random(shape, dtype=np.float32) for r in rngs]))


def seed_torch(*key: int) -> None:
    """Seed torch's global streams (dropout masks) from a key."""
    torch.manual_seed(int(rng("torch", *key).integers(2**62)))
