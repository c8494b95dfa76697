"""Load on the page's server: edits by a script, and beside them many, slow and half requests.

    python -m tests.soak.page --edits 1000 --clients 50
    python -m tests.soak.page --kills 30 --edits 0         # kills it while it draws

One client draws a column again and takes a candidate, or undoes or redoes, so many times, and
compares the strip with its own account of it.  Others meanwhile read pictures, send orders that are
refused, or headers byte by byte, stop in the middle of a body, or close the connection while they
are answered.  In the end nothing may be lost and no thread is left.
Of a server killed while it draws, the strip must be that of an undisturbed one, up to some part.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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
from tests.soak.common import ask, figures

QUICK = {"solver": "euler", "steps": 2}


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


def edit(host: str, studio: Studio, edits: int, draw: random.Random) -> Counter:
    """The edits, each checked; the columns outside an edit must stay as they are."""
    change(host, {"do": "new"})
    done, now = Counter(), change(host, {"columns": 64, "classes": [0] * 64, **QUICK})
    history, place = [studio.strip.columns.tobytes()], 0
    while sum(done.values()) < edits:
        act = draw.choice(("redraw", "redraw", "undo", "redo"))
        if act == "redraw":
            at = draw.randrange(4, 60)
            change(host, {"do": "redraw", "start": at, "end": at + 1, "candidates": 2, "fit": 1,
                          **QUICK})
            now = change(host, {"do": "choose", "candidate": draw.randrange(2)})
            tokens, before = studio.strip.columns["token"], np.frombuffer(
                history[place], studio.strip.row)["token"]
            if not np.array_equal(*(np.delete(x, at, 0) for x in (tokens, before))):
                raise SystemExit("a column outside the edit changed")
            history[place + 1:] = [studio.strip.columns.tobytes()]
            place += 1
        elif act == "undo" and place > 0 or act == "redo" and place + 1 < len(history):
            place += 1 if act == "redo" else -1
            now = change(host, {"do": act})
        else:
            continue
        done[act] += 1
        if len(now["labels"]) != 64 or studio.strip.columns.tobytes() != history[place]:
            raise SystemExit(f"after {act} the strip is another one")
    return done


def disturb(host: str, stop: threading.Event, draw: random.Random, seen: Counter) -> None:
    """One client that behaves badly, or only reads."""
    header, address = f"Host: {host}\r\n", (host.split(":")[0], int(host.split(":")[1]))
    while not stop.is_set():
        what = draw.choice(("read", "read", "slow", "half", "gone", "wrong", "stale"))
        seen[what] += 1
        if what == "read":
            ask(host, "GET", "/" + draw.choice(("", "state", "strip.png?from=3&to=9", "strip.png",
                                                "strip.pt")))
        elif what == "wrong":
            ask(host, "POST", "/draw", {"columns": draw.choice((-1, "x", 10**9, None))})
        elif what == "stale":
            ask(host, "POST", "/draw", {"do": "new", "version": 0})
        else:
            try:
                with socket.create_connection(address, timeout=5) as link:
                    if what == "gone":
                        link.sendall(f"GET /strip.png HTTP/1.0\r\n{header}\r\n".encode())
                    elif what == "half":
                        link.sendall(f"POST /draw HTTP/1.0\r\n{header}Content-Length: 50\r\n\r\n"
                                     '{"columns"'.encode())
                    else:
                        for byte in f"GET /state HTTP/1.0\r\n{header}".encode():
                            link.sendall(bytes([byte]))
                            time.sleep(0.02)
            except OSError:
                pass
        time.sleep(draw.uniform(0, 4))


def memory() -> float:
    """This process's resident memory, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def kill(kills: int, checkpoint: str, folder: Path, draw: random.Random) -> int:
    """Kill servers while they draw 256 columns; returns how many columns were kept in all."""
    row, order = row_type(load_generator(checkpoint)), {
        "columns": 256, "classes": [0] * 256, "seed": 3, "steps": 2}
    whole, seconds, kept = None, 0.0, 0
    for _ in range(kills + 1):  # the first one is left alone
        server = subprocess.Popen([sys.executable, "-m", "equimini.page", "--port", "0", "--out",
                                   folder, "--checkpoint", checkpoint], env=ENVIRONMENT,
                                  stdout=subprocess.PIPE, text=True)
        host, begun = server.stdout.readline().split("/")[2], time.time()
        change(host, {"do": "new"})
        drawing = threading.Thread(target=ask, args=(host, "POST", "/draw", order))
        drawing.start()
        drawing.join(None if whole is None else draw.uniform(0, seconds))
        server.kill()
        server.wait()
        drawing.join()
        strip, seconds = History(folder, row).columns, seconds or time.time() - begun
        whole = strip if whole is None else whole
        kept += (n := len(strip))
        if len(whole) != 256 or n % 64 or not np.array_equal(strip["token"], whole["token"][:n]):
            raise SystemExit(f"after a kill the strip of {n} columns is another one")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edits", type=int, default=1000, help="of the strip [1000]")
    parser.add_argument("--clients", type=int, default=50, help="beside the one that edits [50]")
    parser.add_argument("--kills", type=int, default=0, help="of servers that draw [0]")
    parser.add_argument("--checkpoint", default="scenes", help="generator to draw with [scenes]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            begun = time.time()
            kept = kill(args.kills, args.checkpoint, Path(folder) / "killed", draw)
            figures("page", begun, kills=args.kills, columns_kept=kept)
        if args.edits:
            load(args, Path(folder), draw)


def load(args: argparse.Namespace, folder: Path, draw: random.Random) -> None:
    """Edits, and beside them the other clients; raises SystemExit for what must not be."""
    begun, seen, stop = time.time(), Counter(), threading.Event()
    studio = Studio(load_generator(args.checkpoint), folder)
    server = Server(studio, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = server.hosts[0]
    edit(host, studio, 20, draw)  # a warm-up
    threads, used = threading.active_count(), memory()
    clients = [threading.Thread(target=disturb, args=(host, stop, random.Random(k), seen),
                                daemon=True) for k in range(args.clients)]
    for client in clients:
        client.start()
    done = edit(host, studio, args.edits, draw)
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
    if Studio(studio.model, folder).strip.columns.tobytes() != kept:
        raise SystemExit("what is on disk is not the strip that was shown")
    figures("page", begun, edits=sum(done.values()),
            requests_beside=sum(seen.values()), threads_left=left, MiB_grown=f"{grown:.0f}")
    if left:
        raise SystemExit(f"threads are left: {threading.enumerate()}")


if __name__ == "__main__":
    main()
