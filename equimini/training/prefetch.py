"""The next step's draws, made while this one is computed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable


class Prefetcher:
    """Calls a pure function(step, …), always the same one, and for step + 1 in another thread.

    If the next call is for that step, with the same rest, its result is ready.  An error is
    raised by the call for its step.  Results of two steps are in memory, and the last one was
    made for nothing.
    """

    def __init__(self) -> None:
        self.pool, self.expected, self.coming = ThreadPoolExecutor(1), None, None

    def __call__(self, function: Callable[..., Any], step: int, *more: Any) -> Any:
        there = self.expected == (step, *more)
        result = self.coming.result() if there else function(step, *more)
        self.expected = step + 1, *more
        self.coming = self.pool.submit(function, *self.expected)
        return result
