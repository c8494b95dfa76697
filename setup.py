"""Builds equimini._kernels, the compiled attention kernels; everything else is plain Python.

    pip install --no-build-isolation -e .

builds against the torch that is installed: C++ where there is a compiler (on Linux), CUDA too
where torch is a CUDA build and a toolkit that fits it is found (CUDA_HOME), GPU or no GPU in the
machine.  With no compiler, or where the build cannot see torch (build isolation), equimini
installs as plain Python and attention runs as the PyTorch reference.  Environment:

    EQUIMINI_BUILD       none: plain Python · cpu: C++ alone · cuda: C++ and CUDA.  What is asked
                         for and impossible is an error; unset, the above is found out.
    EQUIMINI_MARCH       processor to compile for (-march), "native" unless set
    TORCH_CUDA_ARCH_LIST GPUs to compile for, "8.0;9.0+PTX" unless set; older ones are left out
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup


def build_choice() -> str:
    """What to build: "none", "cpu" or "cuda"; says why where it is less than asked."""
    choice = os.environ.get("EQUIMINI_BUILD", "")
    if choice not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"EQUIMINI_BUILD must be none, cpu or cuda, got {choice!r}")
    if choice == "none":
        return "none"
    try:
        import torch
    except ImportError:
        return without_kernels(choice, "torch is not visible to the build; install it first and "
                                       "build with pip's --no-build-isolation")
    if not choice and not sys.platform.startswith("linux"):
        return without_kernels(choice, "its flags were tried on Linux alone; EQUIMINI_BUILD=cpu "
                                       "tries elsewhere")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return without_kernels(choice, f"there is no C++ compiler ({compiler!r})")
    if choice == "cpu" or (not choice and torch.version.cuda is None):
        return "cpu"
    missing = missing_for_cuda(torch.version.cuda, compiler)
    if choice and missing:
        raise SystemExit(f"EQUIMINI_BUILD=cuda, but {missing}")
    if missing:
        say(f"installing without CUDA attention kernels: {missing}.")
    return "cpu" if missing else "cuda"


def architectures() -> "list[str]":
    """The GPUs to compile for that the kernels can run on: compute capability 8.0 or newer."""
    older = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"
    names = listed.replace(";", " ").replace(",", " ").split()
    return [name for name in names if not name.startswith(older)
            and not (name[0].isdigit() and float(re.match(r"[0-9.]+", name)[0]) < 8)]


def missing_for_cuda(version: "str | None", compiler: str) -> str:
    """What keeps CUDA kernels from being built for a torch of this CUDA version, or nothing."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if version is None:
        return "the torch that is installed is built without CUDA"
    if not architectures():
        return "TORCH_CUDA_ARCH_LIST names no GPU of compute capability 8.0 or newer"
    if home is None:
        return "no CUDA toolkit is found (nvcc, or the environment variable CUDA_HOME)"
    folders = [*cpp_extension.include_paths("cuda"), os.path.join(home, "include"),
               *glob(os.path.join(home, "targets", "*", "include"))]
    if not any(os.path.exists(os.path.join(folder, "cuda_runtime.h")) for folder in folders):
        return f"the CUDA toolkit in {home} has no headers; set CUDA_HOME to one that has"
    check = getattr(cpp_extension, "_check_cuda_version", None)  # not public: it may go
    try:  # what torch would only find out while it builds: nvcc's version, and the compiler's
        if check:
            check(compiler, cpp_extension.get_compiler_abi_compatibility_and_version(compiler)[1])
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the CUDA toolkit in {home} has no nvcc that runs ({error})"
    except RuntimeError as error:
        why = " ".join(str(error).split("Please")[0].split()).rstrip(".")
        return f"{why}; set CUDA_HOME or CXX to one that fits"
    return ""


def without_kernels(choice: str, why: str) -> str:
    if choice:
        raise SystemExit(f"EQUIMINI_BUILD={choice}, but {why}")
    say(f"installing without compiled attention kernels: {why}.")
    return "none"


def say(text: str) -> None:
    """Print a line of the installation."""
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip asks for metadata first: say it once
        print(f"equimini: {text}")


def extension(choice: str) -> dict:
    """setup()'s arguments for the extension module."""
    if choice == "none":
        return {}
    from torch.utils import cpp_extension

    flags = ["-O3", f"-march={os.environ.get('EQUIMINI_MARCH', 'native')}",
             "-fno-math-errno", "-fvisibility=hidden", "-fopenmp"]
    sources, kind = ["csrc/binding.cpp", "csrc/cpu/attention.cpp"], cpp_extension.CppExtension
    macros = []
    if choice == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())
        sources, kind = sources + ["csrc/cuda/attention.cu"], cpp_extension.CUDAExtension
        macros = [("WITH_CUDA", None)]
    module = kind("equimini._kernels", sources, define_macros=macros,
                  include_dirs=[os.path.abspath("csrc")],
                  depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True),
                  extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
                  extra_link_args=["-fopenmp"] if is_clang() else [])  # GCC's is torch's own
    return {"ext_modules": [module],
            "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def is_clang() -> bool:
    """Whether the C++ compiler is Clang, under whatever name."""
    told = subprocess.run([*os.environ.get("CXX", "c++").split(), "--version"],
                          capture_output=True, text=True)
    return "clang" in told.stdout


setup(**extension(build_choice()))
