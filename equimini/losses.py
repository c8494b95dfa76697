"""The tokenizer's losses and their sum, Eq. 5 (`total_loss`).

All are sums over an image's pixels or latents, averaged over the batch, as in latent diffusion's
autoencoder: their weights only mean something on that scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def adaptive_weight(norm_rec: Tensor, norm_adv: Tensor) -> Tensor:
    """λ = ‖∇rec‖ / (‖∇adv‖ + 1e-4), clamped to [0, 1e4]; from the two norms, scalars.

    Gradients are those with respect to the weight of the decoder's last conv: the adversarial
    term then pulls there about as strongly as the reconstruction.
    """
    return (norm_rec / (norm_adv + 1e-4)).clamp(0, 1e4).detach()


def alignment_loss(semantics: Tensor, target: Tensor) -> Tensor:
    """Σ (s − t)² over an image's map, averaged over the batch; both (B, C, rows, columns)."""
    return (semantics.float() - target).square().sum() / len(target)


def total_loss(x: Tensor, x_hat: Tensor, mean: Tensor, distance: Tensor, fake_logits: Tensor,
               semantics: Tensor, target: Tensor, last_weight: Tensor, *, kl_weight: float = 0.01,
               adv_weight: float = 0.5, align_weight: float = 5.0) -> Tensor:
    """Eq. 5, the autoencoder's loss: what training computes faster by `image_gradients`.

    x, x_hat: (B, 3, H, W); mean: μ (B, N, D); distance: (B,), weighted perceptual distances;
    fake_logits: D(x̂); semantics, target: maps (B, C, rows, columns); last_weight: that of the
    decoder's last conv.  Returns a scalar.
    """
    rec = reconstruction_loss(x, x_hat, distance)
    adv = -fake_logits.mean()
    norms = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
             for loss in (rec, adv)]
    return (rec + kl_weight * kl_loss(mean) + adv_weight * adaptive_weight(*norms) * adv
            + align_weight * alignment_loss(semantics, target))


class ImageGradients(NamedTuple):
    """Gradients of the reconstruction loss and of the adversarial one, in this order."""

    image: tuple[Tensor, Tensor]  # at x̂: (B, 3, H, W) each
    weight: tuple[Tensor, Tensor]  # at the weight of the decoder's last conv


def image_gradients(rec: Tensor, adv: Tensor, image: Tensor, x_hat: Tensor,
                    last_weight: Tensor) -> ImageGradients:
    """Both losses' gradients at x̂, and through it at the weight of the conv that made it.

    rec, adv: scalars computed from `image`, a detached copy of x̂ that requires a gradient.  The
    frozen networks behind them are gone through backwards once, to `image`; λ is made from the
    gradients at the weight, and Σ x̂·(grad_rec + factor·λ·grad_adv) has `total_loss`'s gradient.
    """
    at_image = tuple(torch.autograd.grad(loss, image)[0] for loss in (rec, adv))
    at_weight = tuple(torch.autograd.grad(x_hat, last_weight, gradient, retain_graph=True)[0]
                      for gradient in at_image)
    return ImageGradients(at_image, at_weight)


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, (B,); both in [−1, 1], x_hat clipped."""
    mse = (x - x_hat.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))
