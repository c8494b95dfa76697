"""A model of small pictures beside one of larger pictures: its own are enlarged to their height."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from equimini.autoencoder import Tokenizer
from equimini.utils.errors import UserError
from equimini.utils.images import to_float, to_uint8


class Enlarged(nn.Module):
    """A tokenizer, from and to pictures of another height, a multiple of its own.

    Given pictures are scaled down (bicubic, as data is), its own are enlarged by Lanczos' filter.
    Raises UserError for a height that is no multiple.
    """

    def __init__(self, tokenizer: Tokenizer, height: int) -> None:
        super().__init__()
        own = tokenizer.config
        if height % own.image_size:
            raise UserError(f"--height must be a multiple of the generator's {own.image_size} "
                            f"pixels, got {height}")
        self.inner, self.times = tokenizer, height // own.image_size
        self.config = SimpleNamespace(image_size=height, f=own.f * self.times, layout=own.layout,
                                      columns=own.columns, token_channels=own.token_channels,
                                      tokens=lambda width: own.tokens(width // self.times))
        self.normalize, self.denormalize = tokenizer.normalize, tokenizer.denormalize
        self.latent_mean, self.latent_std = tokenizer.latent_mean, tokenizer.latent_std

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to latents (B, N, D)."""
        size = [side // self.times for side in images.shape[2:]]
        small = F.interpolate(images, size, mode="bicubic", antialias=True)
        return self.inner.encode(small.clamp(-1, 1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, D) to images (B, 3, H, W) in [−1, 1], of 8 bits."""
        small = to_uint8(self.inner.decode(latents))  # (B, h, w, 3)
        size = self.times * small.shape[2], self.times * small.shape[1]
        pictures = [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
                    for picture in small]
        return to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).to(latents.device)
