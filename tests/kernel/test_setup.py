"""What setup.py decides before it builds."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def setup_py(monkeypatch) -> dict:
    """setup.py's functions, without an installation."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("EQUIMINI_BUILD", "none")
    return runpy.run_path(str(SETUP))


@pytest.mark.parametrize("listed,kept", [
    ("", ["8.0", "9.0+PTX"]),
    ("7.0 7.5 8.0 8.6 9.0a 12.0+PTX", ["8.0", "8.6", "9.0a", "12.0+PTX"]),
    ("Turing;Ampere", ["Ampere"]), ("6.1,7.5+PTX", [])])
def test_old_gpus_are_left_out(setup_py: dict, monkeypatch, listed: str, kept: list[str]):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert setup_py["architectures"]() == kept
    if not kept:  # the C++ part alone is built then, or, if CUDA was asked for, nothing
        assert "no GPU of compute capability" in setup_py["missing_for_cuda"]("13.0", "c++")


def test_without_cuda_in_torch(setup_py: dict):
    assert "built without CUDA" in setup_py["missing_for_cuda"](None, "c++")


def test_the_newest_gpus_are_compiled_for_where_nvcc_knows_them(setup_py: dict, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    known = ["compute_90", "compute_100", "compute_103", "compute_120"]
    assert setup_py["architectures"](known) == ["8.0", "9.0", "10.0", "12.0+PTX"]
    assert setup_py["architectures"](known[:1]) == ["8.0", "9.0+PTX"]


def toolkit(folder: Path, release: str, headers: bool = True) -> Path:
    """A CUDA toolkit that can tell its version."""
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    if headers:
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_a_toolkit_that_fits_is_found_where_nvcc_is_a_wrapper(setup_py: dict, monkeypatch,
                                                              tmp_path: Path):
    """torch guesses the folder of the wrapper, which holds no headers."""
    from torch.utils import cpp_extension

    wrapper = toolkit(tmp_path / "wrapper", "13.0", headers=False)
    folders = [wrapper, toolkit(tmp_path / "old", "11.8"), toolkit(tmp_path / "new", "13.0")]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    find = setup_py["missing_for_cuda"]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setitem(find.__globals__, "toolkits", lambda version: list(map(str, folders)))
    assert find("13.0", "c++") == "" and cpp_extension.CUDA_HOME == str(folders[2])
    folders.pop()
    assert f"{wrapper} has no headers" in find("13.0", "c++")
    folders.clear()
    assert "no CUDA toolkit is found" in find("13.0", "c++")


def test_where_toolkits_are_looked_for(setup_py: dict, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/here")
    assert setup_py["toolkits"]("13.0") == ["/here"]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert setup_py["toolkits"]("13.0")[-2:] == ["/usr/local/cuda-13.0", "/usr/local/cuda"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for a processor of another kind")
def test_clang_compiles_for_plain_avx2():
    """Of which Clang 14, the oldest, has no _Float16."""
    compiler = next(filter(shutil.which, ("clang++-14", "clang++")), None)
    if compiler is None:
        pytest.skip("there is no Clang")
    csrc = SETUP.parent / "csrc"
    subprocess.run([compiler, "-std=c++20", "-march=haswell", "-fsyntax-only",
                    csrc / "cpu" / "attention.cpp"], check=True)
