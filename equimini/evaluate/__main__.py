"""python -m equimini.evaluate tokenizer|generator [options]"""

from equimini.evaluate.commands import main
from equimini.utils.command_line import run

run(main)
