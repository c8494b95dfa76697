"""The critics: layouts, augmentation, norms, and the two sides of the game."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from equimini.discriminator import (CircularConv, FeatureCritic, Head, Moved, PatchGAN,
                                    VirtualBatchNorm, augment)
from equimini.noise import rng
from equimini.presets import TokenizerTraining
from equimini.pretrained.torchscript import ScriptFeatures, script_maps
from equimini.pretrained.vision_transformer import DinoFeatures, VisionTransformer
from equimini.training.tokenizer_losses import make_critic
from equimini.training.tokenizer_trainer import Adversary
from equimini.utils.errors import UserError

CFG = TokenizerTraining(discriminator="dino", disc_head_channels=8, lr=1e-3)


def rngs(count, key=0):
    return [rng("test", key, i) for i in range(count)]


@pytest.fixture
def critic(maps_file):
    torch.manual_seed(0)
    return FeatureCritic(ScriptFeatures(script_maps(maps_file), torch.zeros(1, 3, 8, 8)), 8)


def test_patchgan_has_latent_diffusions_layout():
    net = PatchGAN(64, 3)
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    biases_and_norms = 64 + 2 * (128 + 256 + 512) + 1
    assert sum(p.numel() for p in net.parameters()) == weights + biases_and_norms
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("count", (1, 2, 7, 8, 9, 16, 19))
def test_virtual_batch_norm_takes_any_batch_in_groups_of_eight_at_most(count):
    norm = VirtualBatchNorm(3)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(count, 3, 5) * 4 + 2
    groups = math.ceil(count / 8)
    sizes = [count // groups + (i < count % groups) for i in range(groups)]
    expected = [F.batch_norm(g, None, None, norm.weight[:, 0], norm.bias[:, 0], training=True,
                             eps=1e-6) for g in x.split(sizes)]
    assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1
    torch.testing.assert_close(norm(x), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert norm(torch.zeros(1, 3, 1)).isfinite().all()


@pytest.mark.parametrize("length", (1, 2, 4, 5, 14))
def test_circular_conv_is_a_ring_of_any_length(length):
    conv, x = CircularConv(2), torch.randn(3, 2, length)
    places = torch.arange(-4, length + 4) % length
    torch.testing.assert_close(conv(x), F.conv1d(x[:, :, places], conv.weight, conv.bias))
    if length > 4:  # what torch calls circular
        plain = torch.nn.Conv1d(2, 2, 9, padding=4, padding_mode="circular")
        plain.load_state_dict(conv.state_dict())
        torch.testing.assert_close(conv(x), plain(x))
    shifted = conv(x.roll(1, 2))
    torch.testing.assert_close(shifted, conv(x).roll(1, 2), rtol=1e-5, atol=1e-5)


def test_every_convolution_of_a_head_is_spectrally_normalised():
    head = Head(6, 8)
    for _ in range(100):  # the power iteration converges over the steps
        head(torch.randn(2, 6, 9))
    for conv in (head.conv_in, head.conv, head.conv_out):
        weight = conv.weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=1e-2)


def test_augmentation_is_within_its_ranges_and_keyed_to_the_image():
    x = torch.rand(64, 3, 20, 32) * 2 - 1
    out = augment(x, rngs(64))
    assert out.shape == x.shape
    torch.testing.assert_close(augment(x[5:6], rngs(64)[5:6])[0], out[5])  # not on its batch
    assert not torch.equal(augment(x, rngs(64, key=1)), out)
    # a constant image: no translation in its middle, no contrast, no saturation: brightness alone
    grey = augment(torch.zeros(400, 3, 40, 40), rngs(400))
    levels = torch.stack([image[:, 15:25, 15:25].flatten().max() for image in grey])
    low, high = levels.min().item(), levels.max().item()
    # the zeros that come in from the border move the mean that contrast pulls to, and the zeroed
    # square may cover the middle: both keep the level within the brightness's range times 1.5
    assert -0.75 < low < -0.3 and 0.3 < high < 0.75


def test_pieces_of_images_and_their_gradient():
    x = torch.randn(3, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    places = [0, 2, 1], [3, 0, 2]
    pieces = Moved.apply(x, *places, 4, 4)
    for piece, image, i, j in zip(pieces, x, *places):
        assert torch.equal(piece, image[:, i:i + 4, j:j + 4])
    assert torch.autograd.gradcheck(lambda y: Moved.apply(y, *places, 4, 4), (x,))


def test_the_parts_of_the_augmentation():
    def fixed(**draws):  # a "generator" whose seven draws are known
        neutral = dict.fromkeys(("top", "left", "brightness", "saturation", "contrast"), 0.5)
        given = neutral | {"y": 0.0, "x": 0.0} | draws
        return [SimpleNamespace(random=lambda count: np.array([*given.values()]))]

    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    inside = (..., slice(2, None), slice(3, None))  # the zeroed corner at centre (0, 0): 3 x 5
    torch.testing.assert_close(augment(x, fixed())[inside], x[inside])
    zeroed = augment(x, fixed())[0, 0] == 0
    assert zeroed[:2, :3].all() and zeroed.sum() == 2 * 3  # half of 3 x 5 lies outside
    middle = augment(x, fixed(y=0.5, x=0.5))[0, 0] == 0
    assert middle.sum() == 3 * 5 and middle[7:10, 10:15].all()
    moved = augment(x, fixed(top=0.999, left=0.0))  # 2 rows up, 3 columns right
    torch.testing.assert_close(moved[..., 3:14, 6:], x[..., 5:16, 3:-3])
    assert moved[..., 14:, :].abs().max() == 0 and moved[..., :3].abs().max() == 0
    torch.testing.assert_close(augment(x, fixed(brightness=1.0))[inside], x[inside] + 0.5)
    grey = augment(x, fixed(saturation=0.0))[inside]
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x)[inside])
    flat = augment(x, fixed(contrast=0.0))[inside]
    torch.testing.assert_close(flat, ((x + x.mean()) / 2)[inside])


def test_dino_features_see_224_pixels_of_any_image():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 12, 12, 2, grid=14, tanh_gelu=True)
    features = DinoFeatures(vit)
    for size in ((64, 64), (64, 256), (300, 200), (256, 256)):
        images = torch.rand(2, 3, *size) * 2 - 1
        found = features(images, rng("test", 0))
        assert [tuple(t.shape) for t in found] == [(2, 12, 196)] * 5
    views = [features.view(torch.rand(1, 3, 240, 256), rng("test", i)) for i in range(20)]
    assert {tuple(v.shape) for v in views} == {(1, 3, 224, 224)}
    x = torch.arange(240 * 256.0).view(1, 1, 240, 256)
    crops = [v for v in (features.view(x, rng("test", i)) for i in range(20))
             if (v == v.round()).all() and (v[0, 0, 0, 1] - v[0, 0, 0, 0]) == 1
             and (v[0, 0, 1, 0] - v[0, 0, 0, 0]) == 256]
    assert 4 <= len(crops) <= 16  # the coin, 20 times


@pytest.mark.parametrize("count", (1, 3, 9))
def test_a_critic_learns_and_its_frozen_network_does_not(critic, count):
    game, x = Adversary(critic, CFG, seed=0), torch.rand(count, 3, 8, 8) * 2 - 1
    fake = (-x).requires_grad_()
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    net = critic.frozen[0].maps.net
    frozen = [p.clone() for p in (*net.parameters(), *net.buffers())]
    seen = game.features(fake, 3, real=False)
    gradient, = torch.autograd.grad(-critic.logits(seen).mean(), fake)
    assert gradient.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())
    logged = game.backward(game.features(x, 3, real=True), seen)
    assert all(math.isfinite(v) for v in (*logged.values(), game.stepper(game.lr, CFG.grad_clip)))
    after = critic.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.endswith("original"))
    assert all(torch.equal(a, b) for a, b in zip(frozen, (*net.parameters(), *net.buffers())))
    assert not any(k.startswith("frozen") for k in after)  # and is not saved


def test_a_critic_tells_apart_what_it_can_see(critic):
    game = Adversary(critic, dataclasses.replace(CFG, lr=1e-2), seed=0)
    for step in range(200):
        smooth = torch.rand(8, 3, 1, 1).expand(-1, -1, 8, 8) * 2 - 1
        noisy = torch.rand(8, 3, 8, 8) * 2 - 1
        logged = game.backward(game.features(smooth, step, True), game.features(noisy, step, False))
        game.stepper(game.lr, CFG.grad_clip)
    assert logged["logit_real"] > logged["logit_fake"] + 0.1


def test_real_and_fake_are_augmented_differently_and_resumed_alike(critic):
    game, x = Adversary(critic, CFG, seed=0), torch.rand(4, 3, 8, 8)
    real, fake, again = (game.features(x, 2, real) for real in (True, False, True))
    assert torch.equal(real[0], again[0]) and not torch.equal(real[0], fake[0])


@pytest.mark.parametrize("settings, text", (
    (dict(), "--dino-weights"), (dict(dino_weights="a", disc_net="b"), "not both"),
    (dict(dino_weights="missing.pth"), "missing.pth"),
    (dict(discriminator="patchgan", disc_net="b"), "--disc-net"),
    (dict(discriminator="none", dino_weights="b"), "--dino-weights"),
    (dict(discriminator="patchgan", disc_layers=6), "--disc-layers")))
def test_critics_that_cannot_be_made_are_errors(settings, text):
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match=text):
        make_critic(dataclasses.replace(CFG, **settings), x)
    assert make_critic(dataclasses.replace(CFG, discriminator="none"), x) is None
