"""What machine and which versions a measurement was made with."""

from __future__ import annotations

import platform
import time
from typing import Callable

import torch

from equimini.attention import implementation


def machine(device: str) -> str:
    """Device, threads, kernels and versions, as a measurement names them."""
    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"{processor()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}")
    return (f"{name}; attention by {implementation(device)}; torch {torch.__version__}, "
            f"Python {platform.python_version()}")


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call; on a GPU between events before and after its kernels."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
