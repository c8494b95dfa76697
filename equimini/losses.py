"""The tokenizer's losses (Eq. 5).

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


def adaptive_weight(grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    """λ = ‖∇rec‖ / (‖∇adv‖ + 1e-4), clamped to [0, 1e4]; from the two norms, scalars.

    Gradients are those with respect to the weight of the decoder's last conv: the adversarial
    term then pulls there about as strongly as the reconstruction.
    """
    return (grad_rec / (grad_adv + 1e-4)).clamp(0, 1e4).detach()


class Pulls(NamedTuple):
    """Gradients of the reconstruction loss and of the adversarial one, both made from x̂."""

    at_image: tuple[Tensor, Tensor]  # (B, 3, H, W) each
    at_weight: tuple[Tensor, Tensor]  # at the weight of the decoder's last conv


def pulls(rec: Tensor, adv: Tensor, image: Tensor, x_hat: Tensor, last_weight: Tensor) -> Pulls:
    """Both losses' gradients at x̂, and through it at the weight of the conv that made it.

    rec, adv: scalars computed from `image`, a detached copy of x̂ that requires a gradient.  So the
    frozen networks behind them are gone through backwards once, to `image`: both the adaptive
    weight λ and the step's gradient, that of Σ x̂·(pull_rec + factor·λ·pull_adv), are made from
    what is returned.
    """
    at_image = tuple(torch.autograd.grad(loss, image)[0] for loss in (rec, adv))
    at_weight = tuple(torch.autograd.grad(x_hat, last_weight, pull, retain_graph=True)[0]
                      for pull in at_image)
    return Pulls(at_image, at_weight)


def adversarial_ramp(step: int, start: int, length: int) -> float:
    """Share of the adversarial weight at a step: 0 before `start`, then up to 1 in `length` steps
    (0: at once)."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / length) if length else 1.0


def alignment_loss(semantics: Tensor, target: Tensor) -> Tensor:
    """Σ (s − t)² over an image's map, averaged over the batch; both (B, C, rows, columns)."""
    return (semantics.float() - target).square().sum() / len(target)


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, (B,); both in [−1, 1], x_hat clipped."""
    mse = (x - x_hat.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))
