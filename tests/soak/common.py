"""What the soak commands share: a folder that a later call continues in, and a line of figures."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from equimini.utils.files import write_text

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
               "OMP_NUM_THREADS": "1"}


class Progress:
    """Counts by name, kept in a file at most once a second, so that a soak can be continued."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.saved = path, 0.0
        self.counts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    def add(self, name: str, n: int = 1) -> None:
        self.counts[name] = self[name] + n
        if time.monotonic() - self.saved > 1:
            self.save()

    def save(self) -> None:
        write_text(self.path, json.dumps(self.counts, indent=1))
        self.saved = time.monotonic()


def figures(what: str, begun: float, **numbers: Any) -> None:
    """The line that a soak ends with: the date, what, and how much of it."""
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in numbers.items())
    print(f"{time.strftime('%Y-%m-%d')} {what}: {shown}; {time.time() - begun:.0f} s", flush=True)
