"""The tokenizer's losses and its critic."""

import pytest
import torch
import torch.nn.functional as F

from equimini.losses import (adaptive_weight, adversarial_ramp, alignment_loss, hinge_loss,
                             image_gradients, kl_loss, psnr, reconstruction_loss)
from equimini.pretrained.torchscript import FeatureDistance
from equimini.utils.errors import UserError


class TwoMaps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[:, :2], F.avg_pool2d(x, 2)]


def test_scales_of_the_losses():
    """Sums over pixels and latents, means over the batch."""
    x, x_hat = torch.zeros(4, 3, 8, 6), torch.full((4, 3, 8, 6), 0.5)
    assert reconstruction_loss(x, x_hat).item() == pytest.approx(0.5 * 3 * 8 * 6)
    distance = torch.tensor([0.0, 0.1, 0.2, 0.3])
    expected = (0.5 + 0.15) * 3 * 8 * 6  # the distance is added to every difference
    assert reconstruction_loss(x, x_hat, distance).item() == pytest.approx(expected)
    mean = torch.full((4, 5, 6), 2.0)
    assert kl_loss(mean).item() == pytest.approx(0.5 * 4 * 5 * 6)


def test_hinge_loss_is_zero_beyond_the_margins_and_linear_inside():
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-2.0])).item() == 0
    assert hinge_loss(torch.tensor([0.5]), torch.tensor([0.0])).item() == pytest.approx(0.75)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    ten, five = torch.tensor(10.0), torch.tensor(5.0, requires_grad=True)
    weight = adaptive_weight(ten, five)
    assert weight.item() == pytest.approx(10 / (5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(ten * 1e9, five).item() == 1e4  # clamped


class Game(torch.nn.Module):
    """A last conv, and two losses of what it makes, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 3, 3).double()
        self.body = torch.nn.Conv2d(3, 2, 1).double()
        self.x = torch.randn(2, 3, 6, 6).double()
        self.critic = torch.nn.Conv2d(3, 1, 2).double()

    def image(self):
        return self.conv(self.body(self.x).tanh())

    def losses(self, image):
        return (image - 1).square().sum() / 2, -self.critic(image).tanh().mean()


def test_image_gradients_against_finite_differences():
    """Their norms at the weight of the last conv, from which the adaptive weight is made."""
    game = Game()
    weight = game.conv.weight

    def numeric(which):
        gradient, h = torch.zeros(weight.numel(), dtype=torch.double), 1e-6
        with torch.no_grad():
            for i in range(weight.numel()):
                flat, ends = weight.view(-1), []
                for sign in (1, -1):
                    flat[i] += sign * h
                    ends.append(game.losses(game.image())[which])
                    flat[i] -= sign * h
                gradient[i] = (ends[0] - ends[1]) / (2 * h)
        return gradient.norm().item()

    x_hat = game.image()
    image = x_hat.detach().requires_grad_()
    at_weight = image_gradients(*game.losses(image), image, x_hat, weight).weight
    # central differences: error h² plus rounding / h, about 1e-8 relative here
    assert [g.norm().item() for g in at_weight] == pytest.approx([numeric(0), numeric(1)], rel=1e-6)


def test_adversarial_ramp():
    at = [adversarial_ramp(step, 3, 4) for step in range(9)]
    assert at == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [adversarial_ramp(step, 3, 0) for step in (2, 3)] == [0, 1]  # the paper's


def test_alignment_loss_is_a_sum_over_the_map_and_a_mean_over_the_batch():
    s, t = torch.zeros(4, 5, 2, 3), torch.full((4, 5, 2, 3), 2.0)
    assert alignment_loss(s, t).item() == 4 * 5 * 2 * 3


def test_feature_distance(tmp_path):
    path = str(tmp_path / "maps.pt")
    torch.jit.script(TwoMaps()).save(path)
    distance = FeatureDistance(path)
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
