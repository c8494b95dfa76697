"""Benchmarks: how fast, and against what.  `python -m equimini.bench` lists them."""
