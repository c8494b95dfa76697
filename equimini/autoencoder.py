"""The tokenizer: an autoencoder between an image and a sequence of column tokens.

    image (B, 3, H, W) ──► Encoder (…, columnize, Conv1d) ──► to_tokens ──► tokens (B, W/f, D)
    image (B, 3, H, W) ◄── Decoder (…, rasterize, Conv1d) ◄── from_tokens ◄── tokens (B, W/f, D)

The height is fixed, the width is any multiple of f from 2f up.  Every convolution is
reflect-padded: a border of zeros would tell the edge columns where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.columnize import TOKEN_CONV, columnize, rasterize, reflect_pad
from equimini.config import Checked, flag
from equimini.layers import without_autocast


@dataclass(frozen=True)
class TokenizerConfig(Checked):
    """Architecture of the column tokenizer; the defaults are the paper's."""

    image_size: int = flag(256, "height of every image, in pixels", min=2)
    base_channels: int = flag(128, "channels of the first stage", min=1)
    multipliers: tuple[int, ...] = flag(
        (1, 1, 2, 4, 4), "channels of each stage, in base channels; each later stage halves the "
        "size, so f = 2^(stages - 1)", min=1)
    blocks: int = flag(2, "residual blocks per encoder stage (the decoder has one more)", min=1)
    attention_rows: tuple[int, ...] = flag(
        (16,), "feature-map heights, in rows, at which every block is followed by attention",
        min=1)
    norm_groups: int = flag(32, "groups of every GroupNorm", min=1)
    z_channels: int = flag(256, "channels of the feature map that is cut into columns", min=1)
    token_channels: int = flag(256, "channels of one token (one column)", min=1)
    semantic_channels: int = flag(0, "channels of the semantic head's map; 0: no head", min=0)
    dropout: float = flag(0.0, "dropout probability inside residual blocks", min=0, max=0.99)
    layout: str = flag("columns", "what one token is: a column of the feature map, or, the paper's "
                       "2-D baselines, a patch of a grid or a position alone, in raster order "
                       "(square images only)", choices=tuple(TOKEN_CONV))
    noise: float = flag(
        2.5, "largest latent noise: sigma ~ N(0, (noise/0.8)^2) clamped to +-noise", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.f or self.image_size < 2 * self.f:
            raise ValueError(f"image-size must be a multiple of f = {self.f} and at least "
                             f"{2 * self.f}, got {self.image_size}")
        for name in ("base", "semantic"):
            channels = getattr(self, f"{name}_channels")
            if channels % self.norm_groups:
                raise ValueError(f"{name}-channels must be a multiple of norm-groups = "
                                 f"{self.norm_groups}, got {channels}")
        if self.base_channels % 4:
            raise ValueError(f"base-channels must be a multiple of 4, got {self.base_channels}")
        if self.layout == "grid" and (math.isqrt(self.rows) ** 2 != self.rows or self.rows < 4):
            raise ValueError("layout grid needs a feature map of 4, 9, 16, 25, ... rows, to be cut "
                             f"into as many patches; image-size {self.image_size} gives "
                             f"{self.rows}")

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per column."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def rows(self) -> int:
        """Height of the feature map that is cut into columns."""
        return self.image_size // self.f

    @property
    def columns(self) -> int:
        """Tokens of a square image: columns, patches or positions."""
        return self.rows ** (2 if self.layout == "positions" else 1)

    def tokens(self, width: int) -> int:
        """Tokens of an image of this width, in pixels."""
        return self.columns * width // self.image_size

    @property
    def column_values(self) -> int:
        """Values of the feature map in a column, or another token."""
        return self.z_channels * self.rows**2 // self.columns


class Conv3x3(nn.Conv2d):
    """3×3 convolution with reflected borders."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(reflect_pad(reflect_pad(x, -1), -2))


class Norm(nn.GroupNorm):
    """GroupNorm with the eps of the whole autoencoder, in float32 also under autocast."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__(config.norm_groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, twice, around a skip (1×1 conv where the channels change)."""

    def __init__(self, c_in: int, c_out: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in, config), Conv3x3(c_in, c_out)
        self.norm2, self.conv2 = Norm(c_out, config), Conv3x3(c_out, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all H·W positions, with a residual."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = Norm(channels, config)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).mT[:, None] for p in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT  # (B, C, HW), scale C^-0.5
        return x + self.out(h.unflatten(2, x.shape[2:]))


class Stage(nn.Module):
    """Residual blocks, each followed by attention where the map has the right height."""

    def __init__(self, c_in: int, c_out: int, blocks: int, rows: int,
                 config: TokenizerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(c_out if i else c_in, c_out, config) for i in range(blocks))
        self.attention = nn.ModuleList(
            SpatialAttention(c_out, config) if rows in config.attention_rows else nn.Identity()
            for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention):
            x = attention(block(x))
        return x


class Middle(nn.Sequential):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, c: int, config: TokenizerConfig) -> None:
        super().__init__(ResidualBlock(c, c, config), SpatialAttention(c, config),
                         ResidualBlock(c, c, config))


class Downsample(nn.Module):
    """Halve both sides: conv to C/4 and pixel-unshuffle, plus a 2×2 average as shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2) + F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double both sides: conv to 4C and pixel-shuffle, plus nearest neighbour as shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2.0)


class Encoder(nn.Module):
    """Image to columns: (B, 3, H, W) to (B, z_channels · rows, W/f)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * m for m in config.multipliers]
        c, size = config.base_channels, config.image_size
        self.conv_in = Conv3x3(3, c)
        self.stages, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, c_out in enumerate(channels):
            self.stages.append(Stage(c, c_out, config.blocks, size >> i, config))
            if i + 1 < len(channels):
                self.downs.append(Downsample(c_out))
            c = c_out
        self.middle = Middle(c, config)
        self.norm_out = Norm(c, config)
        self.conv_out = Conv3x3(c, config.z_channels)
        self.layout, column = config.layout, config.column_values
        self.column_conv = TOKEN_CONV[config.layout](column, column)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.conv_in(x))
        for down, stage in zip(self.downs, self.stages[1:]):
            x = stage(down(x))
        x = self.conv_out(F.silu(self.norm_out(self.middle(x))))  # (B, z, H/f, W/f)
        return self.column_conv(columnize(x, self.layout))


class Decoder(nn.Module):
    """Columns to image: (B, z_channels · rows, W/f) to (B, 3, H, W)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * m for m in reversed(config.multipliers)]
        c, self.rows, self.layout = channels[0], config.rows, config.layout
        column = config.column_values
        self.column_conv = TOKEN_CONV[config.layout](column, column)
        self.conv_in = Conv3x3(config.z_channels, c)
        self.middle = Middle(c, config)
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()  # from the lowest resolution up
        for i, c_out in enumerate(channels):
            self.stages.append(Stage(c, c_out, config.blocks + 1, self.rows << i, config))
            if i + 1 < len(channels):
                self.ups.append(Upsample(c_out))
            c = c_out
        self.norm_out = Norm(c, config)
        self.conv_out = Conv3x3(c, 3)

    def lowest_stage(self, columns: Tensor) -> Tensor:
        """The map after the first stage, before any upsampling: (B, C, rows, W/f)."""
        x = self.conv_in(rasterize(self.column_conv(columns), self.rows, self.layout))
        return self.stages[0](self.middle(x))

    def upper_stages(self, x: Tensor) -> Tensor:
        """From `lowest_stage`'s map to the image."""
        for up, stage in zip(self.ups, self.stages[1:]):
            x = stage(up(x))
        with without_autocast(x):  # pixels with all their digits
            return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, columns: Tensor) -> Tensor:
        return self.upper_stages(self.lowest_stage(columns))


class SemanticHead(nn.Module):
    """From the decoder's lowest stage to a map that is compared with a teacher's features."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        c_in, c = config.base_channels * config.multipliers[-1], config.semantic_channels
        self.blocks = nn.Sequential(
            *(ResidualBlock(c if i else c_in, c, config) for i in range(4)))
        self.norm_out = Norm(c, config)
        self.conv_out = Conv3x3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.blocks(x))))


class Tokenizer(nn.Module):
    """Images to column tokens and back, with the statistics of its latents.

    `latent_mean` and `latent_std` (D,) are those of the noisy tokens z = μ + σ·ε over the
    training set, NaN until measured (`set_statistics`); the generator works on normalised tokens.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        column, conv = config.column_values, TOKEN_CONV[config.layout]
        self.encoder = Encoder(config)
        self.to_tokens = conv(column, config.token_channels)
        self.from_tokens = conv(config.token_channels, column)
        self.decoder = Decoder(config)
        self.semantic_head = SemanticHead(config) if config.semantic_channels else None
        for name in ("latent_mean", "latent_std"):
            self.register_buffer(name, torch.full((config.token_channels,), math.nan))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] to tokens (B, W/f, D): the mode μ of the posterior."""
        height, width = images.shape[-2:]
        f, size = self.config.f, self.config.image_size
        if images.dim() != 4 or images.shape[1] != 3 or height != size:
            raise ValueError(f"images must be (B, 3, {size}, W), got {tuple(images.shape)}")
        if width % f or width < 2 * f:
            raise ValueError(f"the images' width must be a multiple of f = {f} and at least "
                             f"{2 * f} pixels (2 columns), got {width}")
        if self.config.layout != "columns" and width != height:
            raise ValueError(f"layout {self.config.layout} takes squares, got {height}x{width}")
        return self.to_tokens(self.encoder(images)).mT

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N ≥ 2, D) to images (B, 3, H, N·f), in [−1, 1] but for overshoot."""
        return self.decoder(self._columns(tokens))

    def decode_with_semantics(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to (images, semantic map (B, semantic_channels, rows, N))."""
        if self.semantic_head is None:
            raise ValueError("this tokenizer has no semantic head (semantic_channels is 0)")
        lowest = self.decoder.lowest_stage(self._columns(tokens))
        return self.decoder.upper_stages(lowest), self.semantic_head(lowest)

    def _columns(self, tokens: Tensor) -> Tensor:
        d, square = self.config.token_channels, self.config.columns
        if tokens.dim() != 3 or tokens.shape[1] < 2 or tokens.shape[2] != d:
            raise ValueError(f"tokens must be (B, N >= 2, {d}), got {tuple(tokens.shape)}")
        if self.config.layout != "columns" and tokens.shape[1] != square:
            raise ValueError(f"layout {self.config.layout} takes the {square} tokens of a square "
                             f"image, got {tokens.shape[1]}")
        return self.from_tokens(tokens.mT)

    def freeze_latents(self) -> None:
        """Leave only the decoder and its Conv1d's trainable: `encode` and the latents' statistics
        stay as they are, bit for bit."""
        for part in (self.encoder, self.to_tokens, self.semantic_head):
            if part is not None:
                part.requires_grad_(False).eval()

    def latent_side(self) -> dict[str, Tensor]:
        """What the latents depend on: the state dict without decoder and semantic head."""
        before = ("encoder.", "to_tokens.", "latent_")
        return {k: v for k, v in self.state_dict().items() if k.startswith(before)}

    @property
    def has_statistics(self) -> bool:
        """Whether the latents' mean and std have been measured."""
        return bool(self.latent_std.isfinite().all() and self.latent_mean.isfinite().all())

    def set_statistics(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Store the latents' mean and std: vectors (D,), or scalars that fill them."""
        self.latent_mean.copy_(torch.as_tensor(mean))
        self.latent_std.copy_(torch.as_tensor(std))

    def normalize(self, tokens: Tensor) -> Tensor:
        """Tokens to zero mean and unit variance per channel: what the generator sees."""
        return (tokens - self.latent_mean) / self.latent_std

    def denormalize(self, tokens: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return tokens * self.latent_std + self.latent_mean


def add_noise(mean: Tensor, noise: float, sigma: Tensor, eps: Tensor) -> Tensor:
    """A sample z = μ + σ·ε of the posterior; σ = noise/0.8 · `sigma`, clamped to ±noise.

    mean, eps: (B, N, D); sigma: (B,) and eps are standard normal; one σ per image.
    """
    s = (sigma * (noise / 0.8)).clamp(-noise, noise)
    return mean + s[:, None, None] * eps


def noise_variance(noise: float) -> float:
    """E[σ²] of `add_noise`: the second moment of a clamped normal, in closed form."""
    a = 0.8  # the clamp, in standard deviations
    tail = math.erfc(a / math.sqrt(2))  # P(|x| > a)
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    return (noise / a) ** 2 * (1 - tail - 2 * a * density + a * a * tail)
