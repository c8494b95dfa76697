"""python -m equimini.bench WHAT [options]: one benchmark per module of this folder."""

from equimini.cli import run, subcommand

run(lambda: subcommand("equimini.bench", ["attention", "data", "sample", "solvers", "tokenizer",
                                       "train"]))
