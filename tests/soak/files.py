"""Damaged and odd files and command lines, thousands of them, made from right ones by a seed.

    python -m tests.soak.files --seconds 600             # for each kind; continues in soak/files
    python -m tests.soak.files --only scroll --case 17       # one case again, with its traceback

Bytes are changed at random, and, so that checksums do not end every case at once, what is inside:
members of a zip, values and keys of checkpoints and of JSON.  docs/reliability.md says what is
allowed, and what is a fault.
"""

from __future__ import annotations

import contextlib
import faulthandler
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
from pathlib import Path

import torch

from equimini.utils.errors import OUT_OF_MEMORY, in_words
from tests.soak.common import Progress, figures, memory, options
from tests.soak.targets import Target, damage, make_targets

SECONDS, BYTES = 10, 2**30  # of a processor, and of memory, that one case may take
BEGINS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")
ENDS = {40: "right", 41: "told"}  # a case's exit codes


def watch(folder: Path) -> list[str]:
    """What this process writes outside a folder, and what it begins, from now on."""
    seen = []

    def hook(event: str, args: tuple) -> None:
        writes = event in CHANGES or event == "open" and isinstance(args[2], int) and (
            args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event in BEGINS:
            seen.append(f"{event} {args}"[:200])
        elif writes and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith((str(folder), "/dev/")) and "__pycache__" not in path:
                seen.append(f"{event} {path}"[:200])
    sys.addaudithook(hook)
    return seen


def try_case(target: Target, case: int, folder: Path) -> str:
    """'right' or 'told'; raises what is a fault."""
    draw = random.Random(f"{target.name} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.files, folder)
    mutate = draw.choice(target.mutations)
    for name in draw.sample(target.mutated, min(1, len(target.mutated))):
        (folder / name).write_bytes(mutate(draw, (folder / name).read_bytes()))
    arguments = [] if target.mutated else [mutate(draw)]
    os.chdir(folder)
    seen, end = watch(folder), "right"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = target.use(*arguments)
    except (Exception, SystemExit) as error:
        if not told(error):
            raise
        end = "told"
    if seen:
        raise RuntimeError(f"outside its folder: {seen[:3]}")
    if end == "right" and mutate is damage and target.right not in (None, result):
        raise RuntimeError("a damaged file gives something else than the undamaged one")
    return end


def told(error: BaseException) -> bool:
    """Whether this is one sentence and exit code 2."""
    if isinstance(error, SystemExit):
        return error.code in (2, 0)  # argparse's own, and --help
    text = in_words(error) or ""
    return text != OUT_OF_MEMORY and len(text.splitlines()) == 1


def one(target: Target, case: int, folder: Path) -> tuple[str, str]:
    """'right', 'told', 'long' or 'fault' of a case in a process of its own; and the traceback."""
    said, says = os.pipe()
    if (process := os.fork()) == 0:
        os.dup2(says, 2)
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        faulthandler.register(signal.SIGPROF, chain=True)  # then it ends
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + BYTES,) * 2)
        try:
            os._exit(40 if try_case(target, case, folder) == "right" else 41)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    os.close(says)
    with open(said, errors="replace") as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code in (1, -signal.SIGPROF) and not target.mutated:  # a command may ask for much
        return "long", ""
    return ENDS.get(code, "fault"), text or f"exit code {code}"


def soak(target: Target, seconds: float, out: Path, progress: Progress, folder: Path) -> None:
    """Run cases of one kind; faults are printed and kept."""
    until = time.time() + seconds
    while time.time() < until:
        what, text = one(target, case := progress[target.name], folder)
        progress.update([target.name, f"{target.name} {what}"])
        progress.save()
        if what == "fault":
            (out / f"{target.name}-{case}.txt").write_text(text)
            print(f"{target.name}, case {case}:\n{text}", flush=True)


def main() -> None:
    args = options(__doc__, seconds=(600.0, "for each kind"), only=([], "these kinds; none: all"),
                   case=(-1, "run this one, and show what it raises"),
                   out=(Path("soak/files"), "counts and faults"))
    torch.set_num_threads(1)
    progress = Progress((out := args.out.resolve()) / "counts.json")
    with tempfile.TemporaryDirectory() as name:
        targets = make_targets(Path(name))
        for kind in args.only or targets:
            if args.case >= 0:
                print(*one(targets[kind], args.case, Path(name) / "case"), sep="\n")
            else:
                soak(targets[kind], args.seconds, out, progress, Path(name) / "case")
                figures(f"files, {kind}", cases=progress[kind], **{
                    end: progress[f"{kind} {end}"] for end in ("right", "told", "long", "fault")})


if __name__ == "__main__":
    main()
