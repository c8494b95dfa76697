"""Batches of a data set: their order is a function of the step alone."""

from __future__ import annotations

from typing import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from equimini.noise import rng
from equimini.training.options import RunConfig
from equimini.utils import distributed
from equimini.utils.signals import leave_signals


class Batches:
    """Batch sampler whose order is a function of (seed, step): each epoch a new permutation.

    Yields, for each step from `start` to `stop` − 1, the (epoch, index) pairs of this process's
    local batch; a batch that crosses the end of an epoch is completed from the next.
    """

    def __init__(self, n: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)
        local = distributed.local_batch(self.batch_size)
        for step in range(self.start, self.stop):
            batch, first = [], step * self.batch_size + distributed.rank() * local
            for place in range(first, first + local):
                if place // self.n != epoch:
                    epoch = place // self.n
                    order = rng("order", self.seed, epoch).permutation(self.n)
                batch.append((epoch, int(order[place % self.n])))
            yield batch


def training_loader(data: Dataset, batch_size: int, run: RunConfig, start: int,
                    stop: int, pinned: bool = False) -> DataLoader:
    """Batches (images uint8 (B, 3, H, W), labels (B,), indices (B,)) of steps start … stop−1.

    Of several processes each gets a local batch: B is batch_size / processes.  pinned: in memory
    from which a GPU copies while it computes.
    """
    sampler = Batches(len(data), batch_size, run.seed, start, stop)
    return DataLoader(data, batch_sampler=sampler, num_workers=run.workers,
                      worker_init_fn=leave_signals, pin_memory=pinned)


def fixed_loader(data: Dataset, batch_size: int, count: int, workers: int = 0,
                 seed: int = 0, shared: bool = False) -> DataLoader:
    """The same `count` random items (at most all), in the same order, every time.

    shared: of several processes each gets a part of them; else each gets all.
    """
    order = rng("subset", seed).permutation(len(data))[:count]
    if shared:
        order = order[distributed.rank()::distributed.world_size()]
    keys = [(0, int(i)) for i in order]
    return DataLoader(data, batch_size=batch_size, sampler=keys, num_workers=workers,
                      worker_init_fn=leave_signals)
