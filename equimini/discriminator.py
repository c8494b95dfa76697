"""The critic of the tokenizer's adversarial loss."""

from __future__ import annotations

from torch import Tensor, nn


class PatchGAN(nn.Sequential):
    """Convolutional critic that judges overlapping patches (latent diffusion's layout).

    `layers` strided 4×4 convs, one more without stride, then one to a map of logits: images
    (B, 3, H, W) to (B, 1, h, w).
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        c = channels
        for i in range(1, layers + 1):
            c_in, c = c, channels * min(2 ** i, 8)
            stride = 2 if i < layers else 1
            modules += [nn.Conv2d(c_in, c, 4, stride, 1, bias=False), nn.BatchNorm2d(c),
                        nn.LeakyReLU(0.2)]
        super().__init__(*modules, nn.Conv2d(c, 1, 4, 1, 1))
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)
