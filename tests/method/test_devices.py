"""Do tensors of training steps, of sampling, of decoding stay on the model's device?

A CPU cannot tell by running: there, everything is on one device.  So models are put on the device
"meta", whose tensors have no data, under torch's fake tensors, which refuse most of what mixes
devices as CUDA would (not: an index from another device, and copies).  Numbers that the code reads
back from its tensors are made up.  What the code does for CUDA alone does not run here.
"""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from equimini import sampler
from equimini.autoencoder import Tokenizer
from equimini.discriminator import FeatureCritic, PatchGAN
from equimini.presets import GeneratorTraining, TokenizerTraining
from equimini.pretrained.lpips import Lpips
from equimini.pretrained.vision_transformer import (DinoFeatures, DinoV2Teacher, VisionTransformer,
                                                    resize_matrix)
from equimini.sampling import image_generator
from equimini.sampling.cuda_graphs import GraphedColumn, GraphedStep
from equimini.sampling.options import SamplingOptions
from equimini.training.generator_trainer import GeneratorRun, GeneratorTrainer
from equimini.training.tokenizer_trainer import Adversary, TokenizerRun, TokenizerTrainer
from tests.conftest import SMALL_TOKENIZER, small_generator

META = torch.device("meta")
NUMBERS = {"item": lambda x: 1.0, "tolist": lambda x: [1.0] * x.numel(), "__float__": lambda x: 1.0,
           "__int__": lambda x: 1, "__bool__": lambda x: True}
lookup = F.embedding


def embedding(indices, weight, *rest, **more):
    """`F.embedding`, which the fake one takes from any device."""
    assert indices.device == weight.device
    return lookup(indices, weight, *rest, **more)


def equal(a, b):
    """`torch.equal` of numbers that are all 1."""
    assert a.device == b.device
    return True


@pytest.fixture
def strict(monkeypatch):
    """Fake tensors, whose numbers are all 1 when they are read."""
    for name, stand_in in NUMBERS.items():
        monkeypatch.setattr(torch.Tensor, name, stand_in)
    monkeypatch.setattr(F, "embedding", embedding)
    monkeypatch.setattr(torch, "equal", equal)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta
    yield FakeTensorMode(allow_non_fake_inputs=True)
    resize_matrix.cache_clear()  # of fake ones


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("model, options", [({}, {"accumulate": 2}), *(
    pytest.param(*both, marks=pytest.mark.slow) for both in (
        ({}, {}), ({}, {"checkpoint_activations": True}), ({"real_equivariant": True}, {})))])
def test_generator_training(strict, tokenizer, model, options):
    model = small_generator(layers=1, head_depth=1, **model)
    trainer = GeneratorTrainer(model.to(META), tokenizer.to(META), ["a", "b", "c"],
                               GeneratorTraining(batch_size=4, warmup_steps=0, shift_group=2),
                               GeneratorRun(fused_optimizer=False, **options))
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    latents, labels = torch.zeros(4, 8, 6), torch.tensor([0, 1, 2, 0])
    with strict:
        trainer.step(0, latents, labels)
        trainer.step(1, images, labels)
        trainer.validate([(images, labels, range(4))])


@pytest.mark.parametrize("losses", ["plain", *slow("all")])
def test_tokenizer_training(strict, losses):
    """With PatchGAN; or with the published networks, in their sizes, and pieces."""
    everything = losses == "all"
    with META:  # no data, so no time either
        dino = DinoFeatures(VisionTransformer(16, 384, 12, 6, 14))
        teacher = DinoV2Teacher(VisionTransformer(14, 768, 2, 12, 37, layer_scale=True))
        distance = Lpips()
    cfg = TokenizerTraining(batch_size=4, warmup_steps=0, adv_start=0, align_start=0)
    shape = dataclasses.replace(SMALL_TOKENIZER, semantic_channels=768 * everything)
    critic = FeatureCritic(dino, 16) if everything else PatchGAN(8, 2)
    trainer = TokenizerTrainer(
        Tokenizer(shape).to(META), distance if everything else None,
        teacher if everything else None, Adversary(critic.to(META), cfg, 0), cfg,
        TokenizerRun(accumulate=1 + everything), torch.zeros(2, 3, 32, 32, device=META))
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with strict:
        scalars = trainer.step(0, images, None)
        trainer.validate([(images, None, None)])
    assert "adaptive_weight" in scalars and ("align" in scalars) == everything


@pytest.mark.parametrize("precision", ["float32", *slow("bf16")])
@pytest.mark.parametrize("options", [{"cuda_graphs": "on"}, *slow(
    {}, {"positions": "grow", "cfg": 1.0}, {"solver": "heun"})], ids=str)
def test_sampling(strict, model, precision, options, monkeypatch):
    monkeypatch.setattr(sampler, "_check_labels", lambda *_: None)  # fake labels have no values

    def record(function, buffers):  # without CUDA
        return bool, function(*buffers)
    monkeypatch.setattr(image_generator, "graphed", lambda draw, last, *generators: (
        GraphedColumn(draw, record), *(GraphedStep(g, last, record) for g in generators)))
    model.generator.to(META), model.tokenizer.to(META)
    labels = torch.tensor([0, 1])
    with strict:
        columns = list(model.draw(labels[:, None].expand(-1, 12), [0, 1], SamplingOptions(
            **{"cfg": 2.0, "steps": 2, "precision": precision, **options})))
        assert all(x.device == META for x in columns)
        model.decode(torch.stack(columns * 4, 1))
