"""What machine and which versions a measurement was made with."""

from __future__ import annotations

import platform

import torch

from equimini.attention import implementation


def machine(device: str) -> str:
    name = (torch.cuda.get_device_name() if device == "cuda" else
            f"{processor()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}")
    return (f"{name}; attention by {implementation(device)}; torch {torch.__version__}, "
            f"Python {platform.python_version()}")


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
