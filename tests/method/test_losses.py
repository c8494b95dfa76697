"""The tokenizer's losses and its critic."""

import pytest
import torch
import torch.nn.functional as F

from equimini.losses import (adaptive_weight, alignment_loss, hinge_loss, image_gradients, kl_loss,
                             psnr, reconstruction_loss)
from equimini.pretrained.torchscript import FeatureDistance
from equimini.training.tokenizer_trainer import adversarial_ramp
from equimini.utils.errors import UserError
from tests.conftest import TwoMaps


def test_scales_of_the_losses():
    """Sums over pixels and latents, means over the batch."""
    x, x_hat = torch.zeros(4, 3, 8, 6), torch.full((4, 3, 8, 6), 0.5)
    assert reconstruction_loss(x, x_hat).item() == pytest.approx(0.5 * 3 * 8 * 6)
    distance = torch.tensor([0.0, 0.1, 0.2, 0.3])
    expected = (0.5 + 0.15) * 3 * 8 * 6  # the distance is added to every difference
    assert reconstruction_loss(x, x_hat, distance).item() == pytest.approx(expected)
    mean = torch.full((4, 5, 6), 2.0)
    assert kl_loss(mean).item() == pytest.approx(0.5 * 4 * 5 * 6)
    assert alignment_loss(torch.zeros(4, 5, 2, 3), torch.full((4, 5, 2, 3), 2.0)) == 4 * 5 * 2 * 3


def test_hinge_loss_is_zero_beyond_the_margins_and_linear_inside():
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-2.0])).item() == 0
    assert hinge_loss(torch.tensor([0.5]), torch.tensor([0.0])).item() == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    ten, five = torch.tensor(10.0), torch.tensor(5.0, requires_grad=True)
    weight = adaptive_weight(ten, five)
    assert weight.item() == pytest.approx(10 / (5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(ten * 1e9, five).item() == 1e4  # clamped


def test_image_gradients_are_those_through_the_whole_way():
    """At the weight of the last conv, from which the adaptive weight is made."""
    conv, critic = torch.nn.Conv2d(2, 3, 3).double(), torch.nn.Conv2d(3, 1, 2).double()
    x_hat = conv(torch.randn(2, 2, 6, 6, dtype=torch.float64))

    def losses(image):
        return (image - 1).square().sum() / 2, -critic(image).tanh().mean()

    image = x_hat.detach().requires_grad_()
    found = image_gradients(*losses(image), image, x_hat, conv.weight)
    for wanted, place in ((found.weight, conv.weight), (found.image, x_hat)):
        for gradient, loss in zip(wanted, losses(x_hat)):
            expected, = torch.autograd.grad(loss, place, retain_graph=True)
            torch.testing.assert_close(gradient, expected)


def test_adversarial_ramp():
    at = [adversarial_ramp(step, 3, 4) for step in range(9)]
    assert at == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [adversarial_ramp(step, 3, 0) for step in (2, 3)] == [0, 1]  # the paper's


def test_feature_distance(maps_file, tmp_path):
    distance = FeatureDistance(maps_file)
    x, y = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8, requires_grad=True)
    assert distance(x, x).abs().max() < 1e-6
    assert torch.allclose(distance(x, 3 * x), torch.zeros(3), atol=1e-6)  # directions only
    unit = [[F.normalize(m, dim=1) for m in TwoMaps()(images)] for images in (x, y)]
    expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(*unit)) / 2
    torch.testing.assert_close(distance(x, y), expected)
    distance(x, y).sum().backward()
    assert y.grad.abs().sum() > 0
    (tmp_path / "bad.pt").write_bytes(b"no network")
    for name in ("bad.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            FeatureDistance(str(tmp_path / name))


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x, x + 0.2).tolist() == pytest.approx([20.0, 20.0])  # 10 log10(4 / 0.04)
