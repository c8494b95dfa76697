"""Kill real commands with SIGKILL at random moments, start them again, and compare.

    python -m tests.soak.kills --kills 30                   # of each; continues in soak/kills.json
    python -m tests.soak.kills --kills 2 --only tokenizer scroll

A command that was killed again and again must end with the same files as one that was left alone,
bit for bit (wall-clock figures excepted), and leave nothing behind.  Of the page, which is killed
while it draws, the strip must be that of an undisturbed server, up to some whole part.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from PIL import Image

from equimini.page.history import History
from tests.evaluate.test_evaluate import TinyNet
from tests.helpers.scripts import GENERATOR, TOKENIZER, call
from tests.soak.common import ENVIRONMENT, ROOT, Progress, figures

EVERY = ["--val-every", "7", "--preview-every", "10", "--deterministic"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TIMES = ("images_per_s", "built")  # what may differ
PER_RUN = 8  # kills of a run, after which it may end
INDEX = """import sys, equimini.training.index as index
index.SMALL, index.PAUSE = 0, 0.1
index.open_source("many.tar", sys.argv[2])"""


class Job(NamedTuple):
    """words: of a fresh start, in front of --out; again: where the file `there` is, instead."""

    words: list[str]
    again: list[str] | None = None
    there: str = "last.pt"


def make_jobs(folder: Path) -> dict[str, Job]:
    """Train the models that the jobs need, and say what they run."""
    call("train_tokenizer.py", *TOKENIZER, "--steps", 6, cwd=folder)
    call("train_generator.py", *GENERATOR, "--steps", 6, cwd=folder)
    torch.jit.script(TinyNet()).save(str(folder / "net.pt"))
    call("equimini.training.cache_latents", "--images", 64, "--workers", 0, "--out", "cached", cwd=folder)
    with tarfile.open(folder / "many.tar", "w") as archive:
        for k in range(20_000):
            (info := tarfile.TarInfo(f"{k % 10}/{k}.png")).size = 0
            archive.addfile(info)
    os.utime(folder / "many.tar", (0, 0))
    tokenizer, generator = str(ROOT / "train_tokenizer.py"), str(ROOT / "train_generator.py")
    steps, checkpoint = ["--steps", "40"], ["--checkpoint", "runs/generator/last.pt", "--steps", "1"]
    scroll = [str(ROOT / "sample.py"), *checkpoint, "--scroll", "1500", "--tile-columns", "50"]
    return {
        "tokenizer": Job([tokenizer, *TOKENIZER, *EVERY, *steps], [tokenizer, "--resume"]),
        "generator": Job([generator, *GENERATOR, *EVERY, *steps], [generator, "--resume"]),
        "generator from latents": Job([generator, *GENERATOR, *EVERY, *steps, "--latents", "cached"],
                                      [generator, "--resume"]),
        "generator in 2 processes": Job([*TORCHRUN, generator, *GENERATOR, *EVERY, *steps],
                                        [*TORCHRUN, generator, "--resume"]),
        "cache_latents": Job(["-m", "equimini.training.cache_latents", "--workers", "0"]),
        "evaluate": Job(["-m", "equimini.evaluate", "generator", *checkpoint, "--network", "net.pt",
                         "--cfg", "1,2", "--n", "600", "--workers", "0", "--cache", "features"]),
        "scroll": Job(scroll, [*scroll, "--resume"], "state.pt"),
        "index": Job(["-c", INDEX])}


def start(job: Job, out: Path) -> subprocess.Popen:
    words = job.again if job.again and (out / job.there).exists() else job.words
    return subprocess.Popen([sys.executable, *words, "--out", out.name], cwd=out.parent,
                            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def changed(out: Path) -> int:
    """The latest change of anything in a folder, nanoseconds."""
    times = [0]
    for path in [out, *out.rglob("*")]:
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:  # renamed meanwhile
            pass
    return max(times)


def finish(job: Job, out: Path) -> float:
    """Let it end, which it must; returns the seconds since it first wrote something."""
    process, before, begun = start(job, out), changed(out), None
    while process.poll() is None:
        begun = begun or (time.time() if changed(out) != before else None)
        time.sleep(0.02)
    if errors := process.stderr.read() if process.returncode else "":
        raise SystemExit(f"a run failed:\n{errors}")
    return time.time() - (begun or time.time())


def kill(job: Job, out: Path, seconds: float, draw: random.Random) -> bool:
    """Start it and kill it, mostly while it works; False if it ended before."""
    process, before, begun = start(job, out), changed(out), time.time()
    early = draw.random() < 0.1
    while not early and process.poll() is None and changed(out) == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, time.time() - begun if early else 0.6 * seconds))
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    errors = process.communicate()[1]
    if not alive and process.returncode:
        raise SystemExit(f"after a kill it ends with exit code {process.returncode}:\n{errors}")
    return alive


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of all entries in which two nests differ."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        same = type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b), a.dtype in (
            torch.float32, np.float32))
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a.keys() - TIMES for d in differences(a[k], b[k], f"{name}.{k}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def content(path: Path, out: str) -> Any:
    """What is compared of a file."""
    match path.suffix:
        case ".pt":
            found = torch.load(path, weights_only=True)
            [found.pop(name, None) for name in ("config", "settings")]  # hold the folder's name
            return found
        case ".npz":
            with np.load(path) as file:
                found = {name: file[name] for name in file.files}
            return found | ({"about": json.loads(found["about"].tobytes())} if "about" in found else {})
        case ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()]
        case ".png":
            return np.asarray(Image.open(path))
    return path.read_bytes().replace(out.encode(), b"OUT")


def compare(whole: Path, killed: Path) -> list[str]:
    """Everything in which two output folders differ; leftovers of dead processes, too."""
    names = [{str(p.relative_to(out)) for p in out.rglob("*")} for out in (whole, killed)]
    if names[0] != names[1]:
        return [f"files {names[0] ^ names[1]}"]
    return [d for name in sorted(names[0]) if (whole / name).is_file() for d in differences(
        *(content(out / name, out.name) for out in (whole, killed)), name)]


def soak(name: str, job: Job, kills: int, folder: Path, done: Progress, draw: random.Random) -> None:
    """Runs that are killed until there were so many kills."""
    whole, killed = folder / "whole", folder / "killed"
    for path in (whole, killed, folder / "features"):
        shutil.rmtree(path, ignore_errors=True)
    seconds = finish(job, whole)
    while done[name] < kills:
        for path in (killed, folder / "features"):
            shutil.rmtree(path, ignore_errors=True)
        now = 0
        while now < min(PER_RUN, kills - done[name]) and kill(job, killed, seconds, draw):
            now += 1
        finish(job, killed)
        if found := compare(whole, killed):
            raise SystemExit(f"{name}: after {now} kills these differ: {', '.join(found[:10])}")
        done.add(name, now)
        done.add(f"{name}, runs")
        done.save()


def page(kills: int, folder: Path, done: Progress, draw: random.Random) -> None:
    """Kill the server while it draws 256 columns; the strip must be a part of what it draws."""
    from equimini import load_generator
    from equimini.sampling.strip import row_type
    row, out = row_type(load_generator(folder / "runs/generator/last.pt")), folder / "strip"
    words = [sys.executable, "-m", "equimini.page", "--checkpoint", "runs/generator/last.pt",
             "--port", "0", "--out", "strip"]
    whole, seconds = None, 30.0
    while whole is None or done["page"] < kills:
        server = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        host = server.stdout.readline().split("/")[2]
        state = ask(host, "GET", "/state")
        ask(host, "POST", f"/new?version={state['version']}", "{}")
        link = http.client.HTTPConnection(host, timeout=60)
        begun = time.time()
        link.request("POST", "/draw", json.dumps({"columns": 256, "seed": 3, "steps": 2}))
        if whole is None:
            link.getresponse().read()
            seconds = time.time() - begun
        else:
            time.sleep(draw.uniform(0, seconds))
            done.add("page")
        server.kill()
        server.wait()
        link.close()
        strip = History(out, row)
        whole = strip.columns if whole is None else whole
        n = len(strip.columns)
        if len(whole) != 256 or n % 64 or strip.columns["token"].tobytes() != (
                whole["token"][:n].tobytes()) or n == 256 and strip.columns.tobytes() != whole.tobytes():
            raise SystemExit(f"page: after a kill the strip of {n} columns is another one")
        done.add("page, columns", n)
    done.save()


def ask(host: str, method: str, path: str, body: str | None = None) -> Any:
    link = http.client.HTTPConnection(host, timeout=60)
    link.request(method, path, body)
    return json.loads(link.getresponse().read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="of each command [30]")
    parser.add_argument("--only", nargs="*", help="these commands [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="counts are kept here")
    args = parser.parse_args()
    done = Progress(args.out.resolve() / "kills.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs: dict[str, Job | Callable] = {**make_jobs(folder), "page": page}
        for what in args.only or jobs:
            begun, draw = time.time(), random.Random(f"{args.seed} {what} {done[what]}")
            if what == "page":
                page(args.kills, folder, done, draw)
            else:
                soak(what, jobs[what], args.kills, folder, done, draw)
            figures(f"kills, {what}", begun, kills=done[what], runs=done[f"{what}, runs"])


if __name__ == "__main__":
    main()
