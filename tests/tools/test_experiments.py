"""The experiments, end to end at toy size, and the numbers they are made of."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.experiments import compute
from equimini.experiments.attention import pairs
from equimini.experiments.common import ExperimentConfig, Lab, Run, key
from equimini.experiments.extrapolation import Mirrored
from equimini.experiments.matrix import summary
from equimini.experiments.probe import Probe
from equimini.experiments.report import markdown, plain, spread, verdict
from equimini.experiments.uniformity import bump
from equimini.presets import PRESETS
from equimini.training import loop as training
from equimini.training.data import load_data
from equimini.training.options import DataConfig
from tests.helpers.scripts import invoke, mistake

TOY = "--scale toy --seeds 1 --steps 4 --workers 0".split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five noisy pictures, 32×32."""
    folder, draw = tmp_path_factory.mktemp("experiments"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{i}.png")
    return folder


def test_every_experiment_runs_and_shares_its_trainings(pictures, monkeypatch):
    data = ["--data", "data", "--val-data", "data", "--out", "out"]
    monkeypatch.setattr("equimini.experiments.samples.GUIDANCE", (1.0, 2.0))
    monkeypatch.setattr("equimini.experiments.samples.EULER_STEPS", 2)
    for name, extra, files in (
            ("transfer", [], ["transfer.png"]), ("attention", [], ["attention.png"]),
            ("dynamics", [], ["losses.png", "gains.png"]),
            ("grid-vs-columns", [], ["samples.png"]),
            ("matrix", ["--tune-steps", 1, "--tune-batch", 4, "--measured", 4],
             ["matrix-columns.png", "matrix-grid.png"]),
            ("extrapolation", ["--times", 2, "--euler-steps", 1, "--measured", 2],
             ["extrapolation.png", "strips.png"]),
            ("uniformity", ["--centred-data", "data"], ["uniformity.png"])):
        invoke("equimini.experiments", name, *data, *TOY, *extra, cwd=pictures,
               monkeypatch=monkeypatch)
        folder = pictures / "out" / name
        result = json.loads((folder / "results.json").read_text())
        assert {p.name for p in folder.iterdir()} == {"table.md", "results.json", *files}
        assert result["reading"] in (folder / "table.md").read_text()
        assert "--scale toy" in result["command"] and "--steps 4" in result["command"]
    done = [p.name.rsplit("-", 1)[0] for p in (pictures / "out" / "runs").glob("generator-*")]
    assert sorted(done) == sorted(set(done))  # nothing was trained twice
    names = {name.removeprefix("generator-").removesuffix("-s0") for name in done
             if name.endswith("-s0")}
    assert names == {
        *(f"{layout}{variant}" for layout in ("columns", "grid") for variant in (
            "", "-half", "-early", "-then-all", "-then-4-alone", "-then-11-alone")),
        "full", "real", "unshifted", "columns-centred"}


def test_interrupted_and_given_again_equals_uninterrupted(pictures, monkeypatch):
    states = []
    for out, stop_at in (("whole", 0), ("stopped", 2)):
        cfg = ExperimentConfig(data=str(pictures / "data"), val_data=str(pictures / "data"),
                               out=str(pictures / out), scale="toy", steps=8, workers=0)
        if stop_at:
            stop_after(stop_at, monkeypatch)
            with pytest.raises(SystemExit):
                Lab(cfg).tokenizer("grid")
            stop_after(5, monkeypatch)
            with pytest.raises(SystemExit):
                Lab(cfg).grid(1, "--subtasks 1,3")
        run = Lab(cfg).grid(1, "--subtasks 1,3")
        states.append(torch.load(run.last, weights_only=True))
        assert run.losses().shape == (16,) and run.record()["steps"] == 8
    for part in ("model", "ema"):
        for name, weight in states[0][part].items():
            assert torch.equal(weight, states[1][part][name]), name


def stop_after(steps, monkeypatch):
    """Have the next training interrupted, as by Ctrl-C, at that step."""
    inner, count = training.Progress.step, []

    def step(self, *arguments):
        count.append(1)
        if len(count) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        inner(self, *arguments)

    monkeypatch.setattr(training.Progress, "step", step)


def test_runs_are_told_by_what_matters():
    flags = ["--latents", "/a/runs/latents-x", "--init-from", "/a/runs/generator-y/last.pt"]
    moved = ["--latents", "/b/runs/latents-x", "--init-from", "/b/runs/generator-y/last.pt"]
    assert key(flags) == key(moved) != key([*flags, "--seed", "1"])
    assert key(flags) != key([*flags[:3], "/a/runs/generator-z/last.pt"])


def test_last_validation_counts(tmp_path):
    lines = [{"step": 2, "val_loss_per_column": [3.0, 4.0]}, {"step": 3, "loss": 1.0},
             {"step": 4, "val_loss_per_column": [1.0, 2.0]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Run(tmp_path).losses().tolist() == [1, 2]


def test_summary_of_the_transfer_matrix():
    equal = np.full((4, 4), -0.5)
    assert summary(equal) == pytest.approx(1)
    assert summary(-np.eye(4)) == 0
    assert summary(0.25 - 1.25 * np.eye(4)) == pytest.approx(-0.25)  # others get worse
    assert np.isnan(summary(np.eye(4)))  # training on itself does not even help itself


def test_descent_steps_have_their_length_and_improve_what_is_trained(runs):
    probe = Probe(runs / "runs/generator/last.pt", torch.device("cpu"))
    _, val, _ = load_data(DataConfig(workers=0), probe.tokenizer.config)
    batches = probe.encode(val, 8, 8, "encoding")
    before = probe.trainer().validate(batches)["val_loss_per_column"]
    trainer = probe.descender(0, 1e-3, subtasks=(5,))
    flat = [torch.cat([p.detach().flatten() for p in trainer.model.parameters()])]
    trainer.step(0, *batches[0][:2])
    flat.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    length = (flat[1] - flat[0]).norm() / flat[0].norm()
    assert length.item() == pytest.approx(1e-3, rel=1e-2)
    assert trainer.validate(batches)["val_loss_per_column"][5] < before[5]


def test_bump_is_the_middle_half_over_the_sides():
    losses = np.ones((1, 16))
    losses[0, 0] = 9  # has no context: left out
    assert bump(losses)[0] == pytest.approx(0)
    losses[0, 4:12] = 1.5
    assert bump(losses)[0] == pytest.approx(50)


def test_long_pictures_are_continued_by_their_mirror():
    image = torch.arange(6).view(1, 2, 3)
    longer, label, index = Mirrored([(image, 1, 7)], 3)[0]
    assert longer[0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2] and (label, index) == (1, 7)


def test_attention_is_counted():
    assert pairs(16) == {"full causal": 136, "real equivariant": 40, "windowed": 58}
    small = PRESETS["small"].generator
    for window, count in ((16, 136), (4, 58)):
        assert compute.attention_products(small, 16, window) == 2 * count * 512 * 16
    assert 2 * 16 * 16 * 512 * 16 == 4_194_304  # the paper's 4.2 M


def test_numbers_and_tables():
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([0.5], 1, sign=True) == "+0.5" and spread([-1e-9, -1e-9], 2) == "0.00 ± 0.00"
    assert verdict("x", [True, True]) == "x: holds (2 of 2 seeds)"
    assert verdict("x", np.array([True, False])) == "x: is undecided (1 of 2 seeds)"
    assert markdown([("a", "b"), ("c", "1")]) == "| a | b |\n| --- | ---: |\n| c | 1 |"
    text = json.dumps(plain({"a": np.array([1.0, np.nan]), "b": (np.float32(2), np.int64(3))}))
    assert text == '{"a": [1.0, null], "b": [2.0, 3]}'


def test_mistakes(pictures, monkeypatch, capsys):
    data = ["--data", "data", "--val-data", "data", "--out", "out", *TOY]
    for arguments, text in ((["transfer", "--data", "nowhere"], "nowhere"),
                            (["matrix", *data, "--checkpoint", "none.pt"], "none.pt"),
                            (["dynamics", *data, "--single", "16"], "--single"),
                            (["grid-vs-columns", *data, "--network", "none.pt"], "none.pt")):
        assert text in mistake("equimini.experiments", *arguments, cwd=pictures,
                               monkeypatch=monkeypatch, capsys=capsys)
    with pytest.raises(SystemExit):
        invoke("equimini.experiments", "--help", cwd=pictures, monkeypatch=monkeypatch)
    listed = capsys.readouterr().out
    assert "grid-vs-columns  Columns against" in listed and "tokenizer        The" in listed
