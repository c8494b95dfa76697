"""What the soak commands share: counts that a later call continues, figures, requests."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path
from typing import Any

from equimini.utils.files import write_text


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


def ask(host: str, method: str, path: str, fields: dict | None = None) -> tuple[int, bytes]:
    """Status and body of a page's answer; (0, b"") where it has no connection free."""
    link = http.client.HTTPConnection(host, timeout=120)
    try:
        link.request(method, path, None if fields is None else json.dumps(fields))
        answer = link.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        link.close()
