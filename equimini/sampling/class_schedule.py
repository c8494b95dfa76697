"""Which class every column of a picture has: `forest:32,sea:64` turns from forest into sea."""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from equimini.utils.errors import UserError

Plan = list[tuple[int, int]]  # (class number, columns), in order; columns 0: no length given


def parse_plan(text: str, numbers: Callable[[Sequence[str]], list[int]],
               names: Sequence[str]) -> Plan:
    """'forest:32,sea:64' or 'forest,sea' to class numbers and lengths.

    numbers: from names to class numbers; raises UserError for an unknown one.  Raises UserError
    where some classes have a length and others none, or a length is no positive number.
    """
    plan = []
    for part in (part.strip() for part in text.split(",")):
        name, colon, length = part.rpartition(":")
        if not colon or part in names:  # a class may have a colon in its name
            plan.append((numbers([part])[0], 0))
        elif length.strip().isdecimal() and int(length) > 0:
            plan.append((numbers([name.strip()])[0], int(length)))
        else:
            raise UserError(f"--classes {text}: the length after the colon must be a number of "
                            f"columns from 1 up, got {length!r}")
    if len({length > 0 for _, length in plan}) > 1:
        raise UserError(f"--classes {text}: give a length to every class (forest:32,sea:64), or "
                        "to none")
    return plan


def has_lengths(plan: Plan) -> bool:
    """Whether the classes follow one another within a picture."""
    return plan[0][1] > 0


def plan_length(plan: Plan) -> int:
    """Columns of the plan in all; 0 without lengths."""
    return sum(length for _, length in plan)


def plan_labels(plan: Plan, columns: int) -> Tensor:
    """The class of every column, (columns,) int64: the plan, over and over until it is filled.

    Raises UserError for several classes without lengths, or lengths that do not fit in.
    """
    if not has_lengths(plan):
        if len(plan) > 1:
            raise UserError("one picture takes one class, or several with their lengths in "
                            "columns: --classes forest:32,sea:64")
        return torch.full((columns,), plan[0][0])
    if plan_length(plan) > columns:
        raise UserError(f"the lengths in --classes add up to {plan_length(plan)} columns; the "
                        f"picture has {columns}")
    once = torch.cat([torch.full((length,), label) for label, length in plan])
    return once.repeat(-(-columns // len(once)))[:columns]
