"""What setup.py decides before it builds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

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
