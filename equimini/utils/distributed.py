"""Several processes, started by torchrun: who am I, where do I compute, what do we have together.

    torchrun --nproc-per-node=4 train_generator.py ...
    torchrun --nproc-per-node=4 -m equimini.evaluate generator ...

Training is data-parallel: every process holds the whole model, takes its part of each batch, and
the gradients are summed over all before the step (`sum_tensors`), which is the same on each.  This
is written out instead of hidden in DistributedDataParallel's hooks, because a step here has
gradients that no hook sees (those of the adaptive weight) and micro-batches that are summed first.
Without torchrun everything here is that of one process.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from equimini.utils.command_line import pick_device
from equimini.utils.errors import UserError, first_line

BUCKET = 2**25  # values that are sent at a time
MEETING = timedelta(minutes=5)  # within which all processes have to be there


def rank() -> int:
    """The number of this process, 0 if it is alone."""
    return _number("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are."""
    size = _number("WORLD_SIZE", 1)
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")
                   if name not in os.environ]
        if missing or _number("RANK", 0) >= size:
            wrong = f"{missing[0]} is not" if missing else f"RANK={os.environ['RANK']} is too large"
            raise UserError(f"the environment says that there are WORLD_SIZE={size} processes, but "
                            f"{wrong}; start them with torchrun, or unset WORLD_SIZE and RANK")
    return size


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
def processes(device: torch.device, patience: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Connects the processes, with NCCL between GPUs, gloo otherwise, and leaves them in the end.

    patience: how long one waits for the others before that is an error.  (A process that died is
    noticed at once: torchrun ends the rest.)  Only the main process prints to stdout.
    """
    if world_size() == 1:
        yield
        return
    store = _meeting_place()
    cuda = {"device_id": device} if device.type == "cuda" else {}
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, store=store,
                            rank=rank(), world_size=world_size(), **cuda)
    with open(os.devnull, "w") as nowhere:
        with nullcontext() if is_main() else redirect_stdout(nowhere):
            yield
    dist.destroy_process_group()  # not after an error: it would wait for the others


def _meeting_place() -> dist.Store:
    """What the processes connect through; raises UserError if they do not come."""
    try:
        return next(rendezvous("env://", rank(), world_size(), timeout=MEETING))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the {world_size()} processes of WORLD_SIZE did not meet at MASTER_ADDR="
                        f"{os.environ['MASTER_ADDR']} ({first_line(error)}); start all of them "
                        "with torchrun, or unset WORLD_SIZE and RANK") from None


def barrier() -> None:
    """Wait for all processes."""
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


def local_batch(batch_size: int, what: str = "--batch-size") -> int:
    """This process's part of a global batch; raises UserError if it cannot be shared equally."""
    if batch_size % world_size():
        raise UserError(f"{what} {batch_size} cannot be shared equally among {world_size()} "
                        f"processes; give a multiple of {world_size()}")
    return batch_size // world_size()


def sum_tensors(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes; all have the same shapes in order."""
    if world_size() == 1:
        return
    for kind in dict.fromkeys(t.dtype for t in tensors):
        bucket, size = [], 0
        of_kind = [t for t in tensors if t.dtype == kind]
        for i, tensor in enumerate(of_kind):
            bucket, size = [*bucket, tensor], size + tensor.numel()
            if size >= BUCKET or i + 1 == len(of_kind):
                flat = torch.cat([t.flatten() for t in bucket])
                dist.all_reduce(flat)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                    t.copy_(part.view_as(t))
                bucket, size = [], 0


def largest(x: Tensor) -> Tensor:
    """The largest of all processes' values, element by element, on x's device."""
    if world_size() == 1:
        return x
    sent = sendable(x.clone())
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return sent.to(x.device)


def copy_from_main(*modules: nn.Module) -> None:
    """Every process takes the main one's parameters and buffers."""
    if world_size() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)


def sendable(x: Tensor) -> Tensor:
    """x where the processes can exchange it: NCCL knows GPUs only."""
    return x.cuda() if world_size() > 1 and dist.get_backend() == "nccl" else x


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name}, which torchrun sets, must be a whole "
                        f"number, got {text!r}")
    return int(text)
