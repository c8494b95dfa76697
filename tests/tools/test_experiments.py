"""The experiments, end to end at toy size, and the numbers they are made of."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from equimini.experiments import compute, equivariance, samples
from equimini.experiments import tokenizer as ablation
from equimini.experiments import training_runs
from equimini.experiments.attention import order, pairs
from equimini.experiments.common import ExperimentConfig, Lab, key
from equimini.experiments.dit import DiT
from equimini.experiments.extrapolation import Mirrored
from equimini.experiments.matrix import summary
from equimini.experiments.probe import Probe
from equimini.experiments.report import (flags_given, markdown, paired_interval, plain,
                                         rank_correlation, spread, verdict)
from equimini.experiments.training_runs import TrainingRun, losses, run_script
from equimini.experiments.transfer import halves, rise
from equimini.experiments.uniformity import bump, standard_error, sure
from equimini.generator import GeneratorConfig, flow_matching_errors
from equimini.noise import rng
from equimini.presets import PRESETS, cost
from equimini.training import loop as training
from equimini.training.data import load_data
from equimini.training.options import DataConfig
from equimini.utils.errors import UserError
from equimini.utils.files import claim
from tests.conftest import write_pictures
from tests.helpers.scripts import ROOT, invoke, mistake

TOY = "--scale toy --seeds 1 --steps 4 --workers 0".split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five noisy pictures, 32×32."""
    folder = tmp_path_factory.mktemp("experiments")
    write_pictures(folder / "data", ("cat", "dog"), [(32, 32)] * 5)
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings without a process of their own, which would import torch again."""
    def run(name, arguments):
        try:
            invoke(name, *arguments, cwd=os.getcwd())
        except SystemExit as stop:
            return stop.code, 1.0
        return 0, 1.0

    monkeypatch.setattr(training_runs, "run_script", run)


EXPERIMENTS = (("attention", ["--windows", 2], ["attention.png"]),  # options and pictures
               ("transfer", ["--halves"], ["transfer.png"]),
               ("dynamics", ["--stages", 50], ["losses.png", "gains.png"]),
               ("grid-vs-columns", ["--positions"], ["samples.png"]),
               ("matrix", ["--tune-steps", 1, "--tune-batch", 4, "--measured", 4],
                ["matrix-columns.png", "matrix-grid.png"]),
               ("extrapolation", ["--times", 2, "--euler-steps", 1, "--measured", 2],
                ["extrapolation.png", "strips.png"]),
               ("equivariance", ["--early", 50, "--half", 4], []),
               ("dit", [], []),
               ("uniformity", ["--centred-data", "data"], ["uniformity.png"]))


@pytest.mark.parametrize("count", (1, pytest.param(len(EXPERIMENTS), marks=pytest.mark.slow)))
def test_every_experiment_runs_and_shares_its_trainings(pictures, in_this_process, monkeypatch,
                                                        count):
    data = ["--data", "data", "--val-data", "data", "--out", "out"]
    monkeypatch.setattr("equimini.experiments.samples.GUIDANCE", (1.0, 2.0))
    monkeypatch.setitem(samples.EXACT, "steps", 1)
    for name, extra, files in EXPERIMENTS[:count]:
        invoke("equimini.experiments", name, *data, *TOY, *extra, cwd=pictures)
        folder = pictures / "out" / name
        result = json.loads((folder / "results.json").read_text())
        assert {p.name for p in folder.iterdir()} == {
            "table.md", "results.json", "values.json", *files}
        assert result["reading"] in (folder / "table.md").read_text()
        assert "--scale toy" in result["command"] and "--steps 4" in result["command"]
    done = [p.name.rsplit("-", 1)[0] for p in (pictures / "out" / "runs").glob("generator-*")]
    assert sorted(done) == sorted(set(done))  # nothing was trained twice
    names = {name.removeprefix("generator-").removesuffix("-s0") for name in done
             if name.endswith("-s0")}
    assert count == 1 or names == {
        *(f"{model}{variant}" for _, model, _ in equivariance.MODELS.values()
          for variant in ("", "-at-50", *["-half"] * ("real" not in model))),
        *(f"{layout}-at-50-then-{what}" for layout in ("columns", "grid")
          for what in ("all", "4-alone", "11-alone")), "window-2", "columns-centred",
        "positions",
        *(f"{layout}-{half}" for layout in ("columns", "grid") for half in halves(16))}


@pytest.mark.slow
def test_gaps_are_filled_and_measured(pictures, tmp_path):
    for name, own in (("cat", "forest"), ("dog", "sea")):
        shutil.copytree(pictures / "data" / name, tmp_path / "data" / own)
    invoke("equimini.experiments", "fits", "--data", "data", "--out", "out", "--pictures", 1,
           "--gaps", 2, "--fits", "1,3", "--seeds", 2, "--steps", 1, "--exact-steps", 1,
           cwd=tmp_path)
    result = json.loads((tmp_path / "out/fits/results.json").read_text())
    assert {run for run in result["values"]["runs"]} == {"2,1", "2,3"}
    assert len(result["table"]) == 4 and (tmp_path / "out/fits/gaps.png").is_file()


def test_interrupted_and_given_again_equals_uninterrupted(pictures, in_this_process, monkeypatch):
    states = []
    for out, stop_at in (("whole", 0), ("stopped", 2)):
        cfg = ExperimentConfig(data=str(pictures / "data"), val_data=str(pictures / "data"),
                               out=str(pictures / out), scale="toy", steps=8, workers=0, seeds=1)
        if stop_at:
            stop_after(stop_at, monkeypatch)
            with pytest.raises(SystemExit):
                Lab("test", cfg).tokenizer("grid")
            stop_after(5, monkeypatch)
            with pytest.raises(SystemExit):
                Lab("test", cfg).grid("--subtasks 1,3")
        runs = Lab("test", cfg).grid("--subtasks 1,3")
        states.append(torch.load(runs[0].last, weights_only=True))
        assert losses(runs).shape == (1, 16) and runs[0].record()["steps"] == 8
        assert runs[0].record()["cpu_seconds"] == 1 + bool(stop_at)
    for part in ("model", "ema"):
        for name, weight in states[0][part].items():
            assert torch.equal(weight, states[1][part][name]), name


def test_the_grid_may_have_a_number_of_tokenizer_steps_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "train", lambda self, kind, name, steps, *_: steps)
    lab = Lab("test", ExperimentConfig(out=str(tmp_path), scale="toy", grid_tokenizer_steps=7))
    assert (lab.tokenizer(), lab.tokenizer("grid")) == (4, 7)


def test_a_training_is_a_process_of_its_own(tmp_path, monkeypatch):
    """Its exit code and its CPU seconds are known; SIGTERM reaches it."""
    monkeypatch.setattr(training_runs, "ROOT", tmp_path)
    (tmp_path / "train_tokenizer.py").write_text(
        "import os, signal, sys, time\nopen(sys.argv[2] + '/seen', 'w').write(' '.join(sys.argv))\n"
        "while time.process_time() < 0.3: pass\n"
        "if '--kill' in sys.argv:\n"
        "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "sys.exit(2 if '--mistake' in sys.argv else '--fail' in sys.argv)\n")
    run = TrainingRun("tokenizer", tmp_path / "run", 3, ["--out", str(tmp_path)])
    run.train("--workers", "0")
    assert run.record()["steps"] == 3 and 0.3 < run.record()["cpu_seconds"] < 5
    seen = (tmp_path / "seen").read_text()
    assert seen.endswith(f"--workers 0 --out {run.folder} --steps 3")
    run.train("--fail")  # is done: nothing happens
    with pytest.raises(UserError, match="exit code 1"):
        TrainingRun("tokenizer", tmp_path / "other", 3, run.flags).train("--fail")
    with pytest.raises(SystemExit, match="2"):
        TrainingRun("tokenizer", tmp_path / "wrong", 3, run.flags).train("--mistake")
    with pytest.raises(SystemExit, match="143"):
        TrainingRun("tokenizer", tmp_path / "third", 3, run.flags).train("--kill")
    with pytest.raises(UserError, match="run experiments from a checkout"):
        run_script("train_nothing.py", [])


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
    (tmp_path / "log.jsonl").write_text(
        '{"step": 2, "val_loss_per_column": [3.0, 4.0]}\n{"step": 3, "loss": 1.0}\n'
        '{"step": 4, "val_loss_per_column": [1.0, 2.0]}\n')
    assert losses([TrainingRun("generator", tmp_path, 4)]).tolist() == [[1, 2]]


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
    old = parameters_to_vector(trainer.model.parameters()).detach()
    trainer.step(0, *batches[0][:2])
    moved = parameters_to_vector(trainer.model.parameters()).detach() - old
    assert (moved.norm() / old.norm()).item() == pytest.approx(1e-3, rel=1e-2)
    assert trainer.validate(batches)["val_loss_per_column"][5] < before[5]


def test_gradients_of_subtasks_and_what_they_have_in_common(runs):
    probe = Probe(runs / "runs/generator/last.pt", torch.device("cpu"))
    trainer, n = probe.trainer(), probe.tokenizer.config.columns
    means = torch.randn(2, 3, n, probe.tokenizer.config.token_channels,
                        generator=torch.Generator().manual_seed(0))
    labels, indices = torch.zeros(3, dtype=torch.long), torch.arange(3)
    found = probe.gradients([(means[0], labels, indices)])
    draws = trainer.draws([rng("gradients", i) for i in range(3)], *trainer.shape(means[0]))
    x = trainer.tokens(means[0], draws)
    loss = flow_matching_errors(trainer.model, x, labels, draws.u, draws.eps).mean()  # Eq. 8
    whole = parameters_to_vector(torch.autograd.grad(loss, [*trainer.model.parameters()],
                                                     materialize_grads=True))
    assert torch.allclose(found.mean(0), whole, rtol=1e-3, atol=1e-5 * whole.abs().max().item())
    same = torch.randn(1, 50).expand(4, -1)
    assert equivariance.agreement(equivariance.cosines(same, same), range(4), [1, 2]) == (
        pytest.approx(1))
    c = equivariance.cosines(torch.eye(4) + 0.5, torch.eye(4) + 0.5)  # cosines 2 over 3
    assert equivariance.agreement(c, range(4), range(4)) == pytest.approx(2 / 3)
    c[0, 1:] = 0
    assert equivariance.agreement(c, [0], [2, 3]) == 0
    rho, p = rank_correlation([1, 2, 3, 4], [8, 7, 3, 1])
    assert (rho, p) == pytest.approx((-1, 2 / 24))


def test_reading_of_the_measure():
    seeds = np.array([0.0, 0.01, -0.01])
    e = {"columns": 0.9 + seeds, "grid, no shift": 0.4 + seeds / 2, "grid": 0.6 + seeds / 3,
         "full causal": 0.7 + seeds}
    rises = {"columns": 1 + seeds, "grid, no shift": 9 + seeds, "grid": 7 + seeds,
             "full causal": 3 + seeds}
    text = equivariance.read(e, rises)
    assert "both as in the paper: holds (difference +0.50" in text
    assert "grid: more alike with position augmentation: holds (difference +0.20" in text
    assert "over 4 models, means of seeds: -1.00 (exact p 0.083; seeds one by one -1.00" in text
    few = {k: rises[k] for k in ("columns", "grid", "grid, no shift")}
    assert "rank" not in equivariance.read(e, few)


def test_equivariance_of_a_checkpoint(runs, tmp_path):
    invoke("equimini.experiments", "equivariance", "--checkpoint",
           runs / "runs/generator/last.pt", "--half", 2, "--seeds", 2, cwd=tmp_path)
    result = json.loads((tmp_path / "runs/experiments/equivariance/results.json").read_text())
    c = np.array(result["values"]["cosines"]["last 100"])
    assert np.allclose(c, c.transpose(0, 2, 1)) and not (c[0] == c[1]).any()  # (2, N, N)
    assert result["reading"].startswith("E of last is ") and len(result["table"]) == 2


@pytest.mark.parametrize("start", range(5))
def test_guidance_is_searched_downhill(start):
    assert samples.lowest(lambda i: [3, 2, 1, 2, 9][i], start, 5) == 2
    assert samples.lowest([4, 3, 2, 1, 0].__getitem__, start, 5) == 4


def test_bump_is_the_middle_half_over_the_sides():
    losses = np.ones((1, 16))
    losses[0, 0] = 9  # has no context: left out
    assert bump(losses)[0] == pytest.approx(0)
    losses[0, 4:12] = 1.5
    assert bump(losses)[0] == pytest.approx(50)


def test_error_of_the_bump_by_pictures():
    losses = np.random.default_rng(0).normal(1, 0.1, (2, 50, 16))  # (seeds, pictures, N)
    expected = 100 * 0.1 * ((1 / 8 + 1 / 7) / (2 * 50)) ** 0.5
    assert standard_error(losses) == pytest.approx(expected, rel=0.2)
    assert standard_error(np.ones((2, 50, 16))) == 0
    assert sure("x", np.ones(3), 0.1) == "x: holds (+1.00, interval +0.80 to +1.20)"
    assert sure("x", np.ones(3), 1.0).startswith("x: is undecided")


def test_halves_and_the_rise_on_the_others():
    assert halves(16)["checkerboard"] == [0, 2, 5, 7, 8, 10, 13, 15]
    assert [*halves(16)["first"], *halves(16)["last"]] == [*range(16)]
    risen = rise(np.ones((2, 4)), np.array([[9, 9, 1, 2.0]] * 2), [0, 1])  # trained, the others
    assert risen == pytest.approx(np.array([[800, 800], [50, 50]]))


def test_the_diffusion_transformer_sees_all_columns():
    torch.manual_seed(0)
    model = DiT(GeneratorConfig(layers=1, embed_dim=16, heads=1), 2, 3).eval()
    x, t = torch.randn(1, 4, 3), torch.tensor([0.5])
    given = [torch.tensor([0]), torch.tensor([False])]
    assert not model(x, t, *given).any()  # untrained: no velocity
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    v, other = model(x, t, *given), x.clone()
    other[:, 3] += 1
    assert not torch.equal(v[:, 0], model(other, t, *given)[:, 0])
    dropped = [model(x, t, torch.tensor([c]), torch.tensor([True])) for c in (0, 1)]
    assert torch.equal(*dropped) and not torch.equal(v, dropped[0])


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
    found = cost(small)
    report = (ROOT / "docs/experiments/compute.md").read_text()
    assert "| small | {generator:.2f} | 151 | {GFLOPs:.2f} | {GMACs:.2f} | 5.41 |".format(
        **found) in report and round(found["GFLOPs"], 2) == 5.13


@pytest.mark.parametrize("report", sorted((ROOT / "docs/experiments").glob("*.md")),
                         ids=lambda path: path.stem)
def test_the_page_holds_the_tables_that_commands_wrote(report):
    page = (ROOT / "docs/paper-in-miniature.md").read_text()
    lines = report.read_text().splitlines()
    assert "\n".join(line for line in lines if line.startswith("|")) in page
    command = next(line for line in lines if line.startswith("`python"))
    assert command in page
    if "--scale" in command:  # the values by seed, from which the page has intervals of its own
        found = json.loads(report.with_suffix(".json").read_text())
        assert found["command"] in command
        for name in {"distances", "reconstructions", "to_decoded"} & found.keys():
            for values in found[name].values():
                assert any(f" {spread(values, digits)} |" in line for digits in (2, 3)
                           for line in lines)


def test_a_claim_holds_if_its_interval_lies_above_0():
    low, high = paired_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert verdict("x", [2.0, 3.0, 4.0]) == ("x: holds (difference +3.000, interval +0.516 to "
                                             "+5.484)")
    assert verdict("x", [-3.0, -3.1, -2.9]).startswith("x: does not hold (")
    assert verdict("x", [1.0, 2.0, 3.0]).startswith("x: is undecided (")  # 3 of 3 are not enough
    for unknown in ([5.0], [1.0, np.nan, 2.0]):
        assert verdict("x", unknown).startswith("x: is undecided (no interval")
    wide = np.random.default_rng(0).normal(size=41)  # beyond the table of quantiles
    assert np.diff(paired_interval(wide)) == pytest.approx(2 * 2.0211 * wide.std(ddof=1) / 41**0.5,
                                                           rel=1e-4)
    text = order({"full causal": np.array([2.0, 2.1]), "real equivariant": np.array([3.0, 3.1]),
                  "windowed": np.array([1.0, 1.1])})
    assert text.count(": holds") == 2 and "real equivariant last: holds (difference +1.0" in text


def test_claim_keeps_experiments_apart(tmp_path):
    for sizes in ((1, 2), [1, 2]):
        claim(tmp_path, {"steps": 3, "sizes": sizes}, "things", "choose another --out")
    with pytest.raises(UserError, match=r"things of other settings \(steps\); choose"):
        claim(tmp_path, {"steps": 4, "sizes": (1, 2)}, "things", "choose another --out")


def test_the_ablation_gives_its_data_options_on(tmp_path):
    cfg = ablation.AblationConfig(data="d", split="order", allow_truncated=True, out="o", seed=3)
    assert flags_given(cfg, DataConfig, ["out"]) == (
        "--data d --split order --allow-truncated --seed 3".split())
    plan = ablation.settings(cfg, ["--lr", "1"])
    assert "split" not in plan and plan["allow_truncated"] and plan["training"] == ["--lr", "1"]
    assert ablation.settings(ablation.AblationConfig(), [])["split"] == "name"


def test_numbers_and_tables():
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([0.5], 1, sign=True) == "+0.5" and spread([-1e-9, -1e-9], 2) == "0.00 ± 0.00"
    assert markdown([("a", "b"), ("c", "1")]) == "| a | b |\n| --- | ---: |\n| c | 1 |"
    text = json.dumps(plain({"a": np.array([1.0, np.nan]), "b": (np.float32(2), np.int64(3))}))
    assert text == '{"a": [1.0, null], "b": [2.0, 3]}'


def test_mistakes(pictures, in_this_process, capsys):
    data = ["--data", "data", "--val-data", "data", "--out", "out", *TOY]
    for arguments, text in ((["transfer", "--data", "nowhere"], "nowhere"),
                            (["matrix", *data, "--checkpoint", "none.pt"], "none.pt"),
                            (["dynamics", *data, "--single", "16"], "--single"),
                            (["alignment", *data], "--maps-network takes a TorchScript file"),
                            (["grid-vs-columns", *data, "--network", "none.pt"], "none.pt")):
        assert text in mistake("equimini.experiments", *arguments, cwd=pictures)
    with pytest.raises(SystemExit):
        invoke("equimini.experiments", "--help", cwd=pictures)
    listed = capsys.readouterr().out
    assert "grid-vs-columns  Columns against" in listed and "tokenizer        The" in listed
