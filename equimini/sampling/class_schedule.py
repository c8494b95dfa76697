"""Which class every column of a picture has: `forest:32,sea:64` turns from forest into sea."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from equimini.utils.errors import UserError

ClassSchedule = list[tuple[int, int]]  # (class number, columns), in order; 0: none given


def parse_schedule(text: str, numbers: Callable[[Sequence[str]], list[int]],
                   names: Sequence[str]) -> ClassSchedule:
    """'forest:32,sea:64' or 'forest,sea' to class numbers and lengths.

    numbers: from names to class numbers; raises UserError for an unknown one.  Raises UserError
    where some classes have a length and others none, or a length is no positive number.
    """
    schedule = []
    for part in (part.strip() for part in text.split(",")):
        name, colon, length = part.rpartition(":")
        if not colon or part in names:  # a class may have a colon in its name
            schedule.append((numbers([part])[0], 0))
        elif length.strip().isdecimal() and int(length) > 0:
            schedule.append((numbers([name.strip()])[0], int(length)))
        else:
            raise UserError(f"--classes {text}: the length after the colon must be a number of "
                            f"columns from 1 up, got {length!r}")
    if len({length > 0 for _, length in schedule}) > 1:
        raise UserError(f"--classes {text}: give a length to every class (forest:32,sea:64), or "
                        "to none")
    return schedule


def has_lengths(schedule: ClassSchedule) -> bool:
    """Whether the classes follow one another within a picture."""
    return schedule[0][1] > 0


def schedule_length(schedule: ClassSchedule) -> int:
    """Columns of the schedule in all; 0 without lengths."""
    return sum(length for _, length in schedule)


def schedule_labels(schedule: ClassSchedule, columns: int) -> Tensor:
    """The class of every column, (columns,) int64: the schedule, over and over until it is filled.

    Raises UserError for several classes without lengths, or lengths that do not fit in.
    """
    if not has_lengths(schedule):
        if len(schedule) > 1:
            raise UserError("one picture takes one class, or several with their lengths in "
                            "columns: --classes forest:32,sea:64")
        return torch.full((columns,), schedule[0][0])
    if schedule_length(schedule) > columns:
        raise UserError(f"the lengths in --classes add up to {schedule_length(schedule)} columns; "
                        f"the picture has {columns}")
    once = torch.cat([torch.full((length,), label) for label, length in schedule])
    return once.repeat(-(-columns // len(once)))[:columns]
