"""equimini: a minimal reference implementation of Equivariant Image Modeling."""

from importlib import import_module

__version__ = "0.2.0"
_HOME = {"load_tokenizer": "utils.checkpoint", "load_generator": "sampling.image_generator",
         "ImageGenerator": "sampling.image_generator", "window_attention": "attention"}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import the public names when they are first used, not with the package."""
    if name in _HOME:
        return getattr(import_module(f"equimini.{_HOME[name]}"), name)
    raise AttributeError(f"module 'equimini' has no attribute {name!r}")
