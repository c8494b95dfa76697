"""Trainings as parts of an experiment: each a script's run in a process and a folder of its own.

A finished one is not trained again, an interrupted one resumes, and one may begin as a copy of
another (a fork), so that what two variants share is trained once.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equimini.utils.errors import UserError
from equimini.utils.files import replacing, write_text

ROOT = Path(__file__).parents[2]  # where the training scripts are


@dataclass(frozen=True)
class TrainingRun:
    """A training: its folder, its steps, its flags, and the run that it continues, if any.

    A fork starts from the last checkpoint of `fork`, at that run's number of steps.  It equals a
    training with these flags from the beginning if the flags that differ have no effect before.
    """

    kind: str  # 'tokenizer' or 'generator'
    folder: Path
    steps: int
    flags: list[str] = field(default_factory=list)
    fork: TrainingRun | None = None

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    def logged(self, name: str) -> Any:
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [record[name] for record in map(json.loads, lines) if name in record][-1]

    def record(self) -> dict[str, float]:
        """`cpu_seconds` of the training so far, and `steps` once it is finished."""
        path = self.folder / "record.json"
        return json.loads(path.read_text()) if path.exists() else {"cpu_seconds": 0.0}

    def train(self, *more: str) -> None:
        """Train what is not trained yet; more: flags on which the result does not depend.

        Raises UserError if the training fails, SystemExit with its code if it was stopped or has
        named a mistake.
        """
        if self.record().get("steps") == self.steps:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.fork and not self.last.exists():
            shutil.copyfile(self.fork.folder / "log.jsonl", self.folder / "log.jsonl")
            with replacing(self.last) as file, open(self.fork.last, "rb") as source:
                shutil.copyfileobj(source, file)
        before = self.record()["cpu_seconds"]
        code, seconds = run_script(f"train_{self.kind}.py", [
            *self.flags, *more, "--out", str(self.folder), "--steps", str(self.steps),
            *(["--resume"] if self.last.exists() else [])])
        done = {} if code else {"steps": self.steps}
        write_text(self.folder / "record.json",
                   json.dumps({"cpu_seconds": before + seconds, **done}))
        if code > 128:  # a signal's: the training has written its checkpoint
            print("the same command resumes here")
        if code == 2 or code > 128:  # 2: it has said what is wrong
            raise SystemExit(code)
        if code:
            raise UserError(f"the training in {self.folder} ended with exit code {code} (see "
                            "above); the same command resumes it")


def run_script(name: str, arguments: list[str]) -> tuple[int, float]:
    """The exit code of a script beside the package, and the CPU seconds that it took.

    Raises UserError if there is no such script.
    """
    script = ROOT / name
    if not script.exists():
        raise UserError(f"{script} is not there; run experiments from a checkout of the "
                        "repository, installed with pip install -e")
    print(f"$ python {name} {' '.join(arguments)}", flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    before = _seconds_of_children()
    with subprocess.Popen([sys.executable, str(script), *arguments],
                          env={**os.environ, "PYTHONPATH": path}) as process:
        usual = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sends it to the training as well
            code = process.wait()  # which first writes its checkpoint
        finally:
            signal.signal(signal.SIGTERM, usual)
    return code, _seconds_of_children() - before


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def losses(runs: list[TrainingRun]) -> np.ndarray:
    """Held-out losses per column of the EMA generators at their last step, (runs, N)."""
    return np.array([run.logged("val_loss_per_column") for run in runs])
