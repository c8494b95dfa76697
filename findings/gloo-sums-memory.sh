#!/usr/bin/env bash
# An all-reduce of tensors that differ in memory order (PyTorch, gloo)
#
# Guess: all_reduce adds tensors of one shape element by element, t[i, j] of one process to t[i,
# j] of the other. Where memory is laid out differently in two processes, it copies or raises an
# error.
#
# What happens: it adds what lies at the same place in memory. If one process holds a gradient in
# the usual order and the other the same values in channels_last, the sums are wrong with no
# error, and the two processes end up with different tensors, so that replicas drift apart from
# the first step on. Gradients take the layout of their weights; one process that keeps its
# weights in channels_last is enough. DistributedDataParallel compares strides when it is built,
# and refuses; a loop over the gradients with an all-reduce each does not. What helps: reduce
# contiguous copies.
#
# 2026-11-28: torch 2.13.0, gloo, CPU, Python 3.11, Linux. Source: found by running it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > finding.py <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRADIENT = torch.arange(12.0).view(1, 3, 2, 2)


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    plain = GRADIENT.clone()
    other = GRADIENT.clone(memory_format=torch.channels_last if rank else torch.contiguous_format)
    copy = other.clone(memory_format=torch.contiguous_format)
    for tensor in (plain, other, copy):
        dist.all_reduce(tensor)
    torch.save((plain, other, copy), f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    mp.spawn(work, (os.path.abspath("store"),), nprocs=2)
    expected = 2 * GRADIENT
    print("expected", expected.flatten().tolist())
    results = [torch.load(f"result{rank}.pt") for rank in (0, 1)]
    for rank, (plain, other, copy) in enumerate(results):
        print(f"rank {rank}: same layouts", "right" if torch.equal(plain, expected) else "wrong",
              "- contiguous copies", "right" if torch.equal(copy, expected) else "wrong",
              "- layouts that differ", other.flatten().tolist())
    (plain0, other0, copy0), (plain1, other1, copy1) = results
    right = [torch.equal(tensor, expected) for tensor in (plain0, plain1, copy0, copy1)]
    as_described = all(right) and not (torch.equal(other0, expected)
                                       or torch.equal(other1, expected)
                                       or torch.equal(other0, other1))
    print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
    sys.exit(not as_described)
PYTHON
OMP_NUM_THREADS=1 env/bin/python -W ignore finding.py
