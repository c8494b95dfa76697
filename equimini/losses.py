"""The tokenizer's losses (Eq. 5).

All are sums over an image's pixels or latents, averaged over the batch, as in latent diffusion's
autoencoder: their weights only mean something on that scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.cli import UserError, first_line


def kl_loss(mean: Tensor) -> Tensor:
    """½·Σ μ² per image: the KL term of a posterior whose variance is not learned.

    mean: (B, N, D).  Returns a scalar.
    """
    return 0.5 * mean.square().sum() / len(mean)


def reconstruction_loss(x: Tensor, x_hat: Tensor, distance: Tensor | float = 0.0) -> Tensor:
    """Σ (|x − x̂| + distance) over all 3·H·W values, averaged over the batch.

    x, x_hat: (B, 3, H, W) in [−1, 1]; distance: (B,), each image's weighted perceptual distance,
    which is added to every one of its absolute differences.
    """
    per_image = (x - x_hat).abs().flatten(1).mean(1) + distance
    return per_image.mean() * x[0].numel()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss ½(mean relu(1 − D(x)) + mean relu(1 + D(x̂))); logits, any shape."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(rec: Tensor, adv: Tensor, last_weight: Tensor) -> Tensor:
    """λ = ‖∇rec‖ / (‖∇adv‖ + 1e-4), clamped to [0, 1e4], detached.

    Gradients are those with respect to `last_weight`, the weight of the decoder's last conv: the
    adversarial term then pulls there about as strongly as the reconstruction.
    """
    grad_rec, = torch.autograd.grad(rec, last_weight, retain_graph=True)
    grad_adv, = torch.autograd.grad(adv, last_weight, retain_graph=True)
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(0, 1e4).detach()


class FeatureDistance(nn.Module):
    """LPIPS-like distance on the maps of any frozen TorchScript network.

    The network takes images (B, 3, H, W) in [−1, 1] and returns a list of (B, C, h, w) maps.
    Each map is scaled to unit length over its channels; the squared difference is summed over
    channels and averaged over positions; the maps' distances are averaged.  (LPIPS itself has
    learned channel weights instead, which exist for its own networks only.)
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            self.net = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"cannot load the perceptual network {path} as TorchScript: "
                            f"{first_line(error)}") from None
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distance per image, (B,); gradients flow into x_hat only."""
        with torch.no_grad():
            maps = self.net(x)
        total = 0.0
        for a, b in zip(maps, self.net(x_hat)):
            a, b = (m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in (a, b))
            total = total + (a - b).square().sum(1).mean((1, 2))
        return total / len(maps)


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, (B,); both in [−1, 1], x_hat clipped."""
    mse = (x - x_hat.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))
