"""DINO ViT-S/16 and DINOv2 ViT-B/14 (VGG16: lpips.py), frozen.

Parameters carry the publishers' names, so that the published files load as they are
(published_weights.py finds and checks them).
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]


def frozen(module: nn.Module) -> nn.Module:
    """The module in eval mode, its parameters without gradients (TorchScript modules as well)."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    """(C,) numbers as a (1, C, 1, 1) tensor beside `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def imagenet_normalize(images: Tensor) -> Tensor:
    """Images in [−1, 1] to zero mean and unit variance over ImageNet."""
    x = (images + 1) / 2
    return (x - per_channel(IMAGENET_MEAN, x)) / per_channel(IMAGENET_STD, x)


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(B, C, H, W) to (B, C, *size): `F.interpolate` ('bicubic' or 'area') as matrix products.

    Both modes are linear and separable, and the backward of torch's own has no deterministic CUDA
    kernel.  Computed in float32.
    """
    if tuple(images.shape[2:]) == tuple(size):
        return images
    rows, columns = (resize_matrix(n, m, mode).to(images.device)
                     for n, m in zip(images.shape[2:], size))
    with torch.autocast(images.device.type, enabled=False):
        return rows @ images.float() @ columns.mT


@functools.lru_cache(maxsize=64)
def resize_matrix(n: int, m: int, mode: str) -> Tensor:
    """The (m, n) matrix that resizes n values to m."""
    return F.interpolate(torch.eye(n)[None, None], (m, n), mode=mode)[0, 0]


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    """Attention and MLP over (B, N, C), each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, tanh_gelu: bool, layer_scale: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width),
                                   "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), gelu=nn.GELU("tanh" if tanh_gelu else "none"),
            fc2=nn.Linear(4 * width, width)))
        self.ls1, self.ls2 = (LayerScale(width) if layer_scale else nn.Identity()
                              for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](seen))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT with a class token, on images of any size that is a multiple of the patch.

    `grid` is the side, in patches, of the published position embedding.
    """

    def __init__(self, patch: int, width: int, depth: int, heads: int, grid: int,
                 tanh_gelu: bool = False, layer_scale: bool = False) -> None:
        super().__init__()
        self.patch, self.width, self.grid = patch, width, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(VitBlock(width, heads, tanh_gelu, layer_scale)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        frozen(self)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a rows × columns grid: (1, 1 + rows·columns, C).

        Resized bicubically with antialias where the grid is not the published one.
        """
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = patches.mT.unflatten(2, (self.grid, self.grid))
        resized = F.interpolate(square, (rows, columns), mode="bicubic", antialias=True)
        return torch.cat((first, resized.flatten(2).mT), 1)

    def intermediate(self, x: Tensor, after: tuple[int, ...]) -> list[Tensor]:
        """Of normalised images (B, 3, H, W) the embedding (B, 1 + N, C), and what the given blocks
        make of it; the class token is first."""
        patches = self.patch_embed["proj"](x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), patches.flatten(2).mT), 1)
        x = x + self.positions(*patches.shape[2:])
        found = [x]
        for i, block in enumerate(self.blocks[:max(after) + 1]):
            x = block(x)
            if i in after:
                found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images to (B, 1 + N, C), after the final norm."""
        return self.norm(self.intermediate(x, (len(self.blocks) - 1,))[-1])


def dino_vits16() -> VisionTransformer:
    """DINO ViT-S/16 as the release's discriminator runs it: with the tanh form of GELU."""
    return VisionTransformer(16, 384, 12, 6, grid=14, tanh_gelu=True)


def dinov2_vitb14() -> VisionTransformer:
    """DINOv2 ViT-B/14."""
    return VisionTransformer(14, 768, 12, 12, grid=37, layer_scale=True)


class DinoFeatures(nn.Module):
    """What the DINO discriminator looks at: five feature maps of ViT-S/16, each (B, 384, 196).

    Each (after the position embedding and after blocks 2, 5, 8, 11) is the patch tokens plus
    the class token; there is no final norm.
    """

    channels, side, after = (384,) * 5, 224, (2, 5, 8, 11)

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def view(self, images: Tensor, draw: np.random.Generator) -> Tensor:
        """224×224 pixels of any images: where both sides exceed that, by one coin for the whole
        batch, a random crop or a resize by area; else a bicubic resize."""
        height, width = images.shape[2:]
        if min(height, width) <= self.side:
            return resize(images, (self.side, self.side), "bicubic")
        if draw.random() < 0.5:
            return resize(images, (self.side, self.side), "area")
        top, left = (int(draw.integers(n - self.side + 1)) for n in (height, width))
        return images[:, :, top:top + self.side, left:left + self.side]

    def forward(self, images: Tensor, draw: np.random.Generator) -> list[Tensor]:
        x = self.view(imagenet_normalize(images), draw)
        return [(t[:, 1:] + t[:, :1]).mT for t in self.vit.intermediate(x, self.after)]


class DinoV2Teacher(nn.Module):
    """DINOv2's final-norm patch tokens as a map with one patch per cell of the latent map.

    The images are resized (bicubic, no antialias) to 14 pixels for each of `rows` and `columns`, so
    that the two maps have one shape whatever the images' size and shape: 224×224 for the paper's
    256×256 pictures at f = 16, and 224×448 for a crop twice as wide.
    """

    channels = 768

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    @torch.no_grad()
    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to (B, 768, rows, columns)."""
        size = rows * self.vit.patch, columns * self.vit.patch
        x = F.interpolate(imagenet_normalize(images), size, mode="bicubic")
        return self.vit(x)[:, 1:].mT.unflatten(2, (rows, columns)).float()
