"""The tokenizer's losses and its critic."""

import pytest
import torch
import torch.nn.functional as F

from equimini.cli import UserError
from equimini.discriminator import PatchGAN
from equimini.losses import (FeatureDistance, adaptive_weight, hinge_loss, kl_loss, psnr,
                             reconstruction_loss)


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
    w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    rec, adv = (w * torch.tensor([[6.0, 8.0]])).sum(), 0.5 * w.square().sum()  # norms 10 and 5
    weight = adaptive_weight(rec, adv, w)
    assert weight.item() == pytest.approx(10 / (5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(rec * 1e9, adv, w).item() == 1e4  # clamped
    loss = rec + weight * adv  # the graph is still there
    loss.backward()


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


def test_patchgan_has_latent_diffusions_layout():
    net = PatchGAN(64, 3)
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    biases_and_norms = 64 + 2 * (128 + 256 + 512) + 1
    assert sum(p.numel() for p in net.parameters()) == weights + biases_and_norms
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [64, 128, 256, 512, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 1, 1]
