"""Calling the scripts as a user does, at small sizes: nearly always in this process."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import time
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
ENDLESS = [*TOKENIZER, *"--steps 100000 --val-every 100000 --save-every 100000".split()]
TRAINED = ["--checkpoint", "runs/generator/last.pt"]  # what the fixture `runs` trained
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
               "OMP_NUM_THREADS": "1"}


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def process(script, *arguments, cwd):
    """Run a script in a process of its own; returns what it printed."""
    done = subprocess.run(command(script, *arguments), cwd=cwd, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def start(words, cwd, sign, seconds=120):
    """Start a command in the background; returns it as soon as the file `sign` holds something."""
    begun = subprocess.Popen(words, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.time() + seconds
    while not (sign.exists() and sign.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    return begun


def invoke(program, *arguments, cwd):
    """Run a script, or a module given as equimini.name, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")


def call(program, *arguments, cwd):
    """Run what must succeed, in this process; returns what it printed."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            invoke(program, *arguments, cwd=cwd)
    except SystemExit as stop:
        pytest.fail(f"exit code {stop.code}: {said.getvalue()}")
    return said.getvalue()


def mistake(program, *arguments, cwd):
    """Run what must fail with one clear error and exit code 2; returns its message."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(said):
        invoke(program, *arguments, cwd=cwd)
    *bars, message = said.getvalue().splitlines()
    assert stop.value.code == 2 and message.startswith("error: ")
    assert all(not line.strip() or "|" in line or line.startswith("warning: ") for line in bars)
    return message
