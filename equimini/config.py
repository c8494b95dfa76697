"""A dataclass field that becomes a command-line flag, and the check of its limits."""

from __future__ import annotations

import math
from dataclasses import field, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any


def flag(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text; limits: min, max (inclusive), choices, and `before`,
    the value that a checkpoint without the field means, if it is not the default."""
    return field(default=default, metadata={"help": help, **limits})


KINDS = {"int": (Integral, "a whole number"), "float": (Real, "a finite number"),
         "tuple[int, ...]": (Integral, "whole numbers"), "str": ((str, PathLike), "text"),
         "bool": (bool, "true or false")}  # by a field's annotation


class Checked:
    """Base of the configurations: checks every field against its type and declared limits."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            kind, words = KINDS.get(getattr(f.type, "__name__", f.type), (object, ""))
            several = isinstance(f.default, tuple)
            flat = value if several and isinstance(value, tuple) else (value,)
            name = f.name.replace("_", "-")
            if several and words and flat is not value or any(
                    not isinstance(v, kind) or isinstance(v, bool) and words and kind is not bool
                    or isinstance(v, float) and not math.isfinite(v) for v in flat):
                raise ValueError(f"{name} must be {words}, got {value!r}")
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(f"{name} must be one of {', '.join(limits['choices'])}, "
                                 f"got {value!r}")
            if "min" in limits and any(v < limits["min"] for v in flat):
                raise ValueError(f"{name} must be at least {limits['min']}, got {value}")
            if "max" in limits and any(v > limits["max"] for v in flat):
                raise ValueError(f"{name} must be at most {limits['max']}, got {value}")
