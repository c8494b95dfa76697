"""The first run on a GPU (tests/gpu), as far as a CPU can tell."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.scripts import ROOT, call, mistake

FOLDER = ROOT / "tests" / "gpu"
STEPS = {"smoke", "variants", "sweep", "elements", "pytest_attention", "pytest_gpu", "memcheck",
         "racecheck", "synccheck", "initcheck", "time", "attention_2_16_2_64_4",
         "sample_1", "sample_8", "sample_64", "train_plain", "train_bf16", "train_fast", "ncu",
         *(f"{step}_{variant}" for step in ("smoke", "time")
           for variant in ("as_is", "more_warps", "turn_first"))}


def rehearse(out, **environment):
    """The exit code, and by step what summary.txt says of it."""
    done = subprocess.run(["bash", FOLDER / "first_run.sh", "--rehearse"], capture_output=True,
                          text=True, env={**os.environ, "OUT": str(out), **environment})
    found = re.findall(r"^\[\d+ s\] (\w+): (exit code \d+|left out)",
                       (out / "summary.txt").read_text(), re.M)
    return done.returncode, dict(found), done.stdout + done.stderr


@pytest.fixture
def stub(tmp_path):
    """A python3 that says what it was asked for, and fails at the sweep."""
    program = tmp_path / "python3"
    program.write_text('#!/bin/sh\necho "{\\"ran\\": \\"$1 $2\\"}"\n'
                       'case "$*" in *"--cases 5"*) exit 3 ;; esac\n')
    program.chmod(0o755)
    return program


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_one_failure_loses_nothing_else(tmp_path, stub):
    code, steps, printed = rehearse(tmp_path / "out", PYTHON=str(stub))
    failed = {step for step, result in steps.items() if result != "exit code 0"}
    assert code == 1 and failed == {"sweep"}, printed
    assert set(steps) == STEPS
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == STEPS - {"variants"}
    assert (tmp_path / "out/ncu.csv").exists() and (tmp_path / "out/logs.tar.gz").exists()


def test_no_step_starts_when_the_time_is_over(tmp_path, stub):
    code, steps, printed = rehearse(tmp_path / "out", PYTHON=str(stub), DEADLINE="4")
    assert code == 1 and set(steps.values()) == {"left out"}, printed


@pytest.mark.slow
def test_rehearsal(tmp_path):
    code, steps, printed = rehearse(tmp_path, PYTHON=sys.executable)
    assert code == 0 and set(steps) == STEPS, printed


def test_photographs_are_packed(picture_folder, tmp_path):
    words = ("tests/gpu/pack_photos.py", "--data", picture_folder, "--out", "packed", "--limit")
    assert "12 pictures, quality" in call(*words, 0.02, cwd=tmp_path)
    target = tmp_path / "packed" / "train.zip"
    names = zipfile.ZipFile(target).namelist()
    assert sorted(names) == [f"{c}/{i}.webp" for c in ("cat", "dog", "eel") for i in range(4)]
    assert target.stat().st_size <= 0.02 * 2**20
    said = mistake(*words, 0.001, cwd=tmp_path)
    assert "--limit: 12 pictures do not fit" in said
