"""Curves of trainings, from their logs."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from equimini.show import run as show
from equimini.show.run import RunLog, labels, smoothed
from equimini.utils.errors import UserError


def write(folder, records, tail=""):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(folder)


@pytest.fixture
def generator_log(tmp_path):
    """200 lines of a training, a validation every 20, the last line cut off."""
    records = []
    for k in range(1, 201):
        records.append({"step": k, "loss": 1 + 1 / k, "lr": 1e-3, "grad_norm": math.nan
                        if k == 7 else 0.3, "skipped": int(k >= 7), "images_per_s":
                        0.0 if k < 5 else 50.0, "ema_distance": 0.01, "loss_per_column":
                        [2.0, 1.0], "loss_per_t": [1.0 / k, None, math.nan, 4.0]})
        if k % 20 == 0:
            records.append({"step": k, "val_loss": 1 + 2 / k, "val_loss_per_column": [k, 1.0, 3.0]})
    return write(tmp_path / "runs/generator", records, '{"step": 201, "lo')


@pytest.fixture
def tokenizer_log(tmp_path):
    return write(tmp_path / "runs/tokenizer", [
        {"step": 10, "loss": 3000.0, "lr": 1e-3, "grad_norm": 2e4, "images_per_s": 9.0},
        {"step": 20, "loss": 100.0, "lr": 1e-3, "grad_norm": 1e2, "images_per_s": 9.0},
        {"step": 20, "val_loss": 90.0, "val_psnr": 24.0}])


def test_reading_a_log(generator_log, recwarn):
    run = RunLog(generator_log, "mine")
    assert not recwarn and len(run.records) == 210
    steps, norms = run.curve("grad_norm")
    assert len(steps) == 199 and 7 not in steps and set(norms) == {0.3}
    assert run.curve("images_per_s", least=1e-9)[0][0] == 5
    stages = run.profiles("val_loss_per_column")
    assert {s: step for s, (step, _) in stages.items()} == {"early": 20, "halfway": 100,
                                                            "late": 200}
    assert stages["halfway"][1] == [100, 1.0, 3.0]
    step, bins = run.profiles("loss_per_t")["early"]
    assert step == 20 and bins[0] == pytest.approx(np.mean([1 / k for k in range(1, 21)]))
    assert math.isnan(bins[1]) and math.isnan(bins[2]) and bins[3] == 4
    text = show.summary(run)
    assert text.startswith("mine: 200 steps; loss 1.005") and "best 1.01 at step 200" in text
    assert "50 images/s" in text and text.endswith("1 steps skipped")


def test_smoothing_begins_unbiased():
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0, 7.0], 1) == [1.0, 2.0, 7.0]
    late = smoothed([0.0] * 50 + [1.0] * 4, 4)[-1]
    assert late == pytest.approx(1 - 0.75**4)


def test_labels_tell_folders_apart(tmp_path):
    a, b = str(tmp_path / "a/gen"), str(tmp_path / "b/gen")
    assert labels([a]) == ["gen"] and labels([a, b]) == ["a/gen", "b/gen"]
    assert labels([a, str(tmp_path / "a")]) == ["gen", "a"]


def test_the_picture(generator_log, tokenizer_log, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    titles = {}
    for names in ((generator_log,), (tokenizer_log,), (generator_log, tokenizer_log)):
        sheet = show.figure([RunLog(n, n[-9:]) for n in names])
        titles[names] = {axes.get_title(): axes for axes in sheet.axes}
    both, of_generator, of_tokenizer = (titles[n] for n in (
        (generator_log, tokenizer_log), (generator_log,), (tokenizer_log,)))
    assert len(both) == 8 and set(of_generator) == set(both) - {"PSNR in dB, held out"}
    assert set(of_tokenizer) == {"loss (dots: held out)", "learning rate", "images per second",
                                 "gradient norm", "PSNR in dB, held out"}
    raw, smooth, dots = of_generator["loss (dots: held out)"].lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 200 and len(dots.get_xdata()) == 10
    columns = of_generator["loss per column"]  # held-out ones, where there are any
    assert [list(line.get_ydata()) for line in columns.lines] == [
        [k, 1.0, 3.0] for k in (20, 100, 200)]
    assert both["loss (dots: held out)"].get_yscale() == "log"
    out = tmp_path / "new/both.png"
    show.main([generator_log, tokenizer_log, "--out", str(out)])
    pixels = np.asarray(Image.open(out).convert("RGB"))
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both runs are on it
        assert (pixels == colour).all(-1).sum() > 100
    assert f"picture: {out}" in capsys.readouterr().out


def test_damaged_lines_are_counted(tmp_path):
    folder = write(tmp_path / "run", [{"step": 1, "loss": 1.0}], '{"st\n[1]\n{"step": 2}\n{"s')
    with pytest.warns(UserWarning, match="left out 3 damaged lines"):
        assert [r["step"] for r in RunLog(folder, "").records] == [1, 2]


def test_mistakes(generator_log, tmp_path, monkeypatch):
    for folder, text in ((tmp_path / "none", "log.jsonl .*give folders that train_tokenizer.py"),
                         (write(tmp_path / "empty", []), "holds no record yet")):
        with pytest.raises(UserError, match=text):
            show.main([str(folder)])
    with pytest.raises(UserError, match="--out must end in .png"):
        show.main([generator_log, "--out", "curves.pdf"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'pip install "equimini\[plots\]"'):
        show.main([generator_log, "--out", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()
