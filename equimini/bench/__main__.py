"""python -m equimini.bench WHAT [options]: one benchmark per module of this folder."""

from equimini.utils.command_line import run, subcommand

run(lambda: subcommand("equimini.bench", ["archives", "attention", "data", "page", "sample",
                                          "single", "solvers", "tokenizer", "train"]))
