"""The kernels apart from the operator: CUDA's with the kernel family as an argument.

`EmulatedKernels` compiles csrc/cuda with g++ (see cuda_on_cpu/cuda_runtime.h) and calls it on CPU
tensors, `GPUKernels` with nvcc and on a GPU; `CPUKernels` compiles csrc/cpu for a processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

STAND_IN = Path(__file__).parent / "cuda_on_cpu"  # headers that are found before CUDA's
CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum Dtype
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
PATHS = ("automatic", "registers", "shared memory", "tensor cores")  # in the order of enum Path


class Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((x, ctypes.c_int64) for x in ("b", "n", "h"))]


class Attention(ctypes.Structure):  # csrc/attention.h
    _fields_ = [*((x, Heads) for x in ("q", "k", "v", "grad")),
                *((x, ctypes.c_void_p) for x in ("out", "lse", "dq", "dk", "dv", "cos", "sin",
                                                 "seed")),
                *((x, ctypes.c_int64) for x in ("b", "n_q", "n_k", "h", "d", "window")),
                ("scale", ctypes.c_double), ("keep_factor", ctypes.c_double),
                ("drop_below", ctypes.c_uint32)]


class Kernels:
    """The operators' forward and backward, by one family of the kernels in a compiled library."""

    def __init__(self, library: Path, path: str = "automatic"):
        self.library = ctypes.CDLL(str(library))
        self.library.error_string.restype = ctypes.c_char_p
        self.path = path

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest):
        b, n_q, h, _ = q.shape
        sums = torch.promote_types(q.dtype, torch.float32)
        out, lse = poisoned(q, q.shape, q.dtype), poisoned(q, (b, h, n_q), sums)
        held, p = describe(q, k, v, *rest, out=out, lse=lse)
        self._call(self.library.forward, p, q.dtype)
        return out, lse

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                 *rest):
        dq, dk, dv = (poisoned(x, x.shape, x.dtype) for x in (q, k, v))
        held, p = describe(q, k, v, *rest, out=out, lse=lse, grad=grad, dq=dq, dk=dk, dv=dv)
        delta = poisoned(lse, lse.shape, torch.float32)
        self._call(self.library.backward, p, q.dtype, ctypes.c_void_p(delta.data_ptr()))
        return dq, dk, dv

    def _call(self, function, p: Attention, dtype: torch.dtype, *more) -> None:
        number = (*DTYPES, torch.float64).index(dtype)
        error = function(ctypes.byref(p), number, PATHS.index(self.path), *more)
        if error:
            raise RuntimeError(self.library.error_string(error).decode())


class EmulatedKernels(Kernels):
    """On the CPU."""

    def __init__(self, build: Path, path: str = "automatic", csrc: Path = CSRC,
                 flags: tuple[str, ...] = ("-O1",)):
        library = build / "libcuda_on_cpu.so"
        subprocess.run(["g++", "-std=c++20", *flags, "-shared", "-fPIC", "-I", str(STAND_IN),
                        "-I", str(csrc), str(STAND_IN / "library.cpp"), "-o", str(library)],
                       check=True)
        super().__init__(library, path)


class CPUKernels(Kernels):
    """Compiled for a processor, or for this one but fewer of its instructions."""

    def __init__(self, build: Path, march: str, flags: tuple[str, ...] = ("-O2",)):
        library = build / f"by_path-{march}.so"
        source = Path(__file__).parent / "by_path.cpp"
        subprocess.run(["c++", "-std=c++20", *flags, f"-march={march}", "-fno-math-errno", "-fPIC",
                        "-shared", "-I", str(CSRC), str(source), "-o", str(library)], check=True)
        super().__init__(library)


class GPUKernels(Kernels):
    """On a GPU's default stream.  The library stays in `build` for as long as its sources do."""

    def __init__(self, build: Path, architecture: str):  # "sm_90"
        source = Path(__file__).parent / "by_path.cu"
        text = b"".join(file.read_bytes()
                        for file in (source, CSRC / "attention.h", *sorted(CSRC.glob("cuda/*"))))
        library = build / f"by_path-{architecture}-{hashlib.sha256(text).hexdigest()[:12]}.so"
        if not library.exists():
            build.mkdir(parents=True, exist_ok=True)
            unfinished = library.with_suffix(f".{os.getpid()}")
            subprocess.run(["nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-shared",
                            "-Xcompiler", "-fPIC", f"-arch={architecture}", "-I", str(CSRC),
                            str(source), "-o", str(unfinished)], check=True)
            unfinished.rename(library)
        super().__init__(library)


def poisoned(like: Tensor, shape, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=like.device)


def describe(q, k, v, cos, sin, seed, window, dropout_p, scale, **tensors):
    """The struct for one call, and the tensors that it points to."""
    held = [tensors]

    def heads(x: Tensor) -> Heads:  # as binding.cpp: a copy where rows cannot be read in place
        step = 16 // x.element_size()
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(s % step for s in x.stride()[:3]):
            x = x.clone(memory_format=torch.contiguous_format)
            held.append(x)
        return Heads(x.data_ptr(), *x.stride()[:3])

    b, n_q, h, d = q.shape
    p = Attention(heads(q), heads(k), heads(v), b=b, n_q=n_q, n_k=k.shape[1], h=h, d=d,
                  window=window, scale=scale, keep_factor=1 / (1 - dropout_p),
                  drop_below=int(dropout_p * 2**32))
    if "grad" in tensors:
        p.grad = heads(tensors.pop("grad"))
    for name, x in {**tensors, "cos": cos, "sin": sin, "seed": seed}.items():
        setattr(p, name, None if x is None else x.data_ptr())
    return held, p


def sanitizers() -> list[str]:
    """The address sanitizer's library and, since Python itself has none, C++'s."""
    return [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True,
                           text=True).stdout.strip() for name in ("libasan.so", "libstdc++.so")]


def begin_under_sanitizers() -> None:
    """Start this command again with those loaded before all others, as they have to be."""
    if "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {
            **os.environ, "LD_PRELOAD": " ".join(sanitizers()), "ASAN_OPTIONS": "detect_leaks=0"})
