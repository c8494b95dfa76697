"""The three scripts, run as a user runs them, for a few steps."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equimini import keyed, load_generator, load_tokenizer
from equimini.cli import RunConfig
from equimini.data import load_data, to_float
from tests.test_losses import TwoMaps

ROOT = Path(__file__).parents[1]
TOKENIZER = ("--image-size 32 --base-channels 8 --norm-groups 4 --z-channels 8 "
             "--attention-rows 8 --token-channels 8 --batch-size 4 --stats-images 16 "
             "--discriminator patchgan --disc-channels 8 --disc-layers 2 --adv-start 2 --workers 0 --val-images 8 "
             "--val-every 3 --preview-every 4 --save-every 3 --log-every 1").split()
GENERATOR = ("--layers 2 --embed-dim 32 --heads 2 --head-width 32 --head-depth 1 --batch-size 4 "
             "--dropout 0.1 --workers 0 --val-images 8 --val-every 3 --preview-every 4 "
             "--preview-steps 2 --save-every 3 --log-every 1").split()


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def call(script, *arguments, cwd):
    """Run a script in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(script, *arguments), cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def mistake(script, *arguments, cwd, monkeypatch, capsys):
    """Run a script that must fail with one clear error and exit code 2; returns its message."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer and a generator, trained for six steps on the built-in data."""
    folder = tmp_path_factory.mktemp("runs")
    call("train_tokenizer.py", *TOKENIZER, "--steps", 6, cwd=folder)
    call("train_generator.py", *GENERATOR, "--steps", 6, cwd=folder)
    return folder


def records(path):
    keep = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_s"} for r in keep]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_training_leaves_checkpoints_log_and_previews(runs):
    for kind in ("tokenizer", "generator"):
        out = runs / "runs" / kind
        assert {p.name for p in out.iterdir()} == {"last.pt", "last-1.pt", "best.pt", "log.jsonl",
                                                   "previews"}
        assert sorted(p.name for p in (out / "previews").iterdir()) == [
            "0000004.png", "0000006.png"]
        log = records(out / "log.jsonl")
        assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in log if "val_loss" in r] == [3, 6]
        assert all(np.isfinite(r["loss"]) for r in log if "loss" in r)
    assert load_tokenizer(runs / "runs/tokenizer/last.pt").has_statistics
    assert load_tokenizer(runs / "runs/tokenizer/best.pt").has_statistics
    adversarial = [r["step"] for r in records(runs / "runs/tokenizer/log.jsonl") if "adv" in r]
    assert adversarial == [3, 4, 5, 6]  # from step 2 on, counted from 0


@pytest.mark.parametrize("kind, flags", (("tokenizer", TOKENIZER), ("generator", GENERATOR)))
def test_resumed_equals_uninterrupted_bit_for_bit(runs, kind, flags):
    script, twin = f"train_{kind}.py", runs / f"twin_{kind}"
    call(script, *flags, "--steps", 3, "--out", twin, cwd=runs)
    call(script, "--resume", "--steps", 6, "--out", twin, cwd=runs)
    a, b = (torch.load(p / "last.pt", weights_only=True) for p in (runs / "runs" / kind, twin))
    for key in a.keys() - {"config"}:
        assert same(a[key], b[key]), key
    assert records(runs / "runs" / kind / "log.jsonl")[-4:] == records(twin / "log.jsonl")[-4:]
    for name in ("0000006.png",):
        pair = [Image.open(p / "previews" / name) for p in (runs / "runs" / kind, twin)]
        assert np.array_equal(*map(np.asarray, pair))


def test_a_killed_run_resumes_bit_for_bit():
    """A few kills; `python tests/kill_and_resume.py` does twenty of each script."""
    call("tests/kill_and_resume.py", "--kills", 2, "--steps", 40, cwd=ROOT)


def test_sigterm_writes_a_checkpoint_first(tmp_path, monkeypatch, capsys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command("train_tokenizer.py", *TOKENIZER, "--steps", 100000,
                                       "--val-every", 100000, "--save-every", 100000,
                                       "--workers", 1),
                               cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    log = tmp_path / "runs/tokenizer/log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.stat().st_size) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's process gets it, too
    output, _ = process.communicate(timeout=120)
    assert "--resume" in output and "Traceback" not in output
    assert process.returncode == 128 + signal.SIGTERM
    step = torch.load(tmp_path / "runs/tokenizer/last.pt", weights_only=True)["step"]
    assert step == records(log)[-1]["step"]
    # a generator refuses it until its statistics are measured
    assert "no latent statistics" in mistake("train_generator.py", *GENERATOR, cwd=tmp_path,
                                             monkeypatch=monkeypatch, capsys=capsys)
    call("train_tokenizer.py", "--resume", "--steps", step, cwd=tmp_path)
    assert load_tokenizer(tmp_path / "runs/tokenizer/last.pt").has_statistics


def test_sampling_writes_a_sheet_and_single_files(runs):
    call("sample.py", "--classes", "sea,0", "--count", 2, "--columns", 20, "--steps", 2,
         "--singles", "one", cwd=runs)
    names = sorted(p.name for p in (runs / "one").iterdir())
    assert len(names) == 4 and names[0] == "class0000_seed000000.png"
    assert Image.open(runs / "one" / names[0]).size == (80, 32)
    sheet = np.asarray(Image.open(runs / "samples.png"))
    one = np.asarray(Image.open(runs / "one" / "class0002_seed000000.png"))
    assert any((sheet[2:34, x:x + 80] == one).all() for x in range(sheet.shape[1] - 80))
    # the same picture from the Python interface
    model = load_generator(runs / "runs/generator/last.pt")
    image = model.sample(["sea"], columns=20, steps=2, seed=0)[0]
    pixels = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert abs(pixels - one).max() <= 1


def test_a_folder_of_pictures_wide_crops_and_a_perceptual_network(picture_folder, tmp_path):
    torch.jit.script(TwoMaps()).save(str(tmp_path / "maps.pt"))
    wide = ["--data", picture_folder, "--width", 48]
    call("train_tokenizer.py", *TOKENIZER, *wide, "--steps", 3, "--perceptual-net", "maps.pt",
         cwd=tmp_path)
    call("train_generator.py", *GENERATOR, *wide, "--steps", 3, cwd=tmp_path)
    log = records(tmp_path / "runs/generator/log.jsonl")
    assert len(log[-1]["val_loss_per_column"]) == 12  # 48 pixels, f = 4
    assert load_generator(tmp_path / "runs/generator/last.pt").classes == ["cat", "dog", "eel"]


def test_cached_latents_train_and_belong_to_one_tokenizer(runs, picture_folder, monkeypatch,
                                                          capsys):
    module = ROOT / "equimini" / "cache_latents.py"
    cache = ["--data", picture_folder, "--workers", 0, "--crops", 2]
    call(module, *cache, cwd=runs)
    views = np.load(runs / "runs/latents/train-00000.npy")
    assert views.shape == (11, 4, 8, 8)  # pictures, 2 crops x 2 mirrors, columns, channels
    tokenizer = load_tokenizer(runs / "runs/tokenizer/last.pt")
    train, _, _ = load_data(RunConfig(data=str(picture_folder)), tokenizer.config)
    image, _ = train.view(3, keyed.rng("cache", 0, 3, 1), flip=True)
    torch.testing.assert_close(torch.from_numpy(views[3, 3]),
                               tokenizer.encode(to_float(image)[None])[0], rtol=1e-4, atol=1e-4)
    # a shard that is lost is made again, the others stay
    before = (runs / "runs/latents/val-00000.npy").stat().st_mtime_ns
    (runs / "runs/latents/train-00000.npy").unlink()
    call(module, *cache, cwd=runs)
    assert np.array_equal(np.load(runs / "runs/latents/train-00000.npy"), views)
    assert (runs / "runs/latents/val-00000.npy").stat().st_mtime_ns == before
    call("train_generator.py", *GENERATOR, "--steps", 2, "--latents", "runs/latents",
         "--out", "runs/cached", cwd=runs)
    assert load_generator(runs / "runs/cached/last.pt").classes == ["cat", "dog", "eel"]
    call("train_tokenizer.py", *TOKENIZER, "--steps", 3, "--seed", 9, "--out", "runs/other",
         cwd=runs)
    assert "another tokenizer" in mistake(
        "train_generator.py", *GENERATOR, "--latents", "runs/latents", "--tokenizer",
        "runs/other/last.pt", "--out", "x", cwd=runs, monkeypatch=monkeypatch, capsys=capsys)


def test_a_folder_without_a_readable_picture_is_one_error(picture_folder, tmp_path, monkeypatch,
                                                          capsys):
    for path in picture_folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.warns(UserWarning) if workers == 0 else nullcontext():
            message = mistake("train_tokenizer.py", *TOKENIZER, "--data", picture_folder, "--out",
                              tmp_path / "x", "--workers", workers, cwd=tmp_path,
                              monkeypatch=monkeypatch, capsys=capsys)
        assert "none of the" in message


@pytest.mark.parametrize("script, arguments, text", (
    ("train_tokenizer.py", ["--preset", "medium"], "tiny, small, base"),
    ("train_tokenizer.py", [], "--resume"),  # the folder holds a run already
    ("train_tokenizer.py", ["--data", "nowhere", "--out", "x"], "nowhere"),
    ("train_tokenizer.py", ["--width", "30", "--out", "x"], "--width"),
    ("train_tokenizer.py", ["--lr", "-1", "--out", "x"], "lr"),
    ("train_tokenizer.py", ["--resume", "--z-channels", "16"], "other sizes"),
    ("train_tokenizer.py", ["--resume", "--preset", "small"], "--preset tiny"),
    ("train_tokenizer.py", ["--resume", "--overwrite"], "not both"),
    ("train_tokenizer.py", ["--out", "x", "--discriminator", "patchgan", "--steps", "9"],
     "--adv-start"),
    ("train_tokenizer.py", ["--out", "x", "--semantic-channels", "8"], "semantic"),
    ("train_tokenizer.py", ["--out", "x", "--val-data", "nowhere"], "--val-data"),
    ("train_generator.py", ["--out", "x", "--latents", "y", "--width", "64"], "--latents"),
    ("train_tokenizer.py", ["--out", "/proc/x"], "/proc/x"),
    ("train_generator.py", ["--out", "x", "--tokenizer", "runs/generator/last.pt"], "generator"),
    ("train_generator.py", ["--resume", "--data", "synthetic-object"], "classes"),
    ("sample.py", ["--classes", "moon"], "mountains"),
    ("sample.py", ["--width", "30"], "multiple of f"),
    ("sample.py", ["--columns", "1"], "at least 2"),
    ("sample.py", ["--checkpoint", "runs/tokenizer/last.pt"], "holds a tokenizer"),
    ("sample.py", ["--checkpoint", "none.pt"], "none.pt"),
    ("sample.py", ["--steps", "0"], "steps"),
    ("sample.py", ["--out", "x.jpg"], ".png"),
    ("sample.py", ["--device", "abacus"], "abacus")))
def test_mistakes_end_in_one_clear_error(runs, script, arguments, text, monkeypatch, capsys):
    assert text in mistake(script, *arguments, cwd=runs, monkeypatch=monkeypatch, capsys=capsys)
