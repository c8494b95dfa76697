"""Ctrl-C and SIGTERM: finish the step, save, stop; and loader processes, which end with us."""

from __future__ import annotations

import atexit
import multiprocessing.util  # first: what it does at exit must come after what we do
import signal
from typing import Any

import torch
from tqdm import tqdm

from equimini.utils import distributed
from equimini.utils.files import leave_locks


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is finished and saved.

    A second one interrupts at once (not under torchrun).  A context: the usual handlers are back
    at its end.
    """

    def __init__(self, message: str = "stopping after this step; a checkpoint is written") -> None:
        self.asked, self.message = 0, message  # asked: the signal's number

    def __enter__(self) -> StopRequest:
        self.usual = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def share(self) -> None:
        """Let all processes stop after the same step, whichever was asked first."""
        if distributed.world_size() > 1:
            self.asked = int(distributed.largest(torch.tensor(self.asked)))

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and distributed.world_size() > 1:
            return  # torchrun hands on what the terminal has sent already; it kills in the end
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        if distributed.is_main():
            again = "" if distributed.world_size() > 1 else " (again to stop at once)"
            tqdm.write(f"{self.message}{again}")


def leave_signals(_: int) -> None:
    """In a loader process: stopping is the main process's business; it ends its loaders itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    leave_locks()


@atexit.register
def end_loaders() -> None:
    """End what an error left running: Python sends SIGTERM, which they ignore, and waits."""
    loaders = [process for process in multiprocessing.active_children() if process.daemon]
    if loaders and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in loaders:
        process.kill()
