"""Load on the page's server: edits by a script, and beside them many, slow and half requests.

    python -m tests.soak.page --edits 1000 --clients 50

One client draws a column again and takes a candidate, or undoes or redoes, so many times, and
compares the strip with its own account of it.  Others meanwhile read pictures, send orders that are
refused, or headers byte by byte, stop in the middle of a body, or close the connection while they
are answered.  In the end nothing may be lost, one drawing at a time was made, no thread is left.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from equimini import load_generator
from equimini.page.drawing import Studio
from equimini.page.server import Server
from tests.soak.common import figures

QUICK = {"solver": "euler", "steps": 2}


def counted(studio: Studio, seen: Counter) -> None:
    """Note how many drawings run at a time."""
    draw, running = studio.draw, []

    def counting(order: Any) -> Any:
        running.append(order)
        seen["at a time"] = max(seen["at a time"], len(running))
        try:
            yield from draw(order)
        finally:
            running.pop()

    studio.draw = counting


def ask(port: int, method: str, path: str, fields: dict | None = None) -> tuple[int, bytes]:
    """Status and body; (0, b"") where the server has no connection free."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        link.request(method, path, None if fields is None else json.dumps(fields))
        answer = link.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        link.close()


def change(port: int, path: str, fields: dict) -> dict[str, Any]:
    """A change that must succeed sooner or later: the state after it."""
    for _ in range(10_000):
        state = json.loads(ask(port, "GET", "/state")[1] or b"{}")
        status, body = ask(port, "POST", f"{path}?version={state.get('version')}", fields)
        if status == 200:
            last = json.loads(body.splitlines()[-1])
            if "error" in last:
                raise SystemExit(f"{path}: {last['error']}")
            return last.get("state", last)
        if status not in (0, 409):
            raise SystemExit(f"{path}: {status} {body[:200]!r}")
        time.sleep(0.01)
    raise SystemExit(f"{path}: no answer")


def edit(port: int, studio: Studio, edits: int, draw: random.Random) -> Counter:
    """The edits, each checked; the columns outside an edit must stay as they are."""
    change(port, "/new", {})
    done, now = Counter(), change(port, "/draw", {"columns": 64, "classes": [0] * 64, **QUICK})
    history, place = [studio.strip.columns.tobytes()], 0
    while sum(done.values()) < edits:
        act = draw.choice(("redraw", "redraw", "undo", "redo"))
        if act == "redraw":
            at = draw.randrange(4, 60)
            change(port, "/draw", {"do": "redraw", "start": at, "end": at + 1, "candidates": 2,
                                   "fit": 1, **QUICK})
            now = change(port, "/choose", {"candidate": draw.randrange(2)})
            tokens = studio.strip.columns["token"]
            kept = [k for k in range(64) if k != at]
            before = torch.frombuffer(bytearray(history[place]), dtype=torch.uint8).numpy().view(
                studio.strip.row)["token"]
            if not (tokens[kept] == before[kept]).all():
                raise SystemExit("a column outside the edit changed")
            history[place + 1:] = [studio.strip.columns.tobytes()]
            place += 1
        elif act == "undo" and place > 0 or act == "redo" and place + 1 < len(history):
            place += 1 if act == "redo" else -1
            now = change(port, f"/{act}", {})
        else:
            continue
        done[act] += 1
        if len(now["labels"]) != 64 or studio.strip.columns.tobytes() != history[place]:
            raise SystemExit(f"after {act} the strip is another one")
    return done


def disturb(port: int, stop: threading.Event, draw: random.Random, seen: Counter) -> None:
    """One client that behaves badly, or only reads."""
    host = f"Host: 127.0.0.1:{port}\r\n"
    while not stop.is_set():
        what = draw.choice(("read", "read", "slow", "half", "gone", "wrong", "stale"))
        seen[what] += 1
        if what == "read":
            ask(port, "GET", "/" + draw.choice(("", "state", "pixels?from=3&to=9", "strip.png",
                                                "strip.pt")))
        elif what == "wrong":
            ask(port, "POST", "/draw", {"columns": draw.choice((-1, "x", 10**9, None))})
        elif what == "stale":
            ask(port, "POST", "/new?version=-1", {})
        else:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                    if what == "gone":
                        link.sendall(f"GET /strip.png HTTP/1.0\r\n{host}\r\n".encode())
                    elif what == "half":
                        link.sendall(f"POST /draw HTTP/1.0\r\n{host}Content-Length: 50\r\n\r\n"
                                     '{"columns"'.encode())
                    else:
                        for byte in f"GET /state HTTP/1.0\r\n{host}".encode():
                            link.sendall(bytes([byte]))
                            time.sleep(0.02)
            except OSError:
                pass
        time.sleep(draw.uniform(0, 4))


def memory() -> float:
    """This process's resident memory, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=1000, help="of the strip [1000]")
    parser.add_argument("--clients", type=int, default=50, help="beside the one that edits [50]")
    parser.add_argument("--checkpoint", default="scenes", help="generator to draw with [scenes]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun, seen, stop = time.time(), Counter(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(load_generator(args.checkpoint), Path(folder))
        counted(studio, seen)
        server = Server(studio, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, draw = server.server_port, random.Random(args.seed)
        edit(port, studio, 20, draw)  # a warm-up
        threads, used = threading.active_count(), memory()
        clients = [threading.Thread(target=disturb, args=(port, stop, random.Random(k), seen),
                                    daemon=True) for k in range(args.clients)]
        for client in clients:
            client.start()
        done = edit(port, studio, args.edits, draw)
        grown = memory() - used
        stop.set()
        for client in clients:
            client.join()
        deadline = time.time() + 30
        while threading.active_count() > threads and time.time() < deadline:
            time.sleep(0.1)
        left = threading.active_count() - threads
        kept = studio.strip.columns.tobytes()
        server.shutdown()
        server.server_close()
        if Studio(studio.model, Path(folder)).strip.columns.tobytes() != kept:
            raise SystemExit("what is on disk is not the strip that was shown")
    figures("page", begun, edits=sum(done.values()), drawn_at_a_time=seen.pop("at a time"),
            requests_beside=sum(seen.values()), threads_left=left, MiB_grown=f"{grown:.0f}")
    if left:
        raise SystemExit("threads are left")


if __name__ == "__main__":
    main()
