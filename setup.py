"""Builds equimini._kernels, the compiled attention kernels; everything else is plain Python.

    pip install --no-build-isolation -e .

builds against the torch that is installed: C++ wherever there is a compiler, CUDA too where
torch is a CUDA build and its nvcc is found (CUDA_HOME), GPU or no GPU in the machine.  With no
compiler, or where the build cannot see torch (build isolation), equimini installs as plain
Python and attention runs as the PyTorch reference.  Environment:

    EQUIMINI_BUILD       none: plain Python · cpu: C++ alone · cuda: C++ and CUDA.  What is asked
                         for and impossible is an error; unset, the above is found out.
    EQUIMINI_MARCH       processor to compile for (-march), "native" unless set
    TORCH_CUDA_ARCH_LIST GPUs to compile for, "8.0;9.0+PTX" unless set
"""

import os
import shutil
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
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return without_kernels(choice, "torch is not visible to the build; install it first and "
                                       "build with pip's --no-build-isolation")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return without_kernels(choice, f"there is no C++ compiler ({compiler!r})")
    has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not has_cuda:
        raise SystemExit(f"EQUIMINI_BUILD=cuda, but torch's CUDA version is {torch.version.cuda} "
                         f"and CUDA_HOME is {CUDA_HOME}")
    return choice or ("cuda" if has_cuda else "cpu")


def without_kernels(choice: str, why: str) -> str:
    if choice:
        raise SystemExit(f"EQUIMINI_BUILD={choice}, but {why}")
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip asks for metadata first: say it once
        print(f"equimini: installing without compiled attention kernels: {why}.")
    return "none"


def extension(choice: str) -> dict:
    """setup()'s arguments for the extension module."""
    if choice == "none":
        return {}
    from torch.utils import cpp_extension

    flags = ["-O3", f"-march={os.environ.get('EQUIMINI_MARCH', 'native')}",
             "-fno-math-errno", "-fvisibility=hidden", "-fopenmp"]
    sources, kind, macros = ["csrc/binding.cpp"], cpp_extension.CppExtension, []
    if choice == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        sources, kind = sources + ["csrc/cuda_kernels.cu"], cpp_extension.CUDAExtension
        macros = [("WITH_CUDA", None)]
    module = kind("equimini._kernels", sources, define_macros=macros,
                  depends=glob("csrc/*.h") + glob("csrc/*.cuh"),
                  extra_compile_args={"cxx": flags, "nvcc": ["-O3"]})
    return {"ext_modules": [module],
            "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension(build_choice()))
