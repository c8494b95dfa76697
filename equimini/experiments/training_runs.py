"""Trainings as parts of an experiment: each a script's run in a folder of its own.

A run that is done is not started again, one that was interrupted goes on where it was, and one
may begin as a copy of another (a fork), so that what two variants share is trained once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from equimini.utils.files import replacing

ROOT = Path(__file__).parents[2]  # where the training scripts lie


@dataclass(frozen=True)
class TrainingRun:
    """A training: its folder, its steps, its flags, and the run that it continues, if any.

    A fork starts from the last checkpoint of `fork`, at that run's number of steps, and is the
    same as a training with these flags from the beginning as long as the flags that differ have
    no effect before.
    """

    kind: str  # 'tokenizer' or 'generator'
    folder: Path
    steps: int
    flags: list[str] = field(default_factory=list)
    fork: TrainingRun | None = None

    @property
    def last(self) -> Path:
        """Its checkpoint."""
        return self.folder / "last.pt"

    def steps_done(self) -> int:
        """Steps of its last checkpoint, 0 without one."""
        if not self.last.exists():
            return 0
        content = checkpoint.load(self.last, self.kind)
        if self.kind == "tokenizer" and content["step"] == self.steps:
            tokenizer = checkpoint.tokenizer_from_dict(content, self.last)
            return self.steps if tokenizer.has_statistics else self.steps - 1
        return content["step"]

    def train(self) -> None:
        """Train to the end what is not trained yet; raises UserError if the training fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.fork and not self.last.exists():
            shutil.copyfile(self.fork.folder / "log.jsonl", self.folder / "log.jsonl")
            with replacing(self.last) as file, open(self.fork.last, "rb") as source:
                shutil.copyfileobj(source, file)
        if self.steps_done() >= self.steps:
            print(f"{self.folder}: {self.steps} steps done already", flush=True)
            return
        script = ROOT / f"train_{self.kind}.py"
        if not script.exists():
            raise UserError(f"{script} is not there; run experiments from a checkout of the "
                            "repository, installed with pip install -e")
        command = [sys.executable, str(script), "--out", str(self.folder), "--steps",
                   str(self.steps), *self.flags]
        command += ["--resume"] if self.last.exists() else []
        print("$ " + " ".join(["python", script.name, *command[2:]]), flush=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the training got it, too: let it write its checkpoint
                code = process.wait()
        if code > 128:
            raise KeyboardInterrupt
        if code:
            raise UserError(f"the training in {self.folder} ended with exit code {code} (see "
                            "above); the same command goes on with what is not done yet")


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Remember in plan.json what an experiment's folder is for.

    Raises UserError for a folder of an experiment with other settings.
    """
    path, plan = out / "plan.json", json.loads(json.dumps(plan))
    if path.exists():
        before = json.loads(path.read_text())
        if before != plan:
            names = sorted(k for k in before.keys() | plan.keys() if before.get(k) != plan.get(k))
            raise UserError(f"{out} holds this experiment with other settings ({', '.join(names)});"
                            " give the same ones to go on with it, or another --out")
    elif any(out.iterdir()):
        raise UserError(f"{out} holds files that are not this experiment's; choose another --out")
    with replacing(path) as file:
        file.write(json.dumps(plan, indent=1).encode())
