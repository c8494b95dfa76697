"""LPIPS, the learned perceptual distance, on the feature maps of VGG16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equimini.pretrained.vision_transformer import frozen, per_channel


class MaxPool2x2(nn.Module):
    """The largest of every 2×2 values; torch's own has no deterministic backward on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (n // 2 * 2 for n in x.shape[2:])
        x = x[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        return x.amax((3, 5))


class Vgg16(nn.Module):
    """VGG16's convolutions, with torchvision's numbering; the five maps that LPIPS compares."""

    after = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self) -> None:
        super().__init__()
        layers, c_in = [], 3
        for stage, (c, convs) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            layers += [MaxPool2x2()] if stage else []
            for _ in range(convs):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.after:
                maps.append(x)
        return maps


def unit(features: Tensor) -> Tensor:
    """(B, C, h, w) scaled to unit length over the channels, x / (‖x‖ + 1e-10), in float32."""
    x = features.float()
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)


class Lpips(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al., 2018): a learned weight per channel of five maps.

    State dict: `vgg.features.N.*` and the published `linK.model.1.weight` (1, C, 1, 1).
    """

    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self) -> None:
        super().__init__()
        self.vgg = Vgg16()
        for k, c in enumerate((64, 128, 256, 512, 512)):
            # in the place of the published dropout stands nothing: it is off here
            lin = nn.Sequential(nn.Identity(), nn.Conv2d(c, 1, 1, bias=False))
            self.add_module(f"lin{k}", nn.ModuleDict({"model": lin}))
        frozen(self)

    def maps(self, images: Tensor) -> list[Tensor]:
        """VGG's five maps of images in [−1, 1]."""
        return self.vgg((images - per_channel(self.shift, images))
                        / per_channel(self.scale, images))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distance per image, (B,); x, x_hat: (B, 3, H, W) in [−1, 1], sides of 16 at least.

        Gradients flow into x_hat only.
        """
        with torch.no_grad():
            maps = self.maps(x)
        total = 0.0
        for k, (a, b) in enumerate(zip(maps, self.maps(x_hat))):
            weight = self.get_submodule(f"lin{k}.model.1").weight  # (1, C, 1, 1)
            total = total + ((unit(a) - unit(b)).square() * weight).sum(1).mean((1, 2))
        return total
