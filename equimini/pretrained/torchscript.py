"""Any frozen TorchScript network in the place of a published one: distance, critic, teacher."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.pretrained.lpips import unit
from equimini.pretrained.vision_transformer import frozen
from equimini.utils.errors import UserError, first_line


class FeatureDistance(nn.Module):
    """LPIPS-like distance on the maps of any frozen TorchScript network.

    The network takes images (B, 3, H, W) in [−1, 1] and returns a list of (B, C, h, w) maps.
    Each map is scaled to unit length over its channels; the squared difference is summed over
    channels and averaged over positions; the maps' distances are averaged.  (LPIPS itself has
    learned channel weights instead, which exist for its own networks only.)
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.net = script_maps(path)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distance per image, (B,); gradients flow into x_hat only."""
        maps = self.net.of_originals(x)
        return sum((unit(a) - unit(b)).square().sum(1).mean((1, 2))
                   for a, b in zip(maps, self.net(x_hat))) / len(maps)


def load_script(path: str | Path, what: str, device: str | torch.device = "cpu") -> nn.Module:
    """A TorchScript file's network, frozen; what: what to call it in an error."""
    try:
        return frozen(torch.jit.load(str(path), map_location=device))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cannot load the {what} {path} as TorchScript: "
                        f"{first_line(error)}") from None


class ScriptMaps(nn.Module):
    """A TorchScript network from images (B, 3, H, W) in [−1, 1] to a list of (B, C, h, w) maps."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.last = path, (None, None)
        self.net = load_script(path, "network")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.net(images)
        if not (isinstance(maps, (list, tuple)) and maps and all(
                isinstance(m, Tensor) and m.dim() == 4 and len(m) == len(images) for m in maps)):
            raise UserError(f"{self.path} must turn images (B, 3, H, W) into a list of maps "
                            "(B, C, h, w)")
        return list(maps)

    @torch.no_grad()
    def of_originals(self, images: Tensor) -> list[Tensor]:
        """The maps of images that need no gradient, computed once however many losses ask."""
        if self.last[0] is not images:
            self.last = images, self.forward(images)
        return self.last[1]


@functools.lru_cache(maxsize=8)
def _script_maps(path: Path, changed: int) -> ScriptMaps:
    return ScriptMaps(str(path))


def script_maps(path: str) -> ScriptMaps:
    """The network of a TorchScript file, loaded once: losses that name one file share it."""
    file = Path(path)
    changed = file.stat().st_mtime_ns if file.exists() else 0
    return _script_maps(file.absolute(), changed)


class ScriptFeatures(nn.Module):
    """The same from the maps of a TorchScript network, at the images' own size."""

    def __init__(self, maps: ScriptMaps, example: Tensor) -> None:
        """example: images (B, 3, H, W), from which the maps' channels are read."""
        super().__init__()
        self.maps = maps
        with torch.no_grad():
            self.channels = tuple(m.shape[1] for m in maps(example[:1]))

    def forward(self, images: Tensor, draw: np.random.Generator) -> list[Tensor]:
        return [m.flatten(2) for m in self.maps(images)]


class ScriptTeacher(nn.Module):
    """One map of a TorchScript network, resized to the latent map's shape.

    Such a network's stride and favourite size are not known, so it sees the images as they are
    (and shares its work with a perceptual distance by the same file), and its map is resized
    (bilinear; with antialias where it shrinks).  Each position's vector is then standardised, as
    DINOv2's final LayerNorm does, so that the loss's weight means about the same.
    """

    def __init__(self, maps: ScriptMaps, index: int, example: Tensor) -> None:
        """index: which of the maps; negative ones count from the last.  example: images."""
        super().__init__()
        self.maps, self.index = maps, index
        with torch.no_grad():
            found = maps(example[:1])
        if not -len(found) <= index < len(found):
            raise UserError(f"--align-map: {maps.path} has {len(found)} maps, "
                            f"{-len(found)} … {len(found) - 1}, got {index}")
        self.channels = found[index].shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to (B, C, rows, columns)."""
        x = self.maps.of_originals(images)[self.index].float()
        if x.shape[2:] != (rows, columns):
            x = F.interpolate(x, (rows, columns), mode="bilinear", antialias=True)
        return F.layer_norm(x.movedim(1, -1), (self.channels,), eps=1e-6).movedim(-1, 1)
