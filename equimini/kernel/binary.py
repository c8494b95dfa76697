"""The compiled kernels, where there are any: importing this adds them to the operators.

`equimini._kernels` is built from csrc/ by setup.py, where there is a compiler: C++ for CPUs and
CUDA for NVIDIA GPUs.  EQUIMINI_ATTENTION=reference in the environment leaves it out.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import torch

from equimini.kernel import operators


def implementation(device: torch.device | str = "cpu") -> str:
    """Which code attends on this device: "C++", "CUDA", or "reference" (plain PyTorch)."""
    name = torch.device(device).type
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(
        operators.FORWARD, name.upper()) if name in ("cpu", "cuda") else False
    return {"cpu": "C++", "cuda": "CUDA"}[name] if compiled else "reference"


def why_reference(device: torch.device | str = "cpu") -> str:
    """Why plain PyTorch attends on this device; empty where it does not."""
    name = torch.device(device).type
    if implementation(device) != "reference":
        return ""
    return _WHY_NOT if name in ("cpu", "cuda") else f"there are no compiled kernels for {name}"


def _load_kernels() -> str:
    """Add the compiled kernels to the operators; why there are none, where there are not."""
    choice = os.environ.get("EQUIMINI_ATTENTION", "")
    if choice not in ("", "reference"):
        raise ValueError(f"EQUIMINI_ATTENTION must be unset or 'reference', got {choice!r}")
    if choice == "reference":
        return "EQUIMINI_ATTENTION=reference is set"
    if importlib.util.find_spec("equimini._kernels") is None:
        others = [file.name for file in Path(__file__).parents[1].glob("_kernels.*")]
        if not others:
            return "equimini was installed without compiled kernels"
        why = f"{others[0]} is for another Python"
    else:
        try:
            kernels = importlib.import_module("equimini._kernels")
        except ImportError as error:
            raise ImportError(
                f"the compiled attention kernels are present but do not load: {error}. They may "
                "have been built for another torch: reinstall equimini, or set "
                "EQUIMINI_ATTENTION=reference to do without them.") from error
        if not kernels.missing:
            return "" if kernels.gpus else "the kernels were built without CUDA"
        why = (f"the kernels were compiled with -march={kernels.march}, and this processor has "
               f"no {kernels.missing}")
    warnings.warn(f"attention runs as slow plain PyTorch: {why}; install equimini again here")
    return why


_WHY_NOT = _load_kernels()  # in C++ or CUDA
