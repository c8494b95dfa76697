"""The paper's experiments in miniature, one module for each: python -m equimini.experiments."""
