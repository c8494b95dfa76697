"""Several processes, started by torchrun: who am I, where do I compute, wait for the others.

    torchrun --nproc-per-node=4 -m equimini.evaluate generator ...

Without torchrun everything here is that of one process.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed as dist

from equimini.cli import UserError, pick_device


def rank() -> int:
    """This process's number, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this is the process that prints and writes reports."""
    return rank() == 0


def local_device(name: str) -> torch.device:
    """The device for --device; of several processes with CUDA, each takes a GPU of its own."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and world_size() > 1:
        return pick_device(f"cuda:{_number('LOCAL_RANK', 0)}")
    return device


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Connects the processes, with NCCL between GPUs, gloo otherwise, and leaves them in the end.

    Waiting has no practical limit: a main process may compute for long while the others wait.
    """
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does the block alone, then the others (a download, a file to create)."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name}, which torchrun sets, must be a whole "
                        f"number, got {text!r}")
    return int(text)
