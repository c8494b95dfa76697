"""--dry-run and --recipe paper."""

import math

import pytest
import torch

from equimini.presets import GeneratorTraining, TokenizerTraining, paper_training
from equimini.training.dry_run import Saved, duration, parts, time_step
from equimini.utils.errors import UserError
from tests.helpers.scripts import GENERATOR, TOKENIZER, call, mistake

IMAGENET = 1_281_167


def test_the_paper_on_imagenet_is_what_the_presets_say():
    """Steps and warm-up of the presets were worked out for ImageNet, from the same epochs."""
    for kind, expected in (("generator", GeneratorTraining()), (
            "tokenizer", TokenizerTraining(perceptual="required", discriminator="dino",
                                           align="required"))):
        assert paper_training(kind, IMAGENET) == expected
    half = paper_training("generator", 1_000_000, 1024)
    assert (half.lr, half.steps) == (4e-4, math.ceil(1200 * 1e6 / 1024))


def test_a_dry_run_tells_all_and_writes_nothing(picture_folder, tmp_path):
    for script, flags in (("train_tokenizer.py", TOKENIZER), ("train_generator.py", GENERATOR)):
        printed = call(script, "--dry-run", *flags, "--data", picture_folder, cwd=tmp_path)
        for text in ("batch-size", "steps  ", "effective batch        4 = 1 processes x 1 micro-batches",
                     "learning rate", "M trained", "memory per process", "time per epoch"):
            assert text in printed
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    printed = call("train_tokenizer.py", "--dry-run", "--recipe", "paper", *TOKENIZER, "--data",
                   picture_folder, cwd=tmp_path)
    assert "= 50." in printed and "needs a frozen network" in printed


def test_recipe_and_resume_exclude_each_other(tmp_path):
    for flag in ("--recipe=paper", "--dry-run"):
        assert "not both" in mistake("train_generator.py", "--resume", flag, cwd=tmp_path)


def test_bytes_kept_for_the_backward_pass():
    """Of y = (W x)²: x and W x are kept once, W is not counted."""
    layer, x, saved = torch.nn.Linear(4, 6, bias=False), torch.randn(5, 4), Saved()
    with saved:
        y = layer(x).square()
    assert saved.bytes == 4 * (5 * 4 + 5 * 6)
    y.sum().backward()


def test_a_step_that_does_not_fit_is_measured_smaller(monkeypatch):
    tried = []

    def train(count):
        tried.append(count)
        if count > 5:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    count, seconds = time_step(train, 16, torch.device("cpu"))
    assert tried[:3] == [16, 8, 4] and set(tried[2:]) == {4} and count == 4 and seconds > 0
    assert [parts(16, 4), parts(100, 12), parts(7, 3)] == [4, 10, 7]  # --accumulate has to divide
    with pytest.raises(UserError, match="one image"):
        time_step(lambda count: train(6), 2, torch.device("cpu"))


@pytest.mark.parametrize("hours, text", ((1 / 3600, "1.0 s"), (0.5, "30.0 min"), (30, "30.0 h"),
                                         (72, "3 days")))
def test_durations(hours, text):
    assert duration(hours) == text
