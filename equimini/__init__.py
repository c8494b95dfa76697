"""equimini: a minimal reference implementation of Equivariant Image Modeling."""

import os
from importlib import import_module

if "OMP_WAIT_POLICY" not in os.environ:  # how long torch's threads spin for each other before they
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # sleep; read when torch is imported, once

__version__ = "0.2.0"
_HOME = {"load_tokenizer": "utils.checkpoint", "load_generator": "sampling.image_generator",
         "ImageGenerator": "sampling.image_generator", "window_attention": "attention"}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import the public names when they are first used, not with the package."""
    if name in _HOME:
        return getattr(import_module(f"equimini.{_HOME[name]}"), name)
    raise AttributeError(f"module 'equimini' has no attribute {name!r}")
