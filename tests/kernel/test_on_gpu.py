"""What only a GPU runs: graphs, draws in pinned memory, half precision, deterministic resuming.

The attention kernels have their own tests, in test_window_attention.py.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from tests.helpers.scripts import GENERATOR, ROOT, TOKENIZER, command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICE = "cuda"
PLAIN = "--precision float32 --no-fused-optimizer"


def train(kind, *flags, device, cwd):
    """Losses of a training of a few steps on a device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(f"train_{kind}.py", *flags, "--device", device), cwd=cwd,
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = cwd / (flags[flags.index("--out") + 1] if "--out" in flags else f"runs/{kind}")
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tokenizer, and the losses of a generator that was trained on the CPU."""
    folder = tmp_path_factory.mktemp("on_cpu")
    flags = ["--discriminator", "none", "--steps", 3]
    losses = train("tokenizer", *TOKENIZER, *flags, device="cpu", cwd=folder)
    mine = train("tokenizer", *TOKENIZER, *flags, "--out", "again", device=DEVICE, cwd=folder)
    assert mine == pytest.approx(losses, rel=1e-3)
    return folder, train("generator", *GENERATOR, *PLAIN.split(), "--dropout", 0, "--steps", 4,
                         device="cpu", cwd=folder)


@pytest.mark.parametrize("flags, rel", [
    (PLAIN, 1e-3), ("--precision float32 --fused-optimizer", 1e-3), ("--precision tf32", 1e-2),
    ("--precision bf16", 3e-2), ("--precision bf16 --checkpoint-activations", 3e-2),
    ("--precision bf16 --compile", 3e-2)], ids=str)
def test_training_goes_as_on_the_cpu(trained, flags, rel):
    folder, losses = trained
    mine = train("generator", *GENERATOR, *flags.split(), "--dropout", 0, "--steps", 4,
                 "--out", flags.replace("-", ""), device=DEVICE, cwd=folder)
    assert mine == pytest.approx(losses, rel=rel)


def test_a_resumed_run_is_the_uninterrupted_one(trained):
    """To the last bit, with --deterministic and dropout."""
    folder, _ = trained
    for name, steps in (("whole", [6]), ("parts", [3, 6])):
        train("generator", *GENERATOR, "--deterministic", "--steps", steps[0], "--out", name,
              device=DEVICE, cwd=folder)
        for more in steps[1:]:
            train("generator", "--resume", "--steps", more, "--out", name, device=DEVICE,
                  cwd=folder)
    whole, parts = (torch.load(folder / name / "last.pt", map_location="cpu")["ema"]
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bf16", 3e-2)])
def test_graphs_draw_the_same_columns(generator, tokenizer, precision, tolerance):
    """With a class that changes, and again from the graphs that were kept."""
    model = ImageGenerator(generator.to(DEVICE), tokenizer.to(DEVICE), ["cat", "dog", "eel"])
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [2] * 8])
    plain, graphs, again = (
        torch.stack(list(model.draw(labels, [1, 2], SamplingOptions(
            steps=4, precision=precision, cuda_graphs=graphs))), 1)
        for graphs in ("off", *2 * ["on" if DEVICE == "cuda" else "off"]))
    torch.testing.assert_close(graphs, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(again, graphs)
