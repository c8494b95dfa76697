"""Load on the page's server: edits by a script, and beside them many, slow and half requests.

    python -m tests.soak.page --edits 1000 --clients 50 --seconds 600
    python -m tests.soak.page --kills 30 --edits 0         # kills it while it draws

One client edits, and compares the strip with its own account of it, beside others that read and
misbehave; in the end nothing may be lost and no thread is left.  Of a server killed while it
draws, the strip must be that of an undisturbed one, up to some part.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equimini import load_generator
from equimini.page.drawing import Studio
from equimini.page.history import History
from equimini.page.server import Server
from equimini.sampling.strip import row_type
from tests.helpers.scripts import ENVIRONMENT
from tests.soak.common import figures, memory, options

QUICK = {"solver": "euler", "steps": 2, "fit": 1}


def ask(host: str, method: str, path: str, fields: dict | None = None) -> tuple[int, bytes]:
    """Status and body of the answer; (0, b"") where the page has no connection free."""
    with closing(http.client.HTTPConnection(host, timeout=120)) as link, suppress(
            OSError, http.client.HTTPException):
        link.request(method, path, None if fields is None else json.dumps(fields))
        answer = link.getresponse()
        return answer.status, answer.read()
    return 0, b""


def change(host: str, fields: dict) -> dict[str, Any]:
    """A change that must succeed sooner or later: the state after it."""
    for _ in range(10_000):
        state = json.loads(ask(host, "GET", "/state")[1] or b"{}")
        status, body = ask(host, "POST", "/draw", {"version": state.get("version", 0), **fields})
        last = json.loads(body.splitlines()[-1]) if body else {"error": "has changed"}
        if "error" not in last:
            return last["state"]
        if "has changed" not in last["error"]:
            raise SystemExit(f"{fields}: {status} {last['error'][:200]}")
        time.sleep(0.01)
    raise SystemExit(f"{fields}: no answer")


def edit(host: str, studio: Studio, edits: int, until: float, draw: random.Random) -> int:
    """At least so many edits, each checked; the columns outside an edit must stay as they are."""
    change(host, {"do": "new"})
    change(host, {"columns": 64, "classes": [0] * 64, **QUICK})
    history, place, done = [hash(studio.strip.columns.tobytes())], 0, 0
    while done < edits or time.time() < until:
        act = draw.choice(["redraw", "redraw"] + ["undo"] * (place > 0)
                          + ["redo"] * (place + 1 < len(history)))
        if act == "redraw":
            at, before = draw.randrange(4, 60), studio.strip.columns["token"]
            change(host, {"do": act, "start": at, "end": at + 1, "candidates": 2, **QUICK})
            now = change(host, {"do": "choose", "candidate": draw.randrange(2)})
            history[place + 1:] = [hash(studio.strip.columns.tobytes())]
            after = studio.strip.columns["token"]
            if not np.array_equal(*(np.delete(x, at, 0) for x in (before, after))):
                raise SystemExit("a column outside the edit changed")
        else:
            now = change(host, {"do": act})
        place, done = place + (-1 if act == "undo" else 1), done + 1
        if (len(now["labels"]), hash(studio.strip.columns.tobytes())) != (64, history[place]):
            raise SystemExit(f"after {act} the strip is another one")
    return done


def disturb(host: str, stop: threading.Event, draw: random.Random, seen: list) -> None:
    """One client that behaves badly, or only reads."""
    header, (address, port) = f"HTTP/1.0\r\nHost: {host}\r\n", host.split(":")
    gone = [f"GET /strip.png {header}\r\n"]
    half = [f"POST /draw {header}Content-Length: 50\r\n\r\n\"columns\""]
    slow = f"GET /state {header}"  # byte by byte
    while not stop.wait(draw.uniform(0, 4)):
        read = "/" + draw.choice(("", "state", "strip.png?from=3&to=9", "strip.png", "strip.pt"))
        wrong, stale = {"columns": draw.choice((-1, "x", 10**9, None))}, {"do": "new", "version": 0}
        seen.append(what := draw.choice((read, read, wrong, stale, gone, half, slow)))
        if what is read or isinstance(what, dict):
            ask(host, *(("GET", read) if what is read else ("POST", "/draw", what)))
            continue
        with suppress(OSError), socket.create_connection((address, int(port)), 5) as link:
            for part in what:
                link.sendall(part.encode())
                time.sleep(0.02 * (what is slow))


def kill(args: argparse.Namespace, folder: Path, draw: random.Random) -> None:
    order = {"columns": 256, "classes": [0] * 256, "seed": 3, "steps": 2}
    words = [sys.executable, "-m", "equimini.page", "--port", "0", "--out", folder, "--checkpoint",
             args.checkpoint]
    row = row_type(load_generator(args.checkpoint))
    whole, seconds, kept = None, 0.0, 0
    for _ in range(args.kills + 1):  # the first one is left alone
        server = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        host, started = server.stdout.readline().split("/")[2], time.time()
        change(host, {"do": "new"})
        drawing = threading.Thread(target=ask, args=(host, "POST", "/draw", order))
        drawing.start()
        drawing.join(None if whole is None else draw.uniform(0, seconds))
        server.kill()
        server.wait()
        drawing.join()
        strip, seconds = History(folder, row).columns["token"], seconds or time.time() - started
        whole = strip if whole is None else whole
        kept += (n := len(strip))
        if len(whole) != 256 or n % 64 or not np.array_equal(strip, whole[:n]):
            raise SystemExit(f"after a kill the strip of {n} columns is another one")
    figures("page", kills=args.kills, columns_kept=kept)


def load(args: argparse.Namespace, folder: Path, draw: random.Random) -> None:
    seen, stop, until = [], threading.Event(), time.time() + args.seconds
    studio = Studio(load_generator(args.checkpoint), folder)
    server = Server(studio, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, threads = server.hosts[0], threading.active_count()
    for k in range(args.clients):
        other = host, stop, random.Random(k), seen
        threading.Thread(target=disturb, args=other, daemon=True).start()
    edit(host, studio, 100, 0, draw)  # a warm-up
    used = memory("VmRSS")
    done = edit(host, studio, args.edits, until, draw)
    grown = (memory("VmRSS") - used) / 2**20
    stop.set()
    deadline = time.time() + 150  # what is being answered may take two minutes
    while threading.active_count() > threads and time.time() < deadline:
        time.sleep(0.1)
    left = threading.active_count() - threads
    server.shutdown()
    server.server_close()
    if Studio(studio.model, folder).strip.columns.tobytes() != studio.strip.columns.tobytes():
        raise SystemExit("what is on disk is not the strip that was shown")
    figures("page", edits=done, requests_beside=len(seen), threads_left=left,
            MiB_grown=f"{grown:.0f}")
    if left:
        raise SystemExit(f"threads are left: {threading.enumerate()}")


def main() -> None:
    args = options(__doc__, edits=(1000, "of the strip, at least"), seconds=(0.0, "at least"),
                   clients=(50, "beside the one that edits"), kills=(0, "of servers that draw"),
                   checkpoint=("scenes", "generator to draw with"), seed=(0, "of the moments"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            kill(args, Path(folder) / "killed", random.Random(args.seed))
        if args.edits:
            load(args, Path(folder), random.Random(args.seed))


if __name__ == "__main__":
    main()
