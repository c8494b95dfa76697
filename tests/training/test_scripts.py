"""The three scripts, run as a user runs them, for a few steps."""

import gc
import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equimini import load_generator, load_tokenizer
from equimini.generator import Generator
from equimini.noise import rng
from equimini.training.data import load_data
from equimini.training.loop import Log
from equimini.training.options import RunConfig
from equimini.utils.images import to_float
from tests.helpers.scripts import (ENDLESS, GENERATOR, TOKENIZER, TRAINED, call, command, invoke,
                                   mistake, start)
from tests.method.test_losses import TwoMaps

CACHE = "equimini.training.cache_latents"


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


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """A few kills; `python -m tests.soak.kills` does thirty of each command."""
    said = call("tests.soak.kills", "--times", 2, "--what", "killed", "--only", "tokenizer",
                "generator", cwd=tmp_path)
    assert said.count("killed: times 2, runs ") == 2  # each with the right files, or call raises


def test_sigterm_writes_a_checkpoint_first(tmp_path):
    log = tmp_path / "runs/tokenizer/log.jsonl"
    training = start(command("train_tokenizer.py", *ENDLESS, "--workers", 1), tmp_path, log)
    os.killpg(training.pid, signal.SIGTERM)  # its loader gets it as well
    output, _ = training.communicate(timeout=120)
    assert "--resume" in output and "Traceback" not in output
    assert training.returncode == 128 + signal.SIGTERM
    step = torch.load(tmp_path / "runs/tokenizer/last.pt", weights_only=True)["step"]
    assert step == records(log)[-1]["step"]
    # a generator refuses it until its statistics are measured
    assert "no latent statistics" in mistake("train_generator.py", *GENERATOR, cwd=tmp_path)
    call("train_tokenizer.py", "--resume", "--steps", step, cwd=tmp_path)
    assert load_tokenizer(tmp_path / "runs/tokenizer/last.pt").has_statistics


def test_sampling_writes_a_sheet_and_single_files(runs):
    call("sample.py", *TRAINED, "--classes", "sea,0", "--count", 2, "--columns", 20, "--steps", 2,
         "--singles", "one", cwd=runs)
    names = sorted(p.name for p in (runs / "one").iterdir())
    assert names == [f"class{c:04d}_seed{seed:06d}.png"  # the seed counts up over all classes
                     for c, seed in ((0, 2), (0, 3), (2, 0), (2, 1))]
    assert Image.open(runs / "one" / names[0]).size == (80, 32)
    sheet = np.asarray(Image.open(runs / "samples.png"))
    one = np.asarray(Image.open(runs / "one" / "class0000_seed000003.png"))
    assert any((sheet[36:68, x:x + 80] == one).all() for x in range(sheet.shape[1] - 80))  # row 2
    # the same picture from the Python interface
    model = load_generator(runs / "runs/generator/last.pt")
    image = model.sample([0], columns=20, steps=2, seed=3)[0]
    pixels = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert abs(pixels - one).max() <= 1


def test_a_lead_in_is_drawn_and_cut_off(runs):
    """What is left are the last columns of a longer picture."""
    options = [*TRAINED, "--classes", "sea", "--count", 1, "--steps", 1, "--cfg-schedule",
               "constant", "--cfg", 2]
    call("sample.py", *options, "--columns", 20, "--save-tokens", "long.pt", cwd=runs)
    said = call("sample.py", *options, "--columns", 12, "--lead-in", 8, "--save-tokens", "cut.pt",
                "--show-steps", "grown.png", cwd=runs)
    assert "1 picture of 48x32 pixels" in said
    long, cut = (torch.load(runs / f"{n}.pt", weights_only=True) for n in ("long", "cut"))
    assert torch.equal(cut["tokens"], long["tokens"][:, 8:]) and cut["labels"].shape == (1, 12)


def test_a_folder_of_pictures_wide_crops_and_a_perceptual_network(picture_folder, tmp_path):
    torch.jit.script(TwoMaps()).save(str(tmp_path / "maps.pt"))
    wide = ["--data", picture_folder, "--width", 48]
    call("train_tokenizer.py", *TOKENIZER, *wide, "--steps", 3, "--perceptual-net", "maps.pt",
         cwd=tmp_path)
    call("train_generator.py", *GENERATOR, *wide, "--steps", 3, cwd=tmp_path)
    log = records(tmp_path / "runs/generator/log.jsonl")
    assert len(log[-1]["val_loss_per_column"]) == 12  # 48 pixels, f = 4
    model = load_generator(tmp_path / "runs/generator/last.pt")
    assert model.classes == ["cat", "dog", "eel"] and model.columns == 12


def test_cached_latents_train_and_belong_to_one_tokenizer(runs, picture_folder):
    cache = [CACHE, "--data", picture_folder, "--workers", 0, "--crops", 2]
    call(*cache, cwd=runs)
    views = np.load(runs / "runs/latents/train-00000.npy")
    assert views.shape == (11, 4, 8, 8)  # pictures, 2 crops x 2 mirrors, columns, channels
    tokenizer = load_tokenizer(runs / "runs/tokenizer/last.pt")
    train, _, _ = load_data(RunConfig(data=str(picture_folder)), tokenizer.config)
    image, _ = train.view(3, rng("cache", 0, 3, 1), flip=True)
    torch.testing.assert_close(torch.from_numpy(views[3, 3]),
                               tokenizer.encode(to_float(image)[None])[0], rtol=1e-4, atol=1e-4)
    # a shard that is lost is made again, the others stay
    before = (runs / "runs/latents/val-00000.npy").stat().st_mtime_ns
    (runs / "runs/latents/train-00000.npy").unlink()
    call(*cache, cwd=runs)
    assert np.array_equal(np.load(runs / "runs/latents/train-00000.npy"), views)
    assert (runs / "runs/latents/val-00000.npy").stat().st_mtime_ns == before
    call("train_generator.py", *GENERATOR, "--steps", 2, "--latents", "runs/latents",
         "--out", "runs/cached", cwd=runs)
    assert load_generator(runs / "runs/cached/last.pt").classes == ["cat", "dog", "eel"]
    call("train_tokenizer.py", *TOKENIZER, "--steps", 3, "--seed", 9, "--out", "runs/other",
         cwd=runs)
    assert "another tokenizer" in mistake(
        "train_generator.py", *GENERATOR, "--latents", "runs/latents", "--tokenizer",
        "runs/other/last.pt", "--out", "x", cwd=runs)


def test_cached_latents_that_are_not_finite_are_an_error(runs, picture_folder):
    call(CACHE, "--data", picture_folder, "--workers", 0, "--out", "runs/nan", cwd=runs)
    path = runs / "runs/nan/train-00000.npy"
    views = np.load(path)
    views[4, :, 2] = np.nan
    np.save(path, views)
    assert "train picture 4 are not finite" in mistake(
        "train_generator.py", *GENERATOR, "--steps", 9, "--latents", "runs/nan", "--out",
        "runs/from_nan", cwd=runs)


def test_a_generator_starts_from_another_with_new_classes(runs, picture_folder):
    """--init-from keeps all weights but the new classes' rows, which are "no class"."""
    odd = picture_folder / "a.. <b>\n"  # a class name that must do no harm
    odd.mkdir()
    Image.new("RGB", (40, 40), "green").save(odd / "1.png")
    (picture_folder / "sea").symlink_to(picture_folder / "dog")  # a class known already
    text = call("train_generator.py", "--init-from", "runs/generator/last.pt", "--data",
                picture_folder, "--lr", 0, "--batch-size", 2, "--steps", 1, "--workers", 0,
                "--cache-gb", 0.1, "--preview-steps", 1, "--out", "runs/tuned", cwd=runs)
    assert "new classes: a.. <b>?, cat, dog, eel" in text
    old, new = (torch.load(runs / f"runs/{name}/last.pt", weights_only=True)
                for name in ("generator", "tuned"))
    assert new["classes"] == ["a.. <b>\n", "cat", "dog", "eel", "sea"]
    table = new["ema"]["class_table.weight"]
    assert torch.equal(table[4], old["ema"]["class_table.weight"][old["classes"].index("sea")])
    assert torch.equal(table[1], old["ema"]["no_class"][0])
    assert same(*({k: v for k, v in c["ema"].items() if k != "class_table.weight"}
                  for c in (old, new)))
    assert same(old["tokenizer"], new["tokenizer"])
    # going on with it needs no file but its own
    (runs / "runs/tokenizer/last.pt").rename(runs / "elsewhere.pt")
    call("train_generator.py", "--resume", "--steps", 2, "--out", "runs/tuned", cwd=runs)
    (runs / "elsewhere.pt").rename(runs / "runs/tokenizer/last.pt")
    call("sample.py", "--checkpoint", "runs/tuned/last.pt", "--steps", 1, "--count", 1,
         "--singles", "tuned", cwd=runs)
    assert len(list((runs / "tuned").iterdir())) == 5


def test_a_tokenizer_starts_from_another(runs):
    call("train_tokenizer.py", "--init-from", "runs/tokenizer/last.pt", "--lr", 0, "--steps", 1,
         "--batch-size", 2, "--workers", 0, "--stats-images", 16, "--val-images", 4, "--out",
         "runs/again", cwd=runs)
    old, new = (torch.load(runs / f"runs/{name}/last.pt", weights_only=True)["ema"]
                for name in ("tokenizer", "again"))
    new |= {k: old[k] for k in ("latent_mean", "latent_std")}  # measured anew
    assert same(old, new)


def test_files_that_cannot_be_read_are_listed_at_the_end(picture_folder, tmp_path, capfd):
    (picture_folder / "dog" / "2.png").write_bytes(b"")
    invoke("train_tokenizer.py", *TOKENIZER, "--data", picture_folder, "--steps", 3, "--out",
           tmp_path / "x", "--workers", 1, "--cache-gb", 0.1, cwd=tmp_path)
    text = "".join(capfd.readouterr())  # also its loader's
    assert text.count("cannot read") == 1 and "1 files could not be read" in text
    assert (tmp_path / "x" / "unreadable.txt").read_text().endswith("dog/2.png\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(runs, monkeypatch):
    out = runs / "runs" / "full"
    out.mkdir()
    (out / "log.jsonl").mkdir()  # neither can a log be written where a folder is
    arguments = [*GENERATOR, "--steps", 1, "--out", out]
    assert "log.jsonl" in mistake("train_generator.py", *arguments, cwd=runs)
    (out / "log.jsonl").rmdir()
    monkeypatch.setattr(Log, "__init__", lambda log, *_: setattr(log, "path", Path("/dev/full")))
    with warnings.catch_warnings(record=True) as seen:  # nothing is left open
        warnings.simplefilter("always")
        assert "make room" in mistake("train_generator.py", *arguments, cwd=runs)
        gc.collect()
    assert not [w for w in seen if issubclass(w.category, ResourceWarning)]


def test_memory_that_runs_out_is_one_clear_error(runs, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Generator, "predict", fill)
    assert "lower --batch-size" in mistake("train_generator.py", *GENERATOR, "--out", "x2",
                                           cwd=runs)


def test_a_folder_without_a_readable_picture_is_one_error(picture_folder, tmp_path):
    for path in picture_folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    for workers in (0, 1):
        message = mistake("train_tokenizer.py", *TOKENIZER, "--data", picture_folder, "--out",
                          tmp_path / "x", "--workers", workers, cwd=tmp_path)
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
    ("train_generator.py", ["--resume", "--data", "synthetic-object"], "--init-from"),
    ("train_generator.py", ["--init-from", "runs/tokenizer/last.pt", "--out", "x"], "tokenizer"),
    ("train_generator.py", ["--init-from", "runs/generator/last.pt", "--layers", "9", "--out",
                            "x"], "other sizes"),
    ("train_generator.py", ["--cache-gb", "1", "--out", "x"], "--cache-gb"),
    ("sample.py", [*TRAINED, "--classes", "moon"], "mountains"),
    ("sample.py", [*TRAINED, "--width", "30"], "multiple of f"),
    ("sample.py", [*TRAINED, "--columns", "1"], "at least 2"),
    ("sample.py", ["--checkpoint", "runs/tokenizer/last.pt"], "holds a tokenizer"),
    ("sample.py", ["--checkpoint", "none.pt"], "none.pt"),
    ("sample.py", ["--steps", "-1"], "steps"),
    ("sample.py", ["--out", "x.jpg"], ".png"),
    ("sample.py", ["--device", "abacus"], "abacus")))
def test_mistakes_end_in_one_clear_error(runs, script, arguments, text):
    assert text in mistake(script, *arguments, cwd=runs)
