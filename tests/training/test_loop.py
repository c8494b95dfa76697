"""The training loop's own parts; whole trainings are in test_scripts.py."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from equimini.training import loop as training
from equimini.training.loop import Ema, Stepper, cooldown, warmup_decay_lr
from equimini.training.options import RunConfig
from equimini.utils.errors import UserError, in_words
from equimini.utils.files import leave_locks, locked
from tests.helpers.scripts import ROOT


def test_images_per_second_do_not_count_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    with closing(training.Progress(0, 9, 8, "test")) as progress:
        for pause in (0, 50, 0, 0):  # between steps of one second
            now[0] += 1
            progress.step({"loss": 1.0, "lr": 0.1}, 0)
            with progress.paused():
                now[0] += pause
        assert progress.rate == pytest.approx(8)  # measured over three steps


class Stub:
    """A trainer whose held-out loss is given, from which a critic starts after two steps."""

    all_losses_from, model, stepper = 2, None, SimpleNamespace(skipped=0)
    ema = SimpleNamespace(distance=lambda model: 0.0)

    def __init__(self, losses):
        self.losses = iter(losses)

    def step(self, step, data, labels):
        return {"loss": 0.0, "lr": 0.0}

    def validate(self, loader):
        return {"val_loss": next(self.losses)}

    def preview(self, path):
        pass


@pytest.mark.parametrize("start, best, losses, saved", (
    (0, math.inf, [1.0, 0.5, 3.0, 4.0, 2.0], [1, 2, 3, 5]),  # the critic raises it: begin anew
    (2, 0.5, [3.0, 4.0, 2.0], [3, 5]),  # also when resumed just there
    (3, 3.0, [4.0, 2.0], [5])))
def test_best_is_chosen_among_steps_with_all_losses(tmp_path, start, best, losses, saved):
    run = RunConfig(val_every=1, workers=0)
    setup = SimpleNamespace(training=SimpleNamespace(steps=5, batch_size=1), run=run, start=start,
                            out=tmp_path, device=torch.device("cpu"))
    data, found = [(torch.zeros(1), 0, 0)], []

    class Data:
        def __len__(self):
            return 1

        def __getitem__(self, key):
            return data[0]

    training.train_steps("test", setup, Stub(losses), Data(), Data(), best,
                         lambda name, step, best: found.append((name, step)),
                         SimpleNamespace(asked=0, share=lambda: None))
    assert [step for name, step in found if name == "best.pt"] == saved


@pytest.mark.parametrize("warmup, decays", ((False, [0.9, 0.9, 0.9]),
                                            (True, [2 / 11, 3 / 12, 4 / 13])))
def test_the_average_moves_by_its_decay_and_copies_buffers(warmup, decays):
    model = torch.nn.BatchNorm1d(2)
    ema, expected = Ema(model, 0.9, warmup), torch.ones(2)
    for k, decay in enumerate(decays):
        with torch.no_grad():
            model.weight.fill_(k + 2.0)
            model.running_mean.fill_(k + 5.0)
        ema.update(model)
        expected = decay * expected + (1 - decay) * (k + 2)
        torch.testing.assert_close(ema.model.weight.data, expected)
        assert torch.equal(ema.model.running_mean, model.running_mean)
    assert model.weight.requires_grad and not ema.model.weight.requires_grad


def test_gradients_are_clipped_and_steps_that_are_not_finite_left_out():
    weight = torch.nn.Parameter(torch.zeros(2))
    stepper = Stepper(torch.optim.SGD([weight], lr=9.0), patience=2)

    def step(gradient):
        (weight * torch.tensor(gradient)).sum().backward()
        return stepper(lr=0.5, clip=1.0)

    assert step([3.0, 4.0]) == pytest.approx(5)  # the norm before clipping
    torch.testing.assert_close(weight.data, -0.5 * torch.tensor([0.6, 0.8]))
    assert step([0.3, 0.4]) == pytest.approx(0.5)  # below the limit, and nothing is left over
    after = -0.5 * torch.tensor([0.9, 1.2])
    torch.testing.assert_close(weight.data, after)
    assert math.isnan(step([math.nan, 0.0])) and stepper.skipped == 1
    torch.testing.assert_close(weight.data, after)
    with pytest.raises(UserError, match="not finite 2 times in a row"):
        step([math.inf, 0.0])


def test_learning_rate_rises_from_0_then_falls_in_steps():
    found = [warmup_decay_lr(k, 8.0, 4, 0.5, 3) for k in range(11)]
    assert found == [0, 2, 4, 6, 8, 8, 8, 4, 4, 4, 2]
    assert warmup_decay_lr(0, 8.0, 0) == warmup_decay_lr(999, 8.0, 0) == 8


def test_cooldown():
    assert [cooldown(k, 10, 0.4) for k in range(5, 11)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])
    assert cooldown(9, 10, 0) == 1


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with locked(tmp_path):
        with pytest.raises(UserError, match="another process is writing"):
            with locked(tmp_path):
                pass
        loader = os.fork()
        if not loader:  # outlives its killed parent for some seconds
            leave_locks()
            time.sleep(60)
            os._exit(0)
        time.sleep(0.5)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(loader, signal.SIGKILL)
        os.waitpid(loader, 0)
    with pytest.raises(UserError, match="gone: .*No such file"):  # deleted by someone meanwhile
        with locked(tmp_path / "gone"):
            pass


def test_any_error_ends_the_command_and_its_loaders():
    """Its traceback keeps the loader alive, whose processes ignore the SIGTERM that Python sends."""
    program = ("from torch.utils.data import DataLoader\n"
               "from equimini.utils.signals import leave_signals\n"
               "batches = iter(DataLoader(range(99), num_workers=1, worker_init_fn=leave_signals))\n"
               "next(batches)\nraise ValueError('a fault')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: a fault\n")


def test_a_second_ctrl_c_does_not_cut_off_the_exit():
    program = ("import atexit, os, signal\nfrom equimini.utils.command_line import run\n"
               "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
               "def main(): raise KeyboardInterrupt\nrun(main)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


@pytest.mark.parametrize("error, text", (
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "/dev/shm.*--workers 0"),
    (RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"),
     "/dev/shm.*--workers 0"),
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "was killed.*--workers 0"),
    (RuntimeError("unable to open shared memory object </torch_7> in read-write mode: Too many "
                  "open files (24)"), "ulimit -n"),
    (OSError(28, "No space left on device"), "disk is full"),
    (OSError(36, "File name too long", "x" * 300), "name x+… is too long"),
    (OSError(30, "Read-only file system", "last.pt"), "cannot write last.pt.*read-only")))
def test_errors_of_loader_processes_and_disks_have_a_sentence(error, text):
    assert re.search(text, in_words(error))
    assert in_words(RuntimeError("shapes do not fit")) is None
