"""What benchmarks share: medians after a warm-up, processes of their own, memory, bandwidth."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from equimini.utils.machine import seconds


def median_seconds(run: Callable[[], object], device: str, budget: float = 1.0,
                   kernels: bool = False) -> float:
    """Median time of `run` after a warm-up: 5 to 100 repeats, about `budget` seconds of them.

    kernels: on a GPU the time of its kernels alone, without the calls, from empty caches.
    """
    before = _quiet_gpu() if kernels and device == "cuda" else lambda: None

    def once() -> float:
        before()
        return seconds(run, device)

    warm = [once() for _ in range(3)]
    repeats = max(5, min(100, int(budget / max(warm[-1], 1e-9))))
    return statistics.median(once() for _ in range(repeats))


def replayed_seconds(calls: list[Callable[[], object]], repeats: int = 20,
                     side: torch.cuda.Stream | None = None) -> float:
    """Median time of one of `calls` on a GPU, all recorded in one CUDA graph and replayed.

    Without the launches that single calls of a few microseconds would measure.  Each call has
    inputs of its own, so that a cache holds none of them where together they are large.  side: the
    stream to record on, that of their forward passes where the calls are backward.
    """
    side = side or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated at first calls
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(seconds(graph.replay, "cuda") for _ in range(repeats)) / len(calls)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function, called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory() -> int:
    """The largest resident size that this process had, in bytes."""
    try:  # getrusage's number starts at that of the process that began this one
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _quiet_gpu() -> Callable[[], None]:
    """What empties the GPU's cache, and holds it for a millisecond in which calls are made."""
    memory = torch.empty(2**28, dtype=torch.uint8, device="cuda")

    def hold() -> None:
        memory.fill_(0)
        torch.cuda._sleep(2_000_000)
    return hold


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, counting what is read and what is written."""
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, kernels=True)
