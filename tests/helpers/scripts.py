"""Calling the scripts as a user does, at small sizes."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOKENIZER = ("--image-size 32 --base-channels 8 --norm-groups 4 --z-channels 8 "
             "--attention-rows 8 --token-channels 8 --batch-size 4 --stats-images 16 "
             "--discriminator patchgan --disc-channels 8 --disc-layers 2 --adv-start 2 "
             "--workers 0 --val-images 8 --val-every 3 --preview-every 4 --save-every 3 "
             "--log-every 1").split()
GENERATOR = ("--layers 2 --embed-dim 32 --heads 2 --head-width 32 --head-depth 1 --batch-size 4 "
             "--dropout 0.1 --workers 0 --val-images 8 --val-every 3 --preview-every 4 "
             "--preview-steps 2 --save-every 3 --log-every 1").split()

TRAINED = ["--checkpoint", "runs/generator/last.pt"]  # what the fixture `runs` trained


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def call(script, *arguments, cwd):
    """Run a script in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command(script, *arguments), cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def invoke(program, *arguments, cwd, monkeypatch):
    """Run a script, or a module given as equimini.name, in this process (quicker than `call`)."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


def mistake(program, *arguments, cwd, monkeypatch, capsys):
    """Run what must fail with one clear error and exit code 2; returns its message."""
    with pytest.raises(SystemExit) as stop:
        invoke(program, *arguments, cwd=cwd, monkeypatch=monkeypatch)
    *bars, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message.startswith("error: ")
    assert all(not line.strip() or "|" in line or line.startswith("warning: ") for line in bars)
    return message
