"""python -m equimini.show WHAT [options]: one picture per module of this folder, and versions."""

from equimini.utils.command_line import run, subcommand

run(lambda: subcommand("equimini.show", ["drift", "neighbours", "run", "seams", "tokens",
                                         "versions"]))
