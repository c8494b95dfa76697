"""equimini: a minimal reference implementation of Equivariant Image Modeling."""

__version__ = "0.1.0"
