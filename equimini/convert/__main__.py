"""python -m equimini.convert CHECKPOINT --out FILE: the authors' checkpoints into equimini's."""

from equimini.convert.release import main
from equimini.utils.command_line import run

run(main)
