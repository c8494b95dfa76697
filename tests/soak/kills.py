"""Kill or disturb real commands at random moments, start them again, and compare their files.

    python -m tests.soak.kills --times 30 --what killed     # of each; continues in soak/kills.json
    python -m tests.soak.kills --only tokenizer scroll        # each kind of trouble once

A command of tests/soak/jobs.py is killed (SIGKILL), stopped for a minute, interrupted twice in a
row, loses a process that loads pictures, finds its folder deleted, its disk read-only (both disks
need root), or full: a disk with room for one write more at each start.  But for the first two it
must end with one sentence.  Started again it must end with the files of one that was left alone,
bit for bit (wall-clock figures excepted), and leave nothing behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.soak.common import Progress, figures
from tests.soak.jobs import (Job, at_work, compare, family, finish, make_jobs, must_end_with, said,
                             send, start)

PER_RUN = 8  # kills of a run, after which it may end
BLOCK, WRITES = 4096, 30  # bytes of a tmpfs's blocks; steps in which it grows to what a run needs
TROUBLES = ("killed", "stopped", "interrupted", "loader killed", "folder deleted", "read-only",
            "disk full")


def disturb(what: str, process: BaseProcess, out: Path, pause: float) -> int:
    """Let it happen to a run; returns the exit code that it must have."""
    match what:
        case "killed":
            send(process, signal.SIGKILL)
            return -signal.SIGKILL
        case "stopped":
            send(process, signal.SIGSTOP)
            time.sleep(pause)
            send(process, signal.SIGCONT)
            return 0
        case "interrupted":
            send(process, signal.SIGINT)
            time.sleep(random.uniform(0, 0.3))
            send(process, signal.SIGINT)
            return 130
        case "loader killed":
            while len(found := family(process.pid)) < 2 and process.is_alive():
                time.sleep(0.01)
            for loader in found[1:2]:
                os.kill(loader, signal.SIGKILL)
        case "folder deleted":
            shutil.rmtree(out, ignore_errors=True)
        case "read-only":
            while not remount(out, "ro"):
                pass  # a file is open to be written
    return 2


def remount(out: Path, how: str) -> bool:
    return not subprocess.run(["mount", "-o", f"remount,{how}", out],
                              capture_output=True).returncode


def applies(what: str, name: str, job: Job) -> bool:
    """Whether a command can meet this: not all have loaders, and torchrun answers for its own."""
    return (what != "loader killed" or "--workers" in job.words) and (
        what in ("killed", "stopped") or "processes" not in name)


def befall(what: str, job: Job, out: Path, seconds: float, pause: float, times: int,
           draw: random.Random) -> int:
    """A run in which it happens, so many times at most; returns how often it did."""
    happened, disturbed = 0, job
    if what in ("interrupted", "loader killed") and "--workers" in job.words:
        disturbed = job._replace(words=[*job.words, "--workers", "2"])
    while happened < times:
        process = at_work(disturbed, out, seconds, draw, early=what == "killed")
        if not process.is_alive():
            must_end_with(process, out, 0)
            return happened
        must_end_with(process, out, 0, disturb(what, process, out, pause))  # 0: close to its end
        happened += 1
        if what == "read-only":
            must_end_with(start(job, out), out, 2)
            remount(out, "rw")
    finish(job, out)
    return happened


def fill(job: Job, out: Path, needed: int) -> int:
    """Start again and again on a disk that grows; returns how many starts found it full."""
    for starts in range(10 * WRITES):
        remount(out, f"size={BLOCK + starts * max(BLOCK, needed // WRITES)}")
        must_end_with(process := start(job, out), out, 0, 2)
        if process.exitcode == 0:
            return starts
    raise SystemExit(f"with ten times the room it still ends with {said(out)}")


def soak(name: str, what: str, job: Job, folder: Path, seconds: float, args: argparse.Namespace,
         done: Progress) -> None:
    """Runs until it happened so many times."""
    whole, out, key = folder / "whole", folder / "killed", f"{name}, {what}"
    needed = sum(path.stat().st_size for path in whole.rglob("*"))
    while (left := args.times - done[key]) > 0:
        shutil.rmtree(out, ignore_errors=True)
        with ExitStack() as disk:
            if what in ("read-only", "disk full"):
                out.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", out], check=True)
                disk.callback(subprocess.run, ["umount", "-l", out], check=True)
            happened = fill(job, out, needed) if what == "disk full" else befall(
                what, job, out, seconds, args.pause, min(left, PER_RUN if what == "killed" else 1),
                random.Random(f"{args.seed} {key} {done[key]}"))
            if found := compare(whole, out):
                raise SystemExit(f"{key}, {happened} times; these differ: {', '.join(found[:10])}")
        done.add(key, happened)
        done.add(f"{key}, runs")
        done.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=1, help="of each [1]")
    parser.add_argument("--what", nargs="*", default=TROUBLES, help="of these [all]")
    parser.add_argument("--only", nargs="*", help="these commands [all]")
    parser.add_argument("--pause", type=float, default=60, help="seconds that it is stopped [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="counts are kept here")
    args = parser.parse_args()
    done = Progress(args.out.resolve() / "kills.json")
    folder = args.out.resolve() / "kills"
    jobs = make_jobs(folder)
    for name in args.only or jobs:
        shutil.rmtree(folder / "whole", ignore_errors=True)
        seconds = finish(jobs[name], folder / "whole")
        for what in args.what:
            if applies(what, name, jobs[name]):
                begun = time.time()
                soak(name, what, jobs[name], folder, seconds, args, done)
                figures(f"{name}, {what}", begun, times=done[f"{name}, {what}"],
                        runs=done[f"{name}, {what}, runs"])


if __name__ == "__main__":
    main()
