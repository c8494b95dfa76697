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
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

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
ORDER = {"columns": 256, "classes": [0] * 256, "seed": 3, "steps": 2}  # of the page
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
    """What the jobs run; the models and files that they need are made once."""
    if not (folder / "many.tar").exists():
        call("train_tokenizer.py", *TOKENIZER, "--steps", 6, "--overwrite", cwd=folder)
        call("train_generator.py", *GENERATOR, "--steps", 6, "--overwrite", cwd=folder)
        torch.jit.script(TinyNet()).save(str(folder / "net.pt"))
        call("equimini.training.cache_latents", "--images", 64, "--workers", 0, "--out", "cached",
             cwd=folder)
        with tarfile.open(folder / "making.tar", "w") as archive:
            for k in range(20_000):
                archive.addfile(tarfile.TarInfo(f"{k % 10}/{k}.png"))
        os.utime(folder / "making.tar", (0, 0))  # long ago: its index is trusted
        (folder / "making.tar").rename(folder / "many.tar")
    tokenizer, generator = str(ROOT / "train_tokenizer.py"), str(ROOT / "train_generator.py")
    steps = ["--steps", "40"]
    checkpoint = ["--checkpoint", "runs/generator/last.pt", "--steps", "1"]
    scroll = [str(ROOT / "sample.py"), *checkpoint, "--scroll", "1500", "--tile-columns", "50",
              "--classes", "0:30,1:20"]
    return {
        "tokenizer": Job([tokenizer, *TOKENIZER, *EVERY, *steps], [tokenizer, "--resume"]),
        "generator": Job([generator, *GENERATOR, *EVERY, *steps], [generator, "--resume"]),
        "generator from latents": Job(
            [generator, *GENERATOR, *EVERY, *steps, "--latents", "cached"], [generator, "--resume"]),
        "generator in 2 processes": Job([*TORCHRUN, generator, *GENERATOR, *EVERY, *steps],
                                        [*TORCHRUN, generator, "--resume"]),
        "cache_latents": Job(["-m", "equimini.training.cache_latents", "--workers", "0"]),
        "evaluate": Job(["-m", "equimini.evaluate", "generator", *checkpoint, "--network", "net.pt",
                         "--cfg", "1,2", "--n", "600", "--workers", "0", "--cache", "features"]),
        "scroll": Job(scroll, [*scroll, "--resume"], "state.pt"),
        "index": Job(["-c", INDEX])}


class Running:
    """A command in a process that is forked from this one, which has imported torch already."""

    def __init__(self, job: Job, out: Path) -> None:
        words = job.again if job.again and (out / job.there).exists() else job.words
        self.said, self.code = out.parent / "said.txt", None
        if not (pid := os.fork()):
            try:
                os.setsid()
                os.chdir(out.parent)
                said = os.open(self.said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(said, 1), os.dup2(said, 2)
                os._exit(run([*words, "--out", out.name]))
            finally:
                os._exit(1)
        self.pid = pid

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        if self.code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(found[1])
        return self.code

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run(words: list[str]) -> int:
    """Python's command line in this process; returns the exit code."""
    if words[:2] == TORCHRUN[:2]:
        os.execve(sys.executable, [sys.executable, *words], ENVIRONMENT)
    sys.argv = words[words[0] == "-m":] if words[0] != "-c" else ["-c", *words[2:]]
    try:
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def changed(out: Path) -> int:
    """The latest change of anything in a folder, nanoseconds; 0 where there is none."""
    times = [0]
    for path in [out, *out.rglob("*")]:
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:  # renamed meanwhile
            pass
    return max(times)


def finish(job: Job, out: Path) -> float:
    """Let it end, which it must; returns the seconds since it first wrote something."""
    before, process, begun = changed(out), Running(job, out), None
    while process.poll() is None:
        begun = begun or (time.time() if changed(out) != before else None)
        time.sleep(0.02)
    if process.code:
        raise SystemExit(f"a run failed:\n{process.said.read_text()}")
    return time.time() - (begun or time.time())


def kill(job: Job, out: Path, seconds: float, draw: random.Random) -> bool:
    """Start it and kill it, mostly while it works; False if it ended before."""
    before, process, begun = changed(out), Running(job, out), time.time()
    early = draw.random() < 0.1
    while not early and process.poll() is None and changed(out) == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, time.time() - begun if early else 0.6 * seconds))
    alive = process.poll() is None
    if alive:
        process.kill()
    elif process.code:
        raise SystemExit(f"after a kill it ends with exit code {process.code}:\n"
                         f"{process.said.read_text()}")
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
            about = found.get("about")  # JSON, of an index
            return found if about is None else found | {"about": json.loads(about.tobytes())}
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


def soak(name: str, job: Job, kills: int, folder: Path, done: Progress,
         draw: random.Random) -> None:
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
        server = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                  text=True)
        host = server.stdout.readline().split("/")[2]
        state = ask(host, "GET", "/state")
        ask(host, "POST", f"/new?version={state['version']}", "{}")
        link = http.client.HTTPConnection(host, timeout=60)
        begun = time.time()
        link.request("POST", "/draw", json.dumps(ORDER))
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
        same = strip.columns["token"].tobytes() == whole["token"][:n].tobytes()
        if len(whole) != 256 or n % 64 or not same or (
                n == 256 and strip.columns.tobytes() != whole.tobytes()):
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
    folder = args.out.resolve() / "kills"
    folder.mkdir(exist_ok=True)
    jobs: dict[str, Job | None] = {**make_jobs(folder), "page": None}
    for what in args.only or jobs:
        begun, draw = time.time(), random.Random(f"{args.seed} {what} {done[what]}")
        if job := jobs[what]:
            soak(what, job, args.kills, folder, done, draw)
        else:
            page(args.kills, folder, done, draw)
        figures(f"kills, {what}", begun, kills=done[what], runs=done[f"{what}, runs"])


if __name__ == "__main__":
    main()
