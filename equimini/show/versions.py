"""What a bug report needs: versions, processor, GPU, and which code attends on each device.

    python -m equimini.show versions
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Iterator

import torch

from equimini import __version__
from equimini.attention import implementation, why_reference
from equimini.sampling import few_rows
from equimini.utils.command_line import command
from equimini.utils.machine import processor


def lines() -> Iterator[str]:
    """What a report of a fault should say of the machine and what is installed."""
    yield f"equimini: {__version__}"
    yield f"Python: {platform.python_version()}, {platform.platform()}"
    cuda = torch.version.cuda and f"built with CUDA {torch.version.cuda}"
    yield f"torch: {torch.__version__}, {cuda or 'built without CUDA'}"
    yield "; ".join(f"{name}: {installed(name)}" for name in ("numpy", "pillow", "matplotlib"))
    yield (f"processor: {processor()}, {torch.get_num_threads()} threads, torch uses "
           f"{torch.backends.cpu.get_cpu_capability()}")
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    yield from [f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
                for i in gpus] or ["GPU: torch sees none"]
    for device in ("cpu", "cuda"):
        why = why_reference(device)
        yield f"attention on {device}: {implementation(device)}{f' ({why})' if why else ''}"
    yield f"sampling on cpu: {'C++' if few_rows.compiled() else 'oneDNN, or plain PyTorch'}"
    if kernels := sys.modules.get("equimini._kernels"):
        gpus = kernels.gpus and f" and GPUs of compute capability {kernels.gpus.replace('/', ', ')}"
        yield f"compiled kernels: {kernels.__file__}, for -march={kernels.march}{gpus}"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(argv: list[str]) -> None:
    command("equimini.show versions", __doc__).parse_args(argv)
    print("\n".join(lines()))
