"""Several processes (gloo) and gradient accumulation against one process that does it all."""

import functools
import os
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equimini.noise import rng
from equimini.presets import GeneratorTraining
from equimini.training.generator_trainer import GeneratorTrainer
from equimini.training.loop import micro_batches
from equimini.utils import distributed
from equimini.utils.errors import UserError
from tests.helpers.scripts import ENDLESS, ENVIRONMENT, GENERATOR, TOKENIZER, call, command, start
from tests.training.test_scripts import records

SLOW = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def together(script, *arguments, cwd):
    """A script in two processes, as torchrun starts it; returns what was printed."""
    done = subprocess.run([*TORCHRUN, *command(script, *arguments)[1:]], cwd=cwd,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What tests/helpers/processes.py saves in so many processes, by script and pieces."""
    @functools.cache
    def in_processes(n):
        folder = tmp_path_factory.mktemp(f"processes{n}")
        run = call if n == 1 else together
        run("tests/helpers/processes.py", folder, cwd=folder)
        return {(kind, k): torch.load(folder / f"{kind}-{k}.pt")
                for kind in ("generator", "tokenizer", "mean-flow") for k in (1, 2)}
    return in_processes


@pytest.mark.parametrize("processes, accumulate", (
    (1, 2), pytest.param(2, 1, marks=SLOW), pytest.param(2, 2, marks=SLOW)))
@pytest.mark.parametrize("kind", ("generator", "tokenizer", "mean-flow"))
def test_processes_and_pieces_give_the_losses_and_gradients_of_one(found, kind, processes,
                                                                   accumulate):
    """1 × 8 images against 1 × (2 × 4), 2 × 4 and 2 × (2 × 2).

    Sums in another order differ by float32's rounding, 6e-8 of the largest term; over the few
    thousand terms of a gradient that grows like a random walk, to some 1e-5 of its norm.  Losses
    of later steps are those of weights that Adam moved by ±lr, whatever the gradient's size, so
    that a sign that flips at a gradient near zero shows: they are compared to 1e-3.
    """
    one, other = found(1)[kind, 1], found(processes)[kind, accumulate]
    expected = {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in one["logged"][0].items()}
    assert other["logged"][0] == expected
    assert [r["loss"] for r in other["logged"]] == pytest.approx(
        [r["loss"] for r in one["logged"]], rel=1e-3)
    assert len(other["gradients"]) == len(one["gradients"])
    mine, theirs = one["gradients"][0], other["gradients"][0]
    assert (mine - theirs).norm() < 1e-5 * mine.norm()
    if kind == "tokenizer":  # the critic's first step; the adaptive weight is of all images
        weights = [run["logged"][1]["adaptive_weight"] for run in (one, other)]
        assert weights[1] == pytest.approx(weights[0], rel=1e-3) and weights[0] > 0


@SLOW
def test_both_scripts_in_two_processes_and_resumed_in_one(tmp_path):
    """Only one writes; all held-out pictures count once; the number of processes may change."""
    more = ["--dropout", 0, "--val-images", 7]
    for kind, flags in (("tokenizer", TOKENIZER), ("generator", GENERATOR)):
        script, folders = f"train_{kind}.py", {n: tmp_path / f"{kind}-{n}" for n in (1, 2)}
        flags = [*flags, *more, *(["--discriminator", "none"] if kind == "tokenizer" else
                                   ["--tokenizer", tmp_path / "tokenizer-1/last.pt"])]
        printed = together(script, *flags, "--steps", 3, "--out", folders[2], cwd=tmp_path)
        assert printed.count("held out)") == 1 and printed.count("done: ") == 1
        call(script, "--resume", "--steps", 6, "--out", folders[2], cwd=tmp_path)
        call(script, *flags, "--steps", 6, "--out", folders[1], cwd=tmp_path)
        mine, theirs = (records(folders[n] / "log.jsonl") for n in (1, 2))
        assert [r["step"] for r in mine] == [r["step"] for r in theirs]
        for a, b in zip(mine, theirs):
            for name in {"loss", "val_loss", "val_psnr"} & a.keys():
                assert b[name] == pytest.approx(a[name], rel=1e-3), (kind, a["step"], name)
        weights = [torch.load(folders[n] / "last.pt")["ema"] for n in (1, 2)]
        for name in ("latent_mean", "latent_std"):
            if name in weights[0]:
                torch.testing.assert_close(*(w[name] for w in weights), rtol=1e-2, atol=1e-3)


@SLOW
def test_two_processes_cache_the_latents_of_one(runs, tmp_path):
    program = ["-m", "equimini.training.cache_latents", "--tokenizer", runs / "runs/tokenizer/last.pt",
               "--images", 1030, "--workers", 0]  # two shards
    subprocess.run([sys.executable, *map(str, program), "--out", tmp_path / "one"],
                   env=ENVIRONMENT, check=True, capture_output=True)
    subprocess.run([*TORCHRUN, *map(str, program), "--out", tmp_path / "two"], env=ENVIRONMENT,
                   check=True, capture_output=True)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert sum(n.startswith("train-") and n.endswith(".npy") for n in names) == 2
    for name in names:
        if name.endswith(".npy"):
            assert np.array_equal(*(np.load(tmp_path / n / name) for n in ("one", "two")))
        elif name.endswith((".json", ".labels")):
            assert len({(tmp_path / n / name).read_bytes() for n in ("one", "two")}) == 1


def start_endless(tmp_path, launcher=TORCHRUN, workers=0):
    return start([*launcher, *command("train_tokenizer.py", *ENDLESS, "--workers", workers)[1:]],
                 tmp_path, tmp_path / "runs/tokenizer/log.jsonl")


def children(process):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                         text=True).stdout
    return sorted(map(int, out.split()))


@SLOW
def test_a_dead_process_ends_the_training_with_an_error(tmp_path):
    process = start_endless(tmp_path)
    os.kill(children(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output


@SLOW
def test_a_stopped_training_leaves_one_checkpoint_of_one_step(tmp_path):
    process = start_endless(tmp_path)
    os.killpg(process.pid, signal.SIGTERM)  # all get it, and torchrun hands it on once more
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and output.count("a checkpoint is written") == 1
    step = torch.load(tmp_path / "runs/tokenizer/last.pt")["step"]
    assert step == records(tmp_path / "runs/tokenizer/log.jsonl")[-1]["step"] > 0


def set_launcher(monkeypatch, **variables):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_variables_that_a_launcher_left_behind(monkeypatch):
    """A plain run, or one clear error; never a process that writes nothing."""
    set_launcher(monkeypatch, RANK=16)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for variables, text in ((dict(WORLD_SIZE=2), "RANK is not"),
                            (dict(WORLD_SIZE=2, RANK=0), "MASTER_ADDR is not"),
                            (dict(WORLD_SIZE=2, RANK=2, MASTER_ADDR="x", MASTER_PORT=1),
                             "RANK=2 is too large"), (dict(WORLD_SIZE="two"), "WORLD_SIZE")):
        set_launcher(monkeypatch, **variables)
        with pytest.raises(UserError, match=text):
            distributed.is_main()
    set_launcher(monkeypatch, WORLD_SIZE=2, RANK=0, MASTER_ADDR="localhost", MASTER_PORT=29571)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=1))
    with pytest.raises(UserError, match="did not meet.*unset WORLD_SIZE"):
        with distributed.processes(torch.device("cpu")):
            pass


def test_the_shift_belongs_to_the_place_in_the_global_batch(monkeypatch):
    """Whatever the number of processes and micro-batches; one for each group of images."""
    shift, opts = GeneratorTrainer.shift, GeneratorTraining(shift_group=3, position_shift=16)
    trainer = SimpleNamespace(cfg=opts, seed=5)

    def all_images(processes, accumulate):
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        found = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda: rank)
            found += [shift(trainer, 7, part).tolist()
                      for part in micro_batches(24 // processes, accumulate)]
        return sum(found, [])

    one = all_images(1, 1)
    assert one == all_images(2, 1) == all_images(1, 4) == all_images(3, 2)
    groups = [set(one[i:i + 3]) for i in range(0, 24, 3)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) > 3
    assert set(one) <= set(range(16))
    trainer.cfg = GeneratorTraining(shift_group=0)  # runs begun before
    assert shift(trainer, 7, next(micro_batches(4, 1))) == rng("shift", 5, 7).integers(16)


@SLOW
def test_a_killed_loader_ends_the_training_with_one_sentence(tmp_path):
    """Also the other loader, which ignores SIGTERM."""
    process = start_endless(tmp_path, [sys.executable], 2)
    os.kill(children(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "--workers 0" in output and "Traceback" not in output


def test_a_batch_that_cannot_be_shared_is_an_error(monkeypatch):
    set_launcher(monkeypatch, WORLD_SIZE=3, RANK=0, MASTER_ADDR="x", MASTER_PORT=1)
    assert distributed.local_batch(9) == 3
    with pytest.raises(UserError, match="multiple of 3"):
        distributed.local_batch(8)
