"""Kill or disturb real commands at random moments, start them again, and compare their files.

    python -m tests.soak.kills --times 30 --what killed     # of each; continues in soak/kills.json
    python -m tests.soak.kills --only tokenizer scroll        # each kind of trouble once

CODES names the troubles; both disks need root, and a full one has room for one write more at each
start.  But for the first two the command must end with one sentence.  Started again it must end
with the files of one that was left alone, bit for bit (but for wall-clock figures), and no others.
"""

from __future__ import annotations

import argparse
import atexit
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
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from equimini.evaluate import feature_shards
from equimini.training import cache_latents, index
from equimini.utils import command_line
from tests.evaluate.test_evaluate import TinyNet
from tests.helpers.scripts import ENVIRONMENT, GENERATOR, ROOT, TOKENIZER, call
from tests.soak.common import Progress, figures, options
from tests.training.test_scripts import same

PER_RUN = 8  # kills of a run, after which it may end
BLOCK, WRITES = 4096, 30  # bytes of a tmpfs's blocks; steps in which it grows to what a run needs
CODES = {"killed": -signal.SIGKILL, "stopped": 0, "interrupted": 130, "loader killed": 2,
         "folder deleted": 2, "read-only": 2, "disk full": 2}  # a run's exit code, or 0 at its end
FLAGS = {"tokenizer": TOKENIZER, "generator": GENERATOR}
TRAINED = "--out OUT --val-every 7 --preview-every 10 --deterministic --steps 40"
SCROLL = "--scroll 1500 --tile-columns 50 --classes 0:30,1:20"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def make_jobs(folder: Path) -> dict[str, list[str]]:
    """Python's words for each job (OUT: its folder); the models and files they need, once."""
    if not (folder / "many.tar").exists():
        folder.mkdir(exist_ok=True)
        for kind, flags in FLAGS.items():
            call(f"train_{kind}.py", *flags, "--steps", 6, "--overwrite", cwd=folder)
        torch.jit.script(TinyNet()).save(str(folder / "net.pt"))
        call("equimini.training.cache_latents", "--images", 64, "--workers", 0, "--out", "cached",
             cwd=folder)
        with tarfile.open(folder / "making.tar", "w") as archive:
            for k in range(20_000):
                archive.addfile(tarfile.TarInfo(f"{k % 10}/{k}.png"))
        os.utime(folder / "making.tar", (0, 0))  # long ago: its index is trusted
        (folder / "making.tar").rename(folder / "many.tar")

    drawn = "--checkpoint runs/generator/last.pt --steps 1 --out OUT"
    tokenizer, generator = ([f"{ROOT}/train_{kind}.py", *flags, *TRAINED.split()]
                            for kind, flags in FLAGS.items())
    return {
        "tokenizer": tokenizer, "generator": generator,
        "generator from latents": [*generator, "--latents", "cached"],
        "generator in 2 processes": [*TORCHRUN, *generator],
        "cache_latents": "cache --workers 0 --images 300 --out OUT".split(),
        "evaluate": f"-m equimini.evaluate generator {drawn} --network net.pt --n 100 --cfg 1,2 "
                    "--reference-n 100 --workers 0 --cache OUT/features".split(),
        "scroll": f"{ROOT}/sample.py {drawn} {SCROLL}".split(), "index": ["search", "OUT"]}


def start(job: list[str], out: Path) -> BaseProcess:
    """The command in a process forked from this one, which has imported torch already."""
    begun = any((out / name).exists() for name in ("last.pt", "state.pt"))
    words = [word.replace("OUT", out.name) for word in job] + ["--resume"] * begun
    (process := get_context("fork").Process(target=run, args=(words, out.parent))).start()
    return process


def run(words: list[str], folder: Path) -> None:
    """Python's command line in this process; what it prints goes to said.txt."""
    os.chdir(folder)
    printed = os.open("said.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(printed, 1), os.dup2(printed, 2)
    if words[:2] == TORCHRUN[:2]:
        os.execve(sys.executable, [sys.executable, *words], ENVIRONMENT)
    sys.argv = words[words[0] == "-m":]
    index.SMALL, index.PAUSE = 0, 0.1  # small sizes that no option sets
    cache_latents.SHARD = feature_shards.SHARD = 64  # no fewer: "cached" is one shard
    here = {"search": lambda: index.open_source("many.tar", words[1]), "cache": cache_latents.main}
    try:
        if words[0] in here:
            command_line.run(here[words[0]])
        else:
            (runpy.run_module if words[0] == "-m" else runpy.run_path)(
                sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def family(pid: int) -> list[int]:
    """A process and all that it began, directly or not (torchrun's have a session of their own)."""
    below = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *(each for child in below.split() for each in family(int(child)))]


def send(process: BaseProcess, number: int) -> None:
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def changed(out: Path) -> int:
    """The latest change of anything in a folder, nanoseconds; 0 where there is none."""
    with suppress(OSError):  # renamed meanwhile
        return max(path.stat().st_mtime_ns for path in [out, *out.rglob("*")])
    return 0


def begin(job: list[str], out: Path) -> BaseProcess:
    """Start it and wait until it writes something, or ends."""
    before, process = changed(out), start(job, out)
    while process.is_alive() and changed(out) == before:
        time.sleep(0.01)
    return process


def finish(job: list[str], out: Path) -> float:
    """Let it end, which it must; returns the seconds since it first wrote something."""
    process, begun = begin(job, out), time.time()
    must_end_with(process, out, 0)
    return time.time() - begun


def must_end_with(process: BaseProcess, out: Path, *codes: int) -> None:
    """One of these exit codes, in time; 2 and 130 (interrupted) without a traceback."""
    process.join(600)
    code, text = process.exitcode, (out.parent / "said.txt").read_text()
    faults = text.count("Traceback") - text.count("Exception ignored") - text.count(
        "Unexpected error importing")  # a loader that just began; what torch logs of its own
    if code not in codes or code and (faults > 0 or code == 2 and text.count("error: ") != 1):
        send(process, signal.SIGKILL)
        raise SystemExit(f"it ends with exit code {code}, not {codes}:\n{text}")


def content(path: Path, out: str) -> Any:
    """What is compared of a file: all but times, and the folder's name."""
    match path.suffix:
        case ".pt":
            return torch.load(path, weights_only=True) | {"config": 0, "settings": 0}
        case ".npz":
            found = {name: (x.dtype, x.shape, x.tobytes()) for name, x in np.load(path).items()}
            if "about" in found:  # JSON, of an index
                found["about"] = {**json.loads(found["about"][2]), "built": 0}
            return found
        case ".jsonl":
            return [json.loads(x) | {"images_per_s": 0} for x in path.read_text().splitlines()]
        case ".png":
            return (image := Image.open(path)).size, image.tobytes()
    return path.read_bytes().replace(out.encode(), b"OUT")


def compare(whole: Path, killed: Path) -> list[str]:
    """The files in which two output folders differ; leftovers of dead processes as well."""
    a, b = ({path.relative_to(out): None if path.is_dir() else content(path, out.name)
             for path in out.rglob("*")} for out in (whole, killed))
    return sorted(str(name) for name in a.keys() | b.keys() if not (
        name in a and name in b and type(a[name]) is type(b[name]) and same(a[name], b[name])))


def disturb(what: str, process: BaseProcess, out: Path, pause: float) -> None:
    match what:
        case "killed":
            send(process, signal.SIGKILL)
        case "stopped" | "interrupted":
            send(process, signal.SIGSTOP if what == "stopped" else signal.SIGINT)
            time.sleep(pause if what == "stopped" else random.uniform(0, 0.3))
            send(process, signal.SIGCONT if what == "stopped" else signal.SIGINT)
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


def remount(out: Path, how: str) -> bool:
    words = ["mount", "-o", f"remount,{how}", out]
    return subprocess.run(words, capture_output=True).returncode == 0


def befall(what: str, job: list[str], out: Path, seconds: float, pause: float, times: int,
           draw: random.Random) -> int:
    """A run in which it happens, so many times at most; returns how often it did."""
    happened, disturbed = 0, job
    if what in ("interrupted", "loader killed") and "--workers" in job:
        disturbed = [*job, "--workers", "2"]
    while happened < times:
        if what == "killed" and draw.random() < 0.1:  # before it does anything
            process = start(disturbed, out)
        else:
            process = begin(disturbed, out)
            time.sleep(draw.uniform(0, 0.6 * seconds))
        if not process.is_alive():
            must_end_with(process, out, 0)
            return happened
        disturb(what, process, out, pause)
        must_end_with(process, out, 0, CODES[what])
        happened += 1
        if what == "read-only":
            must_end_with(start(job, out), out, 2)
            remount(out, "rw")
    finish(job, out)
    return happened


def fill(job: list[str], out: Path, needed: int) -> int:
    """Start again and again on a disk that grows; returns how many starts found it full."""
    for starts in range(10 * WRITES):
        remount(out, f"size={BLOCK + starts * max(BLOCK, needed // WRITES)}")
        must_end_with(process := start(job, out), out, 0, 2)
        if process.exitcode == 0:
            return starts
    raise SystemExit("with ten times the room it does not end")


def soak(name: str, what: str, job: list[str], folder: Path, seconds: float, done: Progress,
         args: argparse.Namespace) -> None:
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
        done.update({key: happened, f"{key}, runs": 1})
        done.save()
    figures(key, times=done[key], runs=done[f"{key}, runs"])


def main() -> None:
    args = options(__doc__, what=([*CODES], "of these"), only=([], "these commands; none: all"),
                   times=(1, "of each"), pause=(60.0, "seconds that it is stopped"),
                   seed=(0, "of the moments"), out=(Path("soak"), "counts are kept here"))
    done, folder = Progress(args.out.resolve() / "kills.json"), args.out.resolve() / "kills"
    jobs = make_jobs(folder)
    for name in args.only or jobs:
        shutil.rmtree(folder / "whole", ignore_errors=True)
        seconds = finish(jobs[name], folder / "whole")
        for what in args.what:  # not all have loaders, and torchrun answers for its own
            if ("--workers" in jobs[name] or what != "loader killed") and (
                    what in ("killed", "stopped") or "processes" not in name):
                soak(name, what, jobs[name], folder, seconds, done, args)


if __name__ == "__main__":
    main()
