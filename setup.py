"""Builds equimini._kernels, the compiled attention kernels; everything else is plain Python.

    pip install --no-build-isolation -e .

builds against the torch that is installed: C++ where there is a compiler (on Linux), CUDA too
where torch is a CUDA build and a toolkit that fits it is found (in CUDA_HOME; unset, beside nvcc
and in /usr/local/cuda*), GPU or no GPU in the machine.  The binary serves every Python from 3.10
on.  With no compiler, or where the build cannot see torch (build isolation), equimini installs as
plain Python and attention runs as the PyTorch reference.  Environment:

    EQUIMINI_BUILD       none: plain Python · cpu: C++ alone · cuda: C++ and CUDA.  What is asked
                         for and impossible is an error; unset, the above is found out.
    EQUIMINI_MARCH       processor to compile for (-march), "native" unless set
    TORCH_CUDA_ARCH_LIST GPUs to compile for; unset, 8.0, 9.0 and, where nvcc and torch know them,
                         10.0 and 12.0, the last one as PTX too; older ones are left out
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
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


def architectures(known: "list[str]" = ()) -> "list[str]":
    """The GPUs to compile for that the kernels can run on: compute capability 8.0 or newer.

    known: what nvcc can compile for, "compute_100" and the like.
    """
    older = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")
    newest = [name for name in ("10.0", "12.0") if f"compute_{name.replace('.', '')}" in known]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(["8.0", "9.0", *newest]) + "+PTX"
    names = listed.replace(";", " ").replace(",", " ").split()
    return [name for name in names if not name.startswith(older)
            and not (name[0].isdigit() and float(re.match(r"[0-9.]+", name)[0]) < 8)]


def known_architectures(home: str) -> "list[str]":
    """What the toolkit's nvcc and this torch (from 2.7 on) can both compile for."""
    import torch

    nvcc = [os.path.join(home, "bin", "nvcc"), "--list-gpu-arch"]
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    return [] if old else subprocess.run(nvcc, capture_output=True, text=True).stdout.split()


def toolkits(version: str) -> "list[str]":
    """Folders where a CUDA toolkit for a torch of this CUDA version may be, likely ones first."""
    from torch.utils import cpp_extension

    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    folders = [named] if named else [
        cpp_extension.CUDA_HOME, nvcc and os.path.dirname(os.path.dirname(os.path.realpath(nvcc))),
        f"/usr/local/cuda-{version}", "/usr/local/cuda"]
    return list(dict.fromkeys(folder for folder in folders if folder))


def missing_for_cuda(version: "str | None", compiler: str) -> str:
    """What keeps CUDA kernels from being built for a torch of this CUDA version, or nothing.

    Of several toolkits the first that fits becomes torch's choice.
    """
    from torch.utils import cpp_extension

    if version is None:
        return "the torch that is installed is built without CUDA"
    if not architectures():
        return "TORCH_CUDA_ARCH_LIST names no GPU of compute capability 8.0 or newer"
    why = ["no CUDA toolkit is found (nvcc, or the environment variable CUDA_HOME)"]
    folders = toolkits(version)
    for cpp_extension.CUDA_HOME in folders:
        why.append(missing_in_toolkit(cpp_extension.CUDA_HOME, compiler))
        if not why[-1]:
            return ""
    return why[min(1, len(folders))]  # of the likeliest


def missing_in_toolkit(home: str, compiler: str) -> str:
    from torch.utils import cpp_extension

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
    """Print a line of the installation, past pip, which shows what is printed only with -v."""
    if {"egg_info", "dist_info"} & set(sys.argv):  # pip asks for metadata first: say it once
        return
    print(f"equimini: {text}")
    if not sys.stdout.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                print(f"\nequimini: {text}", file=terminal)
        except OSError:  # nobody sits there
            pass


def extension(choice: str) -> dict:
    """setup()'s arguments for the extension module."""
    if choice == "none":
        return {}
    from torch.utils import cpp_extension

    march = os.environ.get("EQUIMINI_MARCH", "native")
    flags = ["-O3", f"-march={march}", "-fno-math-errno", "-fvisibility=hidden", "-fopenmp"]
    sources = ["csrc/binding.cpp", "csrc/cpu/attention.cpp", "csrc/few_rows.cpp"]
    kind = cpp_extension.CppExtension
    macros, gpus = [("COMPILED_FOR", march)], []
    if choice == "cuda":
        gpus = architectures(known_architectures(cpp_extension.CUDA_HOME))
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(gpus)
        sources, kind = sources + ["csrc/cuda/attention.cu"], cpp_extension.CUDAExtension
        macros += [("WITH_CUDA", None)]
    limited = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which has no stable ABI
    module = kind("equimini._kernels", sources,
                  define_macros=[*macros, ("COMPILED_FOR_GPUS", "/".join(gpus))],
                  include_dirs=[os.path.abspath("csrc")],
                  depends=glob("csrc/**/*.*", recursive=True),
                  extra_compile_args={"cxx": flags, "nvcc": ["-O3"]}, py_limited_api=limited,
                  extra_link_args=["-fopenmp"] if is_clang() else [])  # GCC's is torch's own

    class Build(cpp_extension.BuildExtension):
        """Tells at the end what there is; takes away binaries that Python would load instead."""

        def run(self) -> None:
            super().run()
            target = self.get_ext_fullpath(module.name)
            for old in set(glob(os.path.join(os.path.dirname(target), "_kernels.*"))) - {target}:
                os.remove(old)
            say(f"built the attention kernels: C++ for -march={march}"
                + (f", CUDA in {cpp_extension.CUDA_HOME} for {', '.join(gpus)}." if gpus else
                   ", none for CUDA."))

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if limited else {}}


def is_clang() -> bool:
    """Whether the C++ compiler is Clang, under whatever name."""
    told = subprocess.run([*os.environ.get("CXX", "c++").split(), "--version"],
                          capture_output=True, text=True)
    return "clang" in told.stdout


setup(**extension(build_choice()))
