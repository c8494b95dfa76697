"""Damaged and odd files and command lines, thousands of them, made from right ones by a seed.

    python -m tests.soak.files --seconds 600             # for each kind; continues in soak/files
    python -m tests.soak.files --only scroll --case 17       # one case again, with its traceback

Bytes are changed at random, and, so that checksums do not end every case at once, what is inside:
members of a zip, values and keys of checkpoints and of JSON.  Allowed is a right result, or one
sentence (exit code 2).  Faults are tracebacks, more than 10 s, more than a GiB of memory over what
the process had, a file written outside the case's folder, a process or a connection begun, and a
checkpoint whose bytes changed and that gives something else than before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equimini.utils.errors import OUT_OF_MEMORY, in_words
from tests.soak.common import Progress, figures
from tests.soak.mutations import damage
from tests.soak.targets import Target, make_targets

SECONDS, BYTES = 10, 2**30  # that one case may take
BEGINS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")


class Fault(Exception):
    """What must not happen, and is no traceback."""


class TooLong(BaseException):
    """Raised by the alarm; no `except Exception` hides it."""


class Watch:
    """An audit hook that notes what is written outside `folder`, and what is begun."""

    def __init__(self) -> None:
        self.folder, self.seen = None, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        writes = event in CHANGES or event == "open" and isinstance(args[2], int) and (
            args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in BEGINS:
            self.seen.append(f"{event} {args}"[:200])
        elif writes and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith((self.folder, "/dev/")) and "__pycache__" not in path:
                self.seen.append(f"{event} {path}"[:200])


def alarm(*_: Any) -> None:
    raise TooLong(f"more than {SECONDS} s")


def try_case(target: Target, case: int, folder: Path, watch: Watch) -> str:
    """'right' or 'told'; raises what is a fault."""
    draw = random.Random(f"{target.name} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.files, folder)
    mutate = draw.choice(target.mutations)
    argument = None
    if target.mutated:
        path = folder / draw.choice(target.mutated)
        path.write_bytes(mutate(draw, path.read_bytes()))
    else:
        argument = mutate(draw)
    os.chdir(folder)
    watch.folder, watch.seen = str(folder), []
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = target.use(argument) if argument is not None else target.use()
    except (Exception, SystemExit) as error:
        if not told(error):
            raise
        result = None
    finally:
        signal.alarm(0)
        watch.folder = None
    if watch.seen:
        raise Fault(f"outside its folder: {watch.seen[:3]}")
    if result is None:
        return "told"
    if mutate is damage and target.checked and result != target.right:
        raise Fault("a damaged file was taken, and gives something else than the undamaged one")
    return "right"


def told(error: BaseException) -> bool:
    """Whether this is one sentence and exit code 2."""
    if isinstance(error, SystemExit):
        return error.code in (2, 0)  # argparse's own, and --help
    text = in_words(error)
    return text is not None and text != OUT_OF_MEMORY and len(text.splitlines()) == 1


def prepare(target: Target) -> None:
    """In the process that runs cases: the alarm, the limit, and what the undamaged files give."""
    signal.signal(signal.SIGALRM, alarm)
    warnings.simplefilter("ignore")
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES,) * 2)
    target.right, target.watch = target.check() if target.checked else None, Watch()
    prepare.target = target


def one(case: int, folder: Path) -> tuple[str, str]:
    """'right', 'told', 'long' or 'fault', and of a fault the traceback."""
    target = prepare.target
    try:
        return try_case(target, case, folder, target.watch), ""
    except TooLong if not target.mutated else ():  # a command may ask for much
        return "long", ""
    except (Exception, TooLong, SystemExit):
        return "fault", traceback.format_exc()


def soak(target: Target, seconds: float, out: Path, progress: Progress, folder: Path) -> None:
    """Run cases of one kind; where the process itself dies, note it and take the next case."""
    until, places, pool = time.time() + seconds, set(), None
    while time.time() < until:
        pool = pool or ProcessPoolExecutor(1, get_context("fork"), prepare, (target,))
        case = progress[target.name]
        try:
            what, text = pool.submit(one, case, folder).result()
        except BrokenProcessPool:
            what, text, pool = "fault", "the process died", None
        progress.add(target.name)
        progress.add(f"{target.name} {what}")
        if what == "fault":
            report(target, case, text, out, places)
    progress.save()


def report(target: Target, case: int, text: str, out: Path, places: set) -> None:
    """Print each kind of fault once, by the lines that it came from."""
    frames = [line.strip() for line in text.splitlines() if line.startswith("  File")]
    place = tuple(frame for frame in frames if "equimini/" in frame)[-1:] + tuple(
        text.splitlines()[-1:] if not frames else [text.splitlines()[-1].split(":")[0]])
    if place not in places:
        places.add(place)
        print(f"{target.name}, case {case}:\n{text}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{target.name}-{case}.txt").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="for each kind [600]")
    parser.add_argument("--only", nargs="*", help="these kinds [all]")
    parser.add_argument("--case", type=int, help="run this one case, and show what it raises")
    parser.add_argument("--out", type=Path, default=Path("soak/files"), help="counts and faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    out, begun = args.out.resolve(), time.time()
    progress = Progress(out / "counts.json")
    with tempfile.TemporaryDirectory() as name:
        targets = make_targets(Path(name))
        if unknown := {*(args.only or ())} - {*targets}:
            raise SystemExit(f"no kind {', '.join(unknown)}; there are {', '.join(targets)}")
        for target in (targets[kind] for kind in args.only or targets):
            if args.case is not None:
                signal.signal(signal.SIGALRM, alarm)
                print(try_case(target, args.case, Path(name) / "case", Watch()))
                continue
            soak(target, args.seconds, out, progress, Path(name) / "case")
            figures(f"files, {target.name}", begun, cases=progress[target.name], **{
                what: progress[f"{target.name} {what}"]
                for what in ("right", "told", "long", "fault")
                if progress[f"{target.name} {what}"] or what == "fault"})
        os.chdir("/")


if __name__ == "__main__":
    main()
