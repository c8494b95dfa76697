"""The authors' released files, described and computed without any module of equimini.

`tokenizer_layout` and `generator_layout` list every key and shape of a release checkpoint of any
size.  The functions below them compute what such a checkpoint means, in plain functional code that
reads the release's own keys: slow, straight-line, and in whatever dtype the weights have.  The
tests compare equimini's modules with it.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]


# ---- keys and shapes -------------------------------------------------------------------------

def _conv(name: str, out: int, into: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _block(name: str, into: int, out: int) -> Shapes:
    return (_norm(f"{name}.norm1", into) | _conv(f"{name}.conv1", out, into, 3, 3)
            | _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out, 3, 3)
            | (_conv(f"{name}.nin_shortcut", out, into, 1, 1) if into != out else {}))


def _attention(name: str, channels: int) -> Shapes:
    shapes = _norm(f"{name}.norm", channels)
    for part in "q", "k", "v", "proj_out":
        shapes |= _conv(f"{name}.{part}", channels, channels, 1, 1)
    return shapes


def _middle(channels: int) -> Shapes:
    return (_block("mid.block_1", channels, channels) | _attention("mid.attn_1", channels)
            | _block("mid.block_2", channels, channels))


def tokenizer_layout(base: int = 128, multipliers: tuple[int, ...] = (1, 1, 2, 4, 4),
                     blocks: int = 2, attention_stages: tuple[int, ...] = (4,), z: int = 256,
                     tokens: int = 256, rows: int = 16, semantic: int = 768) -> Shapes:
    """All keys of a release tokenizer, raw and EMA, with shapes; semantic 0: without the head."""
    last, deep, tall = len(multipliers) - 1, base * multipliers[-1], z * rows
    encoder, into = _conv("conv_in", base, 3, 3, 3), base
    for i, multiplier in enumerate(multipliers):
        for j in range(blocks):
            encoder |= _block(f"down.{i}.block.{j}", into, base * multiplier)
            into = base * multiplier
            if i in attention_stages:
                encoder |= _attention(f"down.{i}.attn.{j}", into)
        if i < last:
            encoder |= _conv(f"down.{i}.downsample.conv.conv", into // 4, into, 3, 3)
    encoder |= (_middle(deep) | _norm("norm_out", deep) | _conv("conv_out", z, deep, 3, 3)
                | _conv("encoder1d", tall, tall, 3))

    decoder, into = _conv("conv_in", deep, z, 3, 3) | _middle(deep), deep
    for i in reversed(range(last + 1)):
        for j in range(blocks + 1):
            decoder |= _block(f"up.{i}.block.{j}", into, base * multipliers[i])
            into = base * multipliers[i]
            if i in attention_stages:
                decoder |= _attention(f"up.{i}.attn.{j}", into)
        if i > 0:
            decoder |= _conv(f"up.{i}.upsample.conv.conv", 4 * into, into, 3, 3)
    decoder |= (_norm("norm_out", into) | _conv("conv_out", 3, into, 3, 3)
                | _conv("decoder1d", tall, tall, 3))

    parts = {"encoder": encoder, "decoder": decoder}
    if semantic:
        head = _norm("norm_out", semantic) | _conv("conv_out", semantic, semantic, 3, 3)
        for n in range(6):
            head |= _block(f"down.{n // 3}.block.{n % 3}", semantic if n else deep, semantic)
        parts["semantic_decoder"] = head
    parts |= {"quant_layer": {"weight": (tokens, tall, 3), "bias": (tokens,)},
              "post_quant_layer": {"weight": (tall, tokens, 3), "bias": (tall,)}}
    raw = {f"{part}.{name}": shape for part, shapes in parts.items()
           for name, shape in shapes.items()}
    ema: Shapes = {}
    for part, shapes in parts.items():
        ema |= {f"ema_{part}.decay": (), f"ema_{part}.num_updates": ()}
        ema |= {f"ema_{part}.{name.replace('.', '')}": shape for name, shape in shapes.items()}
    return raw | ema


def generator_layout(layers: int = 32, width: int = 1024, classes: int = 30,
                     class_tokens: int = 16, tokens: int = 256, head_width: int = 1280,
                     head_depth: int = 12) -> Shapes:
    """All keys of a release generator (of `model` and of `model_ema`), with shapes."""
    d, w, linear = width, head_width, _conv
    shapes: Shapes = {"fake_latent": (1, d), "encoder_pos_embed_learned": (1, class_tokens, d),
                      "class_emb.weight": (classes, d)}
    shapes |= linear("z_proj", d, tokens) | _norm("z_proj_ln", d)
    for i in range(layers):
        b = f"encoder_blocks.{i}"
        shapes |= (_norm(f"{b}.norm1", d) | linear(f"{b}.attn.qkv", 3 * d, d)
                   | linear(f"{b}.attn.proj", d, d) | _norm(f"{b}.norm2", d)
                   | linear(f"{b}.mlp.fc1", 4 * d, d) | linear(f"{b}.mlp.fc2", d, 4 * d))
        for part in "qkv", "proj", "k", "v":
            shapes |= linear(f"{b}.attn2.{part}", d, d)
        shapes |= _norm(f"{b}.cross_norm", d) | _norm(f"{b}.cross_cond_norm", d)
    n = "diffloss.net"
    shapes |= (_norm("encoder_norm", d) | linear(f"{n}.time_embed.mlp.0", w, 256)
               | linear(f"{n}.time_embed.mlp.2", w, w) | linear(f"{n}.cond_embed", w, d)
               | linear(f"{n}.input_proj", w, tokens))
    for i in range(head_depth):
        b = f"{n}.res_blocks.{i}"
        shapes |= (_norm(f"{b}.in_ln", w) | linear(f"{b}.mlp.0", w, w)
                   | linear(f"{b}.mlp.2", w, w) | linear(f"{b}.adaLN_modulation.1", 3 * w, w))
    return shapes | (linear(f"{n}.final_layer.linear", tokens, w)
                     | linear(f"{n}.final_layer.adaLN_modulation.1", 2 * w, w))


def random_weights(shapes: Shapes, seed: int, volume: float = 1.0) -> Weights:
    """Random values for every key: gains near 1, biases that matter, nothing left at zero.

    volume: factor on every layer that feeds a norm; small, it lets the norms' eps show.
    """
    after_norm = re.compile(r"attn(_1|\.?\d)?\.?(qkv|[qkv])\.?(weight|bias)$|fc1")
    rng = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=rng)
        if len(shape) > 1 or name.endswith("bias") or name == "z_proj_ln.weight":
            x = x if after_norm.search(name) else volume * x
        if name.endswith("bias"):
            return 0.3 * x
        if len(shape) == 1:
            return (volume if name == "z_proj_ln.weight" else 1) + 0.3 * x
        if len(shape) == 0:  # EMA bookkeeping
            return torch.tensor(12345.0)
        if name in ("fake_latent", "encoder_pos_embed_learned", "class_emb.weight"):
            return x
        return x / math.sqrt(math.prod(shape[1:]))

    return {name: draw(name, shape) for name, shape in shapes.items()}


def in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights in another dtype."""
    return {name: value.to(dtype) for name, value in weights.items()}


# ---- the tokenizer ---------------------------------------------------------------------------

def _get(w: Weights, part: str, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer, from the EMA copy: its names have lost their dots."""
    name = name.replace(".", "")
    return w[f"ema_{part}.{name}weight"], w[f"ema_{part}.{name}bias"]


def _has(w: Weights, part: str, name: str) -> bool:
    return f"ema_{part}.{name.replace('.', '')}weight" in w


def _conv2d(w: Weights, part: str, name: str, x: Tensor) -> Tensor:
    weight, bias = _get(w, part, name)
    if weight.shape[-1] == 3:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, weight, bias)


def _conv1d(w: Weights, part: str, name: str, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x, (1, 1), mode="reflect"), *_get(w, part, name))  # (B, C, columns)


def _groupnorm(w: Weights, part: str, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, *_get(w, part, name), eps=1e-6)


def _residual(w: Weights, part: str, name: str, x: Tensor) -> Tensor:
    h = _conv2d(w, part, f"{name}.conv1", F.silu(_groupnorm(w, part, f"{name}.norm1", x)))
    h = _conv2d(w, part, f"{name}.conv2", F.silu(_groupnorm(w, part, f"{name}.norm2", h)))
    if _has(w, part, f"{name}.nin_shortcut"):
        x = _conv2d(w, part, f"{name}.nin_shortcut", x)
    return x + h


def _spatial_attention(w: Weights, part: str, name: str, x: Tensor) -> Tensor:
    h = _groupnorm(w, part, f"{name}.norm", x)
    q, k, v = (_conv2d(w, part, f"{name}.{n}", h).flatten(2) for n in "qkv")  # (B, C, HW)
    p = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), dim=-1)
    h = torch.einsum("bij,bcj->bci", p, v).reshape(x.shape)
    return x + _conv2d(w, part, f"{name}.proj_out", h)


def _mid(w: Weights, part: str, x: Tensor) -> Tensor:
    x = _residual(w, part, "mid.block_1", x)
    x = _spatial_attention(w, part, "mid.attn_1", x)
    return _residual(w, part, "mid.block_2", x)


def _blocks(w: Weights, part: str, stage: str, x: Tensor, limit: int = 1000) -> Tensor:
    """Residual blocks of a stage, each followed by attention where the stage has it."""
    j = 0
    while j < limit and _has(w, part, f"{stage}.block.{j}.conv1"):
        x = _residual(w, part, f"{stage}.block.{j}", x)
        if _has(w, part, f"{stage}.attn.{j}.q"):
            x = _spatial_attention(w, part, f"{stage}.attn.{j}", x)
        j += 1
    return x


def tokens_of_image(w: Weights, image: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to the latents' mode (B, W/f, token channels)."""
    part, i = "encoder", 0
    x = _conv2d(w, part, "conv_in", image)
    while _has(w, part, f"down.{i}.block.0.conv1"):
        x = _blocks(w, part, f"down.{i}", x)
        name = f"down.{i}.downsample.conv.conv"
        if _has(w, part, name):
            b, c, height, width = x.shape
            # the 2x2 pixels of one output pixel, averaged: rows 2r, 2r+1, columns 2s, 2s+1
            mean = x.reshape(b, c, height // 2, 2, width // 2, 2).mean((3, 5))
            x = F.pixel_unshuffle(_conv2d(w, part, name, x), 2) + mean
        i += 1
    x = F.silu(_groupnorm(w, part, "norm_out", _mid(w, part, x)))
    x = _conv2d(w, part, "conv_out", x)  # (B, z, rows, columns)
    x = torch.stack([x[..., column].flatten(1) for column in range(x.shape[-1])], -1)
    x = _conv1d(w, part, "encoder1d", x)
    return _conv1d(w, "quant_layer", "", x).transpose(1, 2)


def _map_of_tokens(w: Weights, tokens: Tensor) -> Tensor:
    """Tokens (B, N, token channels) to the decoder's map after its deepest stage's blocks."""
    part = "decoder"
    x = _conv1d(w, "post_quant_layer", "", tokens.transpose(1, 2))
    x = _conv1d(w, part, "decoder1d", x)  # (B, z·rows, columns)
    z = _get(w, part, "conv_in")[0].shape[1]
    columns = [x[:, :, i].reshape(x.shape[0], z, -1) for i in range(x.shape[2])]
    x = _mid(w, part, _conv2d(w, part, "conv_in", torch.stack(columns, -1)))
    return _blocks(w, part, f"up.{_last_stage(w)}", x)


def _last_stage(w: Weights) -> int:
    return max(i for i in range(20) if _has(w, "decoder", f"up.{i}.block.0.conv1"))


def image_of_tokens(w: Weights, tokens: Tensor) -> Tensor:
    """Tokens (B, N, token channels) to images (B, 3, H, N·f)."""
    part, x = "decoder", _map_of_tokens(w, tokens)
    for i in range(_last_stage(w), -1, -1):
        if i < _last_stage(w):
            x = _blocks(w, part, f"up.{i}", x)
        if i > 0:
            nearest = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = _conv2d(w, part, f"up.{i}.upsample.conv.conv", x)
            x = F.pixel_shuffle(h, 2) + nearest
    return _conv2d(w, part, "conv_out", F.silu(_groupnorm(w, part, "norm_out", x)))


def semantic_map(w: Weights, tokens: Tensor) -> Tensor:
    """Tokens (B, N, token channels) to the semantic head's map (B, channels, rows, N)."""
    part, x = "semantic_decoder", _map_of_tokens(w, tokens)
    for level in range(2):
        x = _blocks(w, part, f"down.{level}", x, limit=2)  # the third block is never used
    return _conv2d(w, part, "conv_out", F.silu(_groupnorm(w, part, "norm_out", x)))


# ---- the generator ---------------------------------------------------------------------------

def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _ln(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _rotate(x: Tensor, shift: int) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of heads (B, N, H, D); token n is at position n + shift."""
    pairs = torch.arange(x.shape[-1] // 2, dtype=x.dtype)
    position = torch.arange(x.shape[1], dtype=x.dtype) + shift
    angle = position[:, None, None] * 10000 ** (-2 * pairs / x.shape[-1])  # (N, 1, D/2)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, D) over keys and values (B, N, H, D): (B, H·D)."""
    p = torch.softmax(torch.einsum("bhd,bnhd->bhn", q, k) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.einsum("bhn,bnhd->bhd", p, v).flatten(1)


def _mlp(w: Weights, block: str, x: Tensor) -> Tensor:
    h = _linear(w, f"{block}.mlp.fc1", _ln(w, f"{block}.norm2", x))
    return x + _linear(w, f"{block}.mlp.fc2", F.gelu(h))


def transformer(w: Weights, tokens: Tensor, labels: list[int | None], heads: int, window: int,
                shift: int = 0) -> Tensor:
    """Conditions z_0 … z_N (B, N + 1, d) from normalised tokens (B, N, C); None is no class."""
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1))  # (B, N, H, D)

    embedded = torch.stack([w["fake_latent"][0] if label is None else w["class_emb.weight"][label]
                            for label in labels])
    c = embedded[:, None] + w["encoder_pos_embed_learned"]  # (B, class tokens, d)
    c, x = _ln(w, "z_proj_ln", c), _ln(w, "z_proj_ln", _linear(w, "z_proj", tokens))
    layer = 0
    while f"encoder_blocks.{layer}.norm1.weight" in w:
        b = f"encoder_blocks.{layer}"
        q, k, v = _linear(w, f"{b}.attn.qkv", _ln(w, f"{b}.norm1", x)).chunk(3, dim=-1)
        q, k, v = _rotate(split(q), shift), _rotate(split(k), shift), split(v)
        first = [max(0, i - window + 1) for i in range(x.shape[1])]
        o = [_attend(q[:, i], k[:, s:i + 1], v[:, s:i + 1]) for i, s in enumerate(first)]
        x = x + _linear(w, f"{b}.attn.proj", torch.stack(o, 1)) if o else x
        q = split(_linear(w, f"{b}.attn2.qkv", _ln(w, f"{b}.cross_norm", x, 1e-5)))
        normed = _ln(w, f"{b}.cross_cond_norm", c, 1e-5)
        k, v = (split(_linear(w, f"{b}.attn2.{n}", normed)) for n in "kv")
        q = _rotate(q, shift)
        o = [_attend(q[:, i], k, v) for i in range(x.shape[1])]
        x = x + _linear(w, f"{b}.attn2.proj", torch.stack(o, 1)) if o else x
        x, c = _mlp(w, b, x), _mlp(w, b, c)
        layer += 1
    return _ln(w, "encoder_norm", torch.cat((c[:, -1:], x), 1))


def velocity(w: Weights, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The flow head: states (M, C), times (M,) in [0, 1], conditions (M, d) to (M, C)."""
    n = "diffloss.net"
    k = torch.arange(128, dtype=x.dtype)
    phase = t[:, None] * torch.exp(-math.log(10000) * k / 128)
    y = _linear(w, f"{n}.time_embed.mlp.0", torch.cat((phase.cos(), phase.sin()), -1))
    y = _linear(w, f"{n}.time_embed.mlp.2", F.silu(y)) + _linear(w, f"{n}.cond_embed", z)
    x, y, i = _linear(w, f"{n}.input_proj", x), F.silu(y), 0
    while f"{n}.res_blocks.{i}.in_ln.weight" in w:
        b = f"{n}.res_blocks.{i}"
        shift, scale, gate = _linear(w, f"{b}.adaLN_modulation.1", y).chunk(3, dim=-1)
        h = _ln(w, f"{b}.in_ln", x) * (1 + scale) + shift
        x = x + gate * _linear(w, f"{b}.mlp.2", F.silu(_linear(w, f"{b}.mlp.0", h)))
        i += 1
    shift, scale = _linear(w, f"{n}.final_layer.adaLN_modulation.1", y).chunk(2, dim=-1)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return _linear(w, f"{n}.final_layer.linear", x)


def trajectory(w: Weights, noise: Tensor, labels: list[int], heads: int, window: int, steps: int,
               guidance: float, dynamic: bool = True) -> Tensor:
    """Normalised tokens (B, N, C) drawn column by column from the given noise (B, N, C)."""
    length, nothing = noise.shape[1], [None] * len(labels)
    tokens = noise[:, :0]
    for i in range(length):
        z_cond = transformer(w, tokens, list(labels), heads, window)[:, -1]
        z_null = transformer(w, tokens, nothing, heads, window)[:, -1]
        s = 1 + (guidance - 1) * (i + 1) / length if dynamic else guidance
        x = noise[:, i]
        for step in range(steps):
            t = torch.full((len(labels),), 1 - step / steps, dtype=x.dtype)
            v_cond, v_null = velocity(w, x, t, z_cond), velocity(w, x, t, z_null)
            x = x - (v_null + s * (v_cond - v_null)) / steps
        tokens = torch.cat((tokens, x[:, None]), 1)
    return tokens
