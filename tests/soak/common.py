"""What the soak commands share: counts that a later call continues, options, figures."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from equimini.utils.files import write_text

BEGUN = time.time()


class Progress(Counter):
    """Counts by name, kept in a file, so that a soak can be continued."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def save(self) -> None:
        write_text(self.path, json.dumps(self, indent=1))


def options(doc: str, **added: tuple[Any, str]) -> argparse.Namespace:
    """Parse options of which the default and the meaning are given; a list takes any number."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name, (default, what) in added.items():
        kind = {"nargs": "*"} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=f"{what} [{default}]", **kind)
    return parser.parse_args()


def memory(what: str) -> int:
    """This process's VmRSS or VmData, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])


def figures(what: str, **numbers: Any) -> None:
    """The line that a soak ends with: the date, what, how much of it, the seconds so far."""
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in numbers.items())
    print(f"{time.strftime('%Y-%m-%d')} {what}: {shown}; {time.time() - BEGUN:.0f} s", flush=True)
