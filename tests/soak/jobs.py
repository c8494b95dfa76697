"""Real commands at small sizes, run in processes that can be disturbed, and their files compared."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tarfile
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from equimini.evaluate import feature_shards
from equimini.training import cache_latents, index
from equimini.utils import command_line
from tests.evaluate.test_evaluate import TinyNet
from tests.helpers.scripts import ENVIRONMENT, GENERATOR, ROOT, TOKENIZER, call
from tests.training.test_scripts import same

EVERY = ["--val-every", "7", "--preview-every", "10", "--deterministic"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class Job(NamedTuple):
    """words: of a fresh start, OUT for its folder; again: where the file `there` is, instead."""

    words: list[str]
    again: list[str] | None = None
    there: str = "last.pt"


def make_jobs(folder: Path) -> dict[str, Job]:
    """What the jobs run; the models and files that they need are made once."""
    if not (folder / "many.tar").exists():
        folder.mkdir(exist_ok=True)
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
    out = ["--out", "OUT"]

    def training(kind: str, *more: str, first: tuple[str, ...] = ()) -> Job:
        script = [*first, str(ROOT / f"train_{kind}.py")]
        flags = TOKENIZER if kind == "tokenizer" else GENERATOR
        return Job([*script, *flags, *EVERY, "--steps", "40", *more, *out],
                   [*script, "--resume", *out])

    checkpoint = ["--checkpoint", "runs/generator/last.pt", "--steps", "1", *out]
    scroll = [str(ROOT / "sample.py"), *checkpoint, "--scroll", "1500", "--tile-columns", "50",
              "--classes", "0:30,1:20"]
    return {
        "tokenizer": training("tokenizer"), "generator": training("generator"),
        "generator from latents": training("generator", "--latents", "cached"),
        "generator in 2 processes": training("generator", first=(*TORCHRUN,)),
        "cache_latents": Job(["cache", "--workers", "0", "--images", "300", *out]),
        "evaluate": Job(["-m", "equimini.evaluate", "generator", *checkpoint, "--network", "net.pt",
                         "--cfg", "1,2", "--n", "100", "--reference-n", "100", "--workers", "0",
                         "--cache", "OUT/features"]),
        "scroll": Job(scroll, [*scroll, "--resume"], "state.pt"),
        "index": Job(["search", "OUT"])}


def start(job: Job, out: Path) -> BaseProcess:
    """The command in a process forked from this one, which has imported torch already."""
    words = job.again if job.again and (out / job.there).exists() else job.words
    process = multiprocessing.get_context("fork").Process(
        target=run, args=([word.replace("OUT", out.name) for word in words], out.parent))
    process.start()
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
    within = {"search": lambda: index.open_source("many.tar", words[1]),
              "cache": cache_latents.main}
    try:
        if words[0] in within:
            command_line.run(within[words[0]])
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(words[0], run_name="__main__")
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
    times = [0]
    for path in [out, *out.rglob("*")]:
        with suppress(OSError):  # renamed meanwhile
            times.append(path.stat().st_mtime_ns)
    return max(times)


def finish(job: Job, out: Path) -> float:
    """Let it end, which it must; returns the seconds since it first wrote something."""
    before, process, begun = changed(out), start(job, out), None
    while process.is_alive():
        begun = begun or (time.time() if changed(out) != before else None)
        time.sleep(0.02)
    must_end_with(process, out, 0)
    return time.time() - (begun or time.time())


def must_end_with(process: BaseProcess, out: Path, *codes: int, seconds: float = 120) -> None:
    """One of these exit codes, in time; 2 and 130 (interrupted) without a traceback."""
    process.join(seconds)
    code, text = process.exitcode, said(out)
    faults = text.count("Traceback") - text.count("Exception ignored")  # a loader that just began
    if code not in codes or code and (faults > 0 or code == 2 and text.count("error: ") != 1):
        send(process, signal.SIGKILL)
        raise SystemExit(f"it ends with exit code {code}, not {codes}:\n{text}")


def said(out: Path) -> str:
    return (out.parent / "said.txt").read_text()


def at_work(job: Job, out: Path, seconds: float, draw: random.Random,
            early: bool = False) -> BaseProcess:
    """Start it and wait for a random moment while it works (early: or, now and then, before); it
    may have ended then."""
    before, process, begun = changed(out), start(job, out), time.time()
    early = early and draw.random() < 0.1
    while not early and process.is_alive() and changed(out) == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, time.time() - begun if early else 0.6 * seconds))
    return process


def content(path: Path, out: str) -> Any:
    """What is compared of a file: all but times, and the folder's name."""
    match path.suffix:
        case ".pt":
            found = torch.load(path, weights_only=True)
            return {name: found[name] for name in found.keys() - {"config", "settings"}}
        case ".npz":
            with np.load(path) as file:
                found = {name: (file[name].dtype, file[name].shape, file[name].tobytes())
                         for name in file.files}
            if "about" in found:  # JSON, of an index
                found["about"] = {**json.loads(found["about"][2]), "built": 0}
            return found
        case ".jsonl":
            return [{**json.loads(line), "images_per_s": 0}
                    for line in path.read_text().splitlines()]
        case ".png":
            return (image := Image.open(path)).size, image.tobytes()
    return path.read_bytes().replace(out.encode(), b"OUT")


def compare(whole: Path, killed: Path) -> list[str]:
    """The files in which two output folders differ; leftovers of dead processes, too."""
    names = {path.relative_to(out) for out in (whole, killed) for path in out.rglob("*")}
    return sorted(str(name) for name in names if not (
        (whole / name).is_dir() and (killed / name).is_dir()
        or (whole / name).is_file() and (killed / name).is_file()
        and same(*(content(out / name, out.name) for out in (whole, killed)))))
