"""equimini: a minimal reference implementation of Equivariant Image Modeling."""

from equimini.checkpoint import load_tokenizer
from equimini.pipeline import ImageGenerator, load_generator

__all__ = ["ImageGenerator", "load_generator", "load_tokenizer"]
__version__ = "0.1.0"
