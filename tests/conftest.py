"""Small models and folders that several tests share."""

import dataclasses
import os
from functools import cache

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: a core each, and none spins for another's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.generator import Generator, GeneratorConfig, make_generator
from equimini.sampling.image_generator import ImageGenerator
from equimini.utils import checkpoint
from tests.helpers.scripts import GENERATOR, TOKENIZER, call

SMALL_TOKENIZER = TokenizerConfig(
    image_size=32, base_channels=8, multipliers=(1, 2, 2), blocks=1, attention_rows=(8,),
    norm_groups=4, z_channels=4, token_channels=6, semantic_channels=8)
SMALL_GENERATOR = GeneratorConfig(layers=3, embed_dim=32, heads=2, window=3, class_tokens=4,
                                  head_width=24, head_depth=2, dropout=0.1)


ON_GPUS = ("test_window_attention", "test_on_gpu")  # what these run on a GPU they say themselves


@pytest.fixture(autouse=True, scope="module")
def scripts_stay_on_the_cpu(request):
    """--device auto is the CPU here: tests compare bits and digits, and start two processes."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.split(".")[-1] not in ON_GPUS:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.backends.mps, "is_available",
                          cache(lambda: False))  # torch 2.15 looks for __wrapped__ in it
        yield


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random (those that start at zero, too), so that nothing is hidden."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.3 if p.dim() == 1 else 1 / p[0].numel() ** 0.5
            p.copy_(torch.randn(p.shape, generator=draw) * scale)
    return module


@pytest.fixture
def tokenizer() -> Tokenizer:
    model = randomize(Tokenizer(SMALL_TOKENIZER)).eval()
    model.set_statistics(0.5, 2.0)
    return model


@pytest.fixture
def saved_tokenizer(tokenizer, tmp_path):
    """Its checkpoint."""
    content = {"config": {"preset": "small", "model": dataclasses.asdict(SMALL_TOKENIZER)},
               "ema": tokenizer.state_dict(), "model": tokenizer.state_dict(), "step": 7}
    checkpoint.save(tmp_path / "t.pt", "tokenizer", content)
    return tmp_path / "t.pt"


def small_generator(**changes) -> Generator:
    """With random weights, of SMALL_GENERATOR but for these changes."""
    config = dataclasses.replace(SMALL_GENERATOR, **changes)
    return randomize(make_generator(config, num_classes=3, channels=6)).eval()


@pytest.fixture
def generator() -> Generator:
    return small_generator()


@pytest.fixture
def no_dropout() -> Generator:
    return small_generator(dropout=0.0)


def write_pictures(folder, names, sizes):
    """A folder of noise for each name, with a picture of each (height, width)."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def picture_folder(tmp_path):
    """Three classes with four pictures each, of different sizes."""
    return write_pictures(tmp_path / "pictures", ("cat", "dog", "eel"),
                          [(40 + 7 * i, 70 - 5 * i) for i in range(4)])


class TwoMaps(torch.nn.Module):
    """A small network of two feature maps, for --perceptual-net and its like."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[:, :2], torch.nn.functional.avg_pool2d(x, 2)]


@pytest.fixture
def maps_file(tmp_path) -> str:
    """Its TorchScript file."""
    torch.jit.script(TwoMaps()).save(str(tmp_path / "maps.pt"))
    return str(tmp_path / "maps.pt")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A tokenizer and a generator, trained for six steps on the built-in data."""
    folder = tmp_path_factory.mktemp("runs")
    call("train_tokenizer.py", *TOKENIZER, "--steps", 6, cwd=folder)
    call("train_generator.py", *GENERATOR, "--steps", 6, cwd=folder)
    return folder


@pytest.fixture
def model(generator, tokenizer) -> ImageGenerator:
    return ImageGenerator(generator, tokenizer, ["cat", "dog", "eel"])
