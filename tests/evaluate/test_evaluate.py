"""The evaluation command, on tiny models and a tiny feature network."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equimini import load_generator, load_tokenizer
from equimini.autoencoder import Tokenizer
from equimini.evaluate import commands as evaluate
from equimini.evaluate import feature_networks, feature_shards, sources
from equimini.evaluate.feature_networks import FeatureNetwork, both_in_one, load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance
from equimini.evaluate.report import distance_name
from equimini.pretrained.published_weights import INCEPTION, load_lpips
from equimini.sampling.image_generator import ImageGenerator
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_content
from equimini.utils.errors import UserError
from equimini.utils.files import download, file_hash
from equimini.utils.images import load_image, to_float, to_pixels
from tests.conftest import SMALL_GENERATOR
from tests.method.test_losses import TwoMaps
from tests.tools.test_pretrained import lpips_layout, vgg_layout

ROOT = Path(__file__).parents[2]


class TinyNet(torch.nn.Module):
    """Called as the Inception: 12 features (means of quarters), 5 classes."""

    def __init__(self, logits: bool = False) -> None:
        super().__init__()
        self.logits = logits  # without the softmax

    def forward(self, img: torch.Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(img.float() / 255, [2, 2]).flatten(1)
        if return_features:
            return x
        return 20 * x[:, :5] - 10 if self.logits else torch.softmax(20 * x[:, :5], 1)


def features(folder):
    """TinyNet's of the pictures in a folder, scaled and cropped as the evaluation does."""
    x = []
    for path in sorted(Path(folder).rglob("*.png")):
        image = np.asarray(load_image(path, 32, 32))
        left = (image.shape[1] - 32) // 2
        x.append(torch.from_numpy(image[:, left:left + 32].copy()).permute(2, 0, 1))
    return TinyNet()(torch.stack(x), return_features=True)


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer, generator):
    """A folder with a generator, a tokenizer, networks and pictures; shards of 8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feature_shards, "SHARD", 8)
    torch.jit.script(TinyNet()).save("net.pt")
    torch.jit.script(TwoMaps()).save("maps.pt")
    checkpoint.save("generator.pt", "generator", {
        "config": {"model": dataclasses.asdict(SMALL_GENERATOR)}, "classes": ["a", "b", "c"],
        "ema": generator.state_dict(), "tokenizer": tokenizer_content(tokenizer)})
    checkpoint.save("tokenizer.pt", "tokenizer", {
        "config": {"model": dataclasses.asdict(tokenizer.config)}, "ema": tokenizer.state_dict()})
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 10)):
        for name in "abc":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = draw.normal(draw.uniform(60, 190, 3), 30, (34, 40, 3)).clip(0, 255)
                Image.fromarray(image.astype(np.uint8)).save(split + f"/{name}/{i}.png")
    return tmp_path


DATA = "--data train --val-data val --network net.pt --workers 0".split()
GENERATOR = ["generator", "--checkpoint", "generator.pt", *DATA, "--n", "20", "--steps", "2"]


def call(*arguments):
    evaluate.main([str(a) for a in arguments])


def report(out):
    return json.loads(Path(out, "report.json").read_text())


def row(report_, name, **wanted):
    return next(r for r in report_["results"] if r["set"].startswith(name)
                and all(r[k] == v for k, v in wanted.items()))


def test_a_sweep_reports_everything_and_draws_it(folder, capsys):
    call(*GENERATOR, "--cfg", "1,3,1.0", "--out", "a", "--maps-network", "maps.pt", "--keep-images")
    found = report("a")
    assert [r.get("cfg") for r in found["results"]] == [1, 3, None, None]
    assert all(r["n"] == 20 for r in found["results"])
    assert found["checkpoint"] == {"file": "generator.pt", "sha256": file_hash("generator.pt"),
                                   "weights": "ema"}
    assert found["network"]["sha256"] == file_hash("net.pt")
    assert found["reference"]["n"] == 30 and len(found["reference"]["sha256"]) == 64
    assert found["settings"] | {"solver": "euler", "schedule": "linear", "steps": 2, "seed": 0,
                                "columns": 8} == found["settings"]
    assert found["distance"] == "Frechet distance (net, 20 pictures)"
    text = capsys.readouterr().out
    assert "FID-50k" not in text and "published Inception" in text
    for name in ("samples", "tokenizer's limit", "floor"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{row(found, name)['frechet_distance']:.3f}" in line
    assert row(found, "floor")["frechet_distance"] < row(found, "samples")["frechet_distance"]
    assert {"psnr", "ssim", "feature_distance"} <= row(found, "tokenizer").keys()
    # every picture is the one that the Python interface draws
    model = load_generator("generator.pt")
    kept = sorted(Path("a/images/cfg-3.0").iterdir())
    assert len(kept) == 20 and kept[-1].name == "class0002_seed000017.png"
    image = model.sample(["c"], seed=17, cfg=3.0, steps=2)[0]
    drawn = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert abs(drawn - np.asarray(Image.open(kept[-1]))).max() <= 1
    sheet = Image.open("a/samples.png")
    assert sheet.height > 2 * 32 and sheet.width > 8 * 32  # a shard has 8
    assert Image.open("a/curve.png").size == (720, 440)


def test_a_model_of_small_pictures_is_measured_enlarged(folder):
    """Samples, limit and floor at twice its height; the samples are its own, enlarged."""
    call(*GENERATOR, "--out", "a", "--keep-images", "--cfg", 2, "--maps-network", "maps.pt")
    call(*GENERATOR, "--out", "b", "--keep-images", "--cfg", 2, "--height", 64)
    for small, large in zip(*(sorted(Path(f"{x}/images/cfg-2.0").iterdir()) for x in "ab")):
        enlarged = Image.open(small).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(enlarged), np.asarray(Image.open(large)))
    found = report("b")
    assert found["pixels"] == "64x64" and found["settings"]["height"] == 64
    assert row(found, "floor")["frechet_distance"] != row(report("a"), "floor")["frechet_distance"]
    assert 0 < row(found, "tokenizer")["psnr"] < 60
    with pytest.raises(UserError, match="a multiple of the generator's 32 pixels, got 48"):
        call(*GENERATOR, "--out", "c", "--height", 48)


def test_numbers_are_those_of_the_pictures(folder):
    """The kept files, the floor's and the reference's, through the formulas by hand."""
    call(*GENERATOR, "--out", "a", "--keep-images", "--cfg", "2")
    reference = Gaussian.fit(features("val"))
    samples = Gaussian.fit(features("a/images/cfg-2.0"))
    assert row(report("a"), "samples")["frechet_distance"] == pytest.approx(
        frechet_distance(samples, reference), rel=1e-4)  # features are float32
    call(*GENERATOR, "--n", 36, "--out", "b")  # all training pictures
    floor = Gaussian.fit(features("train"))
    assert row(report("b"), "floor")["frechet_distance"] == pytest.approx(
        frechet_distance(floor, reference), rel=1e-4)


def same_numbers(a, b, rel=1e-5):
    assert len(a["results"]) == len(b["results"])
    for x, y in zip(a["results"], b["results"]):
        assert x.keys() == y.keys()
        for name, value in x.items():
            near = pytest.approx(value, rel=rel, abs=1e-7) if isinstance(value, float) else value
            assert y[name] == near, name


def test_batch_size_does_not_matter(folder):
    for size in (3, 64):
        call(*GENERATOR, "--batch-size", size, "--out", size, "--cache", f"cache{size}",
             "--maps-network", "maps.pt")
    same_numbers(report("3"), report("64"))
    assert abs(np.asarray(Image.open("3/samples.png")).astype(int)
               - np.asarray(Image.open("64/samples.png"))).max() <= 1


def test_interrupted_and_resumed_equals_uninterrupted(folder, monkeypatch):
    call(*GENERATOR, "--out", "whole", "--cache", "c1", "--cfg", "1,2")
    decode, calls = ImageGenerator.decode, []

    def interrupted(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(self, tokens)

    monkeypatch.setattr(ImageGenerator, "decode", interrupted)
    again = [*GENERATOR, "--out", "again", "--cache", "c2", "--cfg", "1,2"]
    with pytest.raises(KeyboardInterrupt):
        call(*again)
    assert not Path("again/report.json").exists()
    call(*again)
    assert calls == [8, 8, 4, 8, 8, 8, 4]  # only the shard that was cut off came again
    assert report("again") == report("whole")
    # more samples: only what is new is drawn
    calls[:] = [0] * 9
    call(*again, "--n", 24, "--cfg", "1")
    assert calls[9:] == [8] and row(report("again"), "samples")["n"] == 24
    for file in Path("again/samples").glob("*/00000016-00000020.npz"):
        file.unlink()
    call(*again, "--cfg", "1")  # and back: the longer file serves, its first 20 are taken
    assert len(calls) == 10
    assert row(report("again"), "samples") == row(report("whole"), "samples", cfg=1)
    call(*again, "--keep-images", "--cfg", "1")  # pictures that were not kept are drawn again
    assert len(calls) == 13 and len(list(Path("again/images/cfg-1.0").iterdir())) == 20


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder, monkeypatch):
    content = checkpoint.load("generator.pt", "generator")
    names = ["balloon", "house", "ball"]
    checkpoint.save("generator.pt", "generator", {**content, "classes": names})
    # processes of their own have shards of 256 pictures: enough for both to get some
    monkeypatch.setattr(feature_shards, "SHARD", 256)
    more = [*GENERATOR[:-4], "--samples", "300", "--steps", "1", "--data", "synthetic-object",
            "--val-data", "", "--val-fraction", "0.002"]
    call(*more, "--out", "one", "--cache", "c1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "equimini.evaluate", *more, "--out", "two", "--cache", "c2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nsamples ") == 1  # one of them prints
    same_numbers(report("one"), report("two"))


def test_equal_folders_are_at_distance_zero(folder, capsys):
    shutil.copytree("val", "twin")
    call(*GENERATOR, "--data", "twin", "--n", 30, "--out", "a")
    floor = row(report("a"), "floor")
    assert floor["frechet_distance"] < 1e-9
    assert any("30 of the floor's pictures are also in the reference" in n for n in report("a")["notes"])
    call(*GENERATOR, "--reference", "train", "--n", 36, "--out", "b")
    assert row(report("b"), "floor")["frechet_distance"] < 1e-9
    assert "also in the reference" in capsys.readouterr().out


def test_reference_features_are_kept_by_content(folder, monkeypatch):
    seen = []
    compute = FeatureNetwork.__call__

    def counted(self, pictures):
        seen.append(len(pictures))
        return compute(self, pictures)

    monkeypatch.setattr(FeatureNetwork, "__call__", counted)
    call(*GENERATOR, "--out", "a")
    first, _ = sum(seen), seen.clear()
    shutil.move("val", "moved")
    call(*GENERATOR, "--val-data", "moved", "--out", "b")
    assert (first, sum(seen)) == (20 * 3 + 30 + 1, 20 + 1)  # only the samples, and one trial
    assert report("a")["reference"]["sha256"] == report("b")["reference"]["sha256"]
    seen.clear()
    path = Path("moved/a/0.png")
    Image.open(path).rotate(90).save(path)  # one picture changes: its shard, and no other
    call(*GENERATOR, "--val-data", "moved", "--out", "b")
    assert sum(seen) - 1 in (8, 6)
    assert report("a")["reference"]["sha256"] != report("b")["reference"]["sha256"]


def test_statistics_from_an_npz(folder, capsys):
    call(*GENERATOR, "--out", "a")
    x = features("val").double()
    np.savez("stats.npz", mu=x.mean(0), sigma=torch.cov(x.T))
    call(*GENERATOR, "--reference", "stats.npz", "--out", "b")
    for name in ("samples", "floor", "tokenizer"):
        one, other = row(report("a"), name), row(report("b"), name)
        assert one["frechet_distance"] == pytest.approx(other["frechet_distance"], rel=1e-3)
        assert "kid" in one and "kid" not in other
    assert "no KID" in capsys.readouterr().out


def test_a_reference_that_is_none_is_one_clear_error(folder):
    np.savez("good.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez("wrong.npz", mu=np.zeros(12))
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("lopsided.npz", mu=np.zeros(12), sigma=np.triu(np.ones((12, 12))))
    np.savez("objects.npz", mu=np.array([{}]), sigma=np.eye(12))
    np.savez("scalar.npz", mu=3.0, sigma=np.eye(12))
    np.savez("floats.npz", arr_0=np.zeros((5, 8, 8, 3)))
    np.savez("flat.npz", arr_0=np.zeros((5, 8), np.uint8))
    np.savez("few.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8))
    np.save("array.npy", np.zeros(3))
    Path("array.npy").rename("renamed.npz")
    whole = Path("good.npz").read_bytes()
    Path("short.npz").write_bytes(whole[:-40])
    Path("empty.npz").write_bytes(b"")
    Path("page.npz").write_text("<!DOCTYPE html><html>Not found</html>")
    damaged = bytearray(whole)
    damaged[200:220] = b"\x01" * 20
    Path("damaged.npz").write_bytes(damaged)
    tokenizer = load_tokenizer("tokenizer.pt")
    cfg = dataclasses.replace(evaluate.TOKENIZER, data="train", val_data="val", network="net.pt",
                              workers=0)
    for name, text in (("wrong", "it has mu"), ("small", "3 features, the network 12"),
                       ("none", "No such file"), ("lopsided", "not symmetric"),
                       ("objects", "objects.npz must be"), ("scalar", "scalar.npz must be"),
                       ("floats", "float64.*not uint8"), ("flat", "not uint8"),
                       ("few", "3 pictures; it takes at least 4"), ("renamed", "one array"),
                       ("short", "cut short"), ("empty", "is empty"), ("page", "begins with"),
                       ("damaged", "damaged.npz must be")):
        with pytest.raises(UserError, match=text) as caught:
            evaluate.ModelBench(dataclasses.replace(cfg, reference=f"{name}.npz"),
                                tokenizer.config, torch.device("cpu"))
        assert "\n" not in str(caught.value) and "allow_pickle" not in str(caught.value), name


def test_the_tokenizer_against_its_originals(folder):
    call("tokenizer", "--checkpoint", "tokenizer.pt", *DATA, "--maps-network", "maps.pt",
         "--out", "a")
    found = report("a")
    decoded = row(found, "reconstructions")
    assert decoded["n"] == 30 and found["reference"]["n"] == 30
    assert {"psnr", "ssim", "feature_distance", "kid", "inception_score"} <= decoded.keys()
    assert row(found, "floor")["n"] == 36
    assert Image.open("a/reconstructions.png").height > 64
    # the same tokenizer inside a generator
    call("tokenizer", "--checkpoint", "generator.pt", *DATA, "--out", "b")
    assert row(report("b"), "recon")["psnr"] == decoded["psnr"]


def test_lpips_where_its_weights_are_given(folder):
    torch.manual_seed(0)
    torch.save(vgg_layout(), "vgg.pt")
    torch.save(lpips_layout(), "lin.pt")
    call("tokenizer", "--checkpoint", "tokenizer.pt", *DATA, "--n", 8, "--lpips-weights",
         "vgg.pt,lin.pt", "--out", "a")
    found = report("a")
    assert len(found["distances"]["lpips"]) == 64
    tokenizer, lpips = load_tokenizer("tokenizer.pt"), load_lpips("vgg.pt,lin.pt")
    x = evaluate.ModelBench(dataclasses.replace(
        evaluate.TOKENIZER, data="train", val_data="val", network="net.pt", workers=0),
        tokenizer.config, torch.device("cpu"))
    x = to_float(next(x.real(x.held_out, 8).batches(0, 8))[0])
    expected = lpips(x, tokenizer.decode(tokenizer.encode(x)).clamp(-1, 1)).mean().item()
    assert row(found, "recon")["lpips"] == pytest.approx(expected, rel=1e-5)


def test_solvers_are_passed_on_and_reported(folder):
    call(*GENERATOR, "--solver", "heun", "--time-shift", "2", "--precision", "bf16",
         "--temperature", "1.1", "--keep-images", "--cfg", "2", "--out", "a")
    settings = report("a")["settings"]
    assert settings["solver"] == "heun" and settings["time_shift"] == 2
    assert settings["precision"] == "bf16" and settings["temperature"] == 1.1
    image = load_generator("generator.pt").sample(["b"], seed=4, steps=2, solver="heun",
                                                  time_shift=2.0, precision="bf16",
                                                  temperature=1.1)
    kept = np.asarray(Image.open("a/images/cfg-2.0/class0001_seed000004.png")).astype(int)
    plain = load_generator("generator.pt").sample(["b"], seed=4, steps=2)
    near, far = (abs(to_pixels(x)[0].permute(1, 2, 0).numpy() - kept).mean() for x in (image, plain))
    assert near < 2 and far > 2 * near  # bf16 depends on the batch a little


@pytest.mark.parametrize("kept", (8, 50_000))  # of the reference's features: pairs stay pairs
def test_a_perfect_tokenizer_is_at_distance_zero(folder, monkeypatch, kept):
    monkeypatch.setattr(sources, "FEATURES_KEPT", kept)
    monkeypatch.setattr(Tokenizer, "encode", lambda self, x: x)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, x: x)
    call("tokenizer", "--checkpoint", "tokenizer.pt", *DATA, "--maps-network", "maps.pt",
         "--out", "a")
    perfect = row(report("a"), "reconstructions")
    assert perfect["n"] == 30 and perfect["frechet_distance"] < 1e-9
    assert abs(perfect["frechet_extrapolated"]) < 1e-9
    assert perfect["ssim"] == pytest.approx(1) and abs(perfect["kid"]) < 1e-12
    assert perfect["feature_distance"] < 1e-6 and perfect["psnr"] > 90


def test_no_inception_score_of_what_is_no_probability(folder):
    torch.jit.script(TinyNet(logits=True)).save("logits.pt")
    call("tokenizer", "--checkpoint", "tokenizer.pt", *DATA, "--network", "logits.pt", "--out", "a")
    found = report("a")
    assert "inception_score" not in found["results"][0] and "kid" in found["results"][0]
    assert any("no Inception Score" in note for note in found["notes"])


def test_a_report_is_json_whatever_the_numbers(folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "compare", lambda *_, **__: {"n": 30, "kid": float("nan"),
                                                         "frechet_distance": float("inf")})
    call("tokenizer", "--checkpoint", "tokenizer.pt", *DATA, "--out", "a")
    found = json.loads(Path("a/report.json").read_text(), parse_constant=pytest.fail)
    assert found["results"][0]["kid"] is None and found["results"][0]["frechet_distance"] is None


def test_images_of_any_kind_are_compared(folder, capsys):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 20, 30, 3), np.uint8)
    Path("drawn").mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(f"drawn/{i}.png")
    np.savez("stored.npz", arr_0=pixels, arr_1=np.zeros(9, np.int64))
    np.savez_compressed("compressed.npz", pixels)
    x = TinyNet()(torch.from_numpy(pixels).permute(0, 3, 1, 2), True).double()
    np.savez("stats.npz", mu=x.mean(0), sigma=torch.cov(x.T), mu_s=np.zeros(3), sigma_s=np.eye(3))
    found = {}
    for name in ("drawn", "stored.npz", "compressed.npz", "stats.npz"):
        call("images", name, "--reference", "val", "--network", "net.pt", "--workers", 0,
             "--image-size", 20, "--width", 30, "--out", "a")
        found[name] = report("a")
    distances = [r["results"][0]["frechet_distance"] for r in found.values()]
    assert distances == pytest.approx([distances[0]] * 4, rel=1e-4) and distances[0] > 0
    kids = [r["results"][0].get("kid") for r in found.values()]
    assert kids[3] is None and kids[:3] == pytest.approx([kids[0]] * 3, rel=1e-4)
    assert found["drawn"]["pixels"] == "30x20" and found["drawn"]["reference"]["n"] == 30
    for name in ("drawn", "stored.npz", "stats.npz"):
        call("images", "drawn", "--reference", name, "--network", "net.pt", "--out", "b")
        assert report("b")["results"][0]["frechet_distance"] < 1e-6
    assert "mu_s, sigma_s in the file are not used" in capsys.readouterr().out
    call("images", "stored.npz", "--reference", "val", "--network", "net.pt", "--out", "b")
    assert report("b")["reference"]["pixels"] == "30x20"  # real pictures take the samples' size
    # ADM's references hold both: another network than theirs takes the pictures
    np.savez("adm.npz", arr_0=pixels, mu=np.zeros(3), sigma=np.eye(3))
    call("images", "drawn", "--reference", "adm.npz", "--network", "net.pt", "--out", "c")
    assert report("c")["reference"]["n"] == 9
    with pytest.raises(UserError, match="--reference is needed"):
        call("images", "drawn", "--network", "net.pt")
    with pytest.raises(UserError, match="nowhere"):
        call("images", "nowhere", "--reference", "val", "--network", "net.pt")


def test_samples_are_written_as_adm_reads_them(folder):
    call(*GENERATOR, "--npz", "--cfg", "2", "--out", "a")
    with np.load("a/cfg-2.0.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].shape == (20, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [k % 3 for k in range(20)]
        for k in (0, 19):
            png = Image.open(f"a/images/cfg-2.0/class{k % 3:04d}_seed{k:06d}.png")
            assert np.array_equal(file["arr_0"][k], np.asarray(png))
    call("images", "a/cfg-2.0.npz", "--reference", "val", "--network", "net.pt", "--image-size", 32,
         "--out", "b")
    again = report("b")["results"][0]["frechet_distance"]
    assert again == pytest.approx(row(report("a"), "samples")["frechet_distance"], rel=1e-4)


def test_files_that_cannot_be_read_are_counted(folder):
    Path("val/a/3.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save("train/b/2.png")
    for _ in range(2):  # computed, and from the cache
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*GENERATOR, "--n", 36, "--out", "a")
        found = "\n".join(report("a")["notes"])
        assert "reference: 1 files cannot be read" in found
        assert "floor (real pictures): 1 pictures are smaller" in found


def test_built_in_pictures_as_data_and_reference(folder):
    data = ["--network", "net.pt", "--workers", "0", "--data", "synthetic-object",
            "--val-fraction", "0.001", "--checkpoint", "tokenizer.pt"]
    call("tokenizer", *data, "--n", 16, "--out", "a")
    assert row(report("a"), "recon")["n"] == 16
    call("tokenizer", *data, "--reference", "synthetic", "--n", 8, "--out", "b")
    assert row(report("b"), "floor")["frechet_distance"] > row(report("a"), "floor")[
        "frechet_distance"]


def test_the_name_fid_is_earned():
    def net(sha256):
        return FeatureNetwork(None, "inception-2015-12-05", sha256, torch.device("cpu"), True)

    inception = net(INCEPTION.sha256)
    assert distance_name(inception, 50_000) == "FID-50k"
    assert distance_name(inception, 50_000, "tokenizer") == "rFID-50k"
    for other in (distance_name(inception, 49_999), distance_name(net("0" * 64), 50_000)):
        assert other.startswith("Frechet distance (inception-2015-12-05, ")


def test_downloads_are_checked(folder, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    kept, sha256 = folder / "hub/checkpoints/inception-2015-12-05.pt", file_hash("net.pt")
    published = dataclasses.replace(INCEPTION, url=(folder / "net.pt").as_uri())
    monkeypatch.setattr(feature_networks, "INCEPTION", published)
    with pytest.raises(UserError, match=f"{sha256}, expected"):
        load_network("download")
    assert not list(kept.parent.iterdir())  # nothing unchecked is left behind
    net = load_network("download", sha256.upper())
    assert net.verified and not net.is_inception and kept.is_file()
    kept.unlink()
    monkeypatch.setattr(feature_networks, "INCEPTION",
                        dataclasses.replace(published, url=published.url + "x"))
    with pytest.raises(UserError, match="cannot download.*give its place with --network"):
        load_network("download")
    assert not load_network("net.pt").verified
    assert load_network("net.pt", sha256).verified


class Served(io.BytesIO):
    """A reply that promises more bytes than come, or breaks off."""

    headers = {"Content-Length": "10"}


@pytest.mark.parametrize("error", (None, TimeoutError("timed out"), ConnectionError("reset")))
def test_a_download_that_breaks_off_is_no_fault_of_the_disk(tmp_path, monkeypatch, error):
    def read(self, *_):
        raise error

    if error:
        monkeypatch.setattr(Served, "read", read)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Served(b"short"))
    with pytest.raises(UserError, match="cannot download.*give its place with --x"):
        download("http://nowhere/net.pt", tmp_path / "net.pt", "", "--x")
    assert not list(tmp_path.iterdir())


class Layers(torch.nn.Module):
    """Built as the published Inception: early return, checks of shapes, changes in place."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(8, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.out, self.other = torch.nn.Linear(6, 5), other

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        batch, channels, height, width = img.shape
        assert channels == 3
        x = torch.nn.functional.interpolate(img.to(torch.float32), [20, 20], mode="bilinear")
        x -= 128
        if self.other and not return_features:
            x = x * 2
        features = self.layers(x)
        if return_features:
            return features
        logits = features @ self.out.weight.T
        if not no_output_bias:
            logits = logits + self.out.bias
        return torch.softmax(logits, 1)


@pytest.mark.parametrize("other", (False, True), ids=("alike", "of other features"))
def test_a_network_runs_once_for_both_outputs_where_it_can(tmp_path, other):
    torch.manual_seed(0)
    torch.jit.script(Layers(other).eval()).save(str(tmp_path / "net.pt"))
    net = load_network(str(tmp_path / "net.pt"))
    x = torch.randint(0, 256, (7, 3, 24, 30), dtype=torch.uint8)
    with torch.no_grad():
        wanted = net.net(x, return_features=True), net.net(x, no_output_bias=True)
        if not other:  # both convolutions once
            graph = both_in_one(net.net).graph
            assert sum(n.kind() in ("aten::conv2d", "aten::_convolution")
                       for n in graph.nodes()) == 2
    for got, want in zip(net(x), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert (net.both == net.run_twice) == other


@pytest.mark.parametrize("arguments, text", (
    (["--network", ""], "--network is needed"),
    (["--network", "none.pt"], "none.pt"),
    (["--network", "train/a/0.png"], "as TorchScript"),
    (["--network", "maps.pt"], "cannot be called"),
    (["--network-sha256", "12ab"], "expected 12ab"),
    (["--maps-network", "none.pt"], "none.pt"),
    (["--cfg", "2,x"], "--cfg takes numbers"), (["--cfg", "nan"], "--cfg"),
    (["--cfg", "-1"], "--cfg"),
    (["--reference", "nowhere"], "nowhere"),
    (["--data", "synthetic", "--val-data", ""], "give --data the pictures"),
    (["--weights", "raw"], "only one set of weights"),
    (["--checkpoint", "tokenizer.pt"], "holds a tokenizer"),
    (["--n", "2"], "n must be at least 4"),
    (["--steps", "3"], "samples of other settings \\(steps\\)")))
def test_mistakes_are_one_clear_error(folder, arguments, text):
    if "--steps" in arguments:
        call(*GENERATOR)
    with pytest.raises(UserError, match=text):
        call(*GENERATOR, *arguments)
    if "--steps" in arguments:
        call(*GENERATOR, *arguments, "--overwrite")
        assert report("runs/evaluate-generator")["settings"]["steps"] == 3


def test_fewer_samples_than_classes_are_refused(folder):
    content = checkpoint.load("generator.pt", "generator")
    content["ema"]["class_table.weight"] = content["ema"]["class_table.weight"].repeat(4, 1)
    checkpoint.save("generator.pt", "generator", {**content, "classes": list("abcdefghijkl")})
    with pytest.raises(UserError, match="--n 8 would draw only the first 8 of the 12 classes"):
        call(*GENERATOR, "--n", 8)


def test_a_small_reference_and_a_damaged_shard(folder):
    for i in range(2, 10):
        for name in "abc":
            Path(f"val/{name}/{i}.png").unlink()
    call(*GENERATOR, "--out", "a")  # 6 pictures
    for name in "bc":
        shutil.rmtree(f"val/{name}"), shutil.rmtree(f"train/{name}")
    with pytest.raises(UserError, match="2 pictures; it takes at least 4"):
        call(*GENERATOR, "--out", "b")
    path = next(Path("a/samples/cfg-2.0").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged.*delete it"):
        call(*GENERATOR, "--out", "a", "--val-data", "train")
