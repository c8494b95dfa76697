"""python -m equimini.experiments WHAT [options]: one experiment per module of this folder."""

from equimini.utils.command_line import run, subcommand

run(lambda: subcommand("equimini.experiments", [
    "all", "compute", "transfer", "grid-vs-columns", "attention", "dynamics", "uniformity",
    "extrapolation", "matrix", "equivariance", "alignment", "dit", "tokenizer", "fits"]))
