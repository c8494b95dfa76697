"""The generator: a windowed causal transformer over columns, with a flow-matching head.

    class ──► 16 class tokens ──(MLPs)──► keys and values of every layer, and z_0
    tokens x_0 … x_{i−1} ──(windowed self-attention, cross-attention to the class)──► z_i
    z_i, noise ──(flow head)──► x_i

z_i sums up what comes before column i; the head turns it into a distribution over column i.
Self-attention sees position differences only (RoPE on q and k), and only `window` columns, so
every column is predicted by the same function of its surroundings.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from equimini.attention import window_attention
from equimini.config import Checked, flag
from equimini.flow_head import FlowHead
from equimini.kernel.operators import forward_mode
from equimini.layers import LayerNorm, maybe_recomputed, xavier
from equimini.mean_flow import MeanFlowHead
from equimini.rope import Rope, rope_tables, rotate

HEADS = {"flow-matching": FlowHead, "mean-flow": MeanFlowHead}  # by what they are trained for


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """Architecture of the column generator; the defaults are the paper's `small`."""

    layers: int = flag(16, "transformer blocks", min=1)
    embed_dim: int = flag(512, "channels (width d) of the transformer", min=8)
    heads: int = flag(8, "attention heads", min=1)
    window: int = flag(4, "columns that a column attends to, itself counted", min=1)
    real_equivariant: bool = flag(False, "Eq. 6: nothing beyond the window exists. Trained on "
                                  "random crops of as many columns; each column is drawn from the "
                                  "ones before it in the window alone")
    class_tokens: int = flag(16, "learned tokens that carry the class", min=1)
    head_width: int = flag(960, "channels of the flow head's MLP", min=1)
    head_depth: int = flag(12, "blocks of the flow head", min=1)
    dropout: float = flag(0.1, "dropout probability in the transformer", min=0, max=0.99)
    objective: str = flag("flow-matching", "what the head learns: velocities (Eq. 8), or with "
                          "--init-from also average velocities, for samples in one evaluation of "
                          "the head a column", choices=tuple(HEADS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % (8 * self.heads) or self.embed_dim > 128 * self.heads:
            raise ValueError(f"embed-dim / heads, the head size, must be a multiple of 8 up to "
                             f"128, got {self.embed_dim} / {self.heads}")
        if self.real_equivariant and self.window < 2:
            raise ValueError("real-equivariant needs a window of at least 2")


KeyValue = tuple[Tensor, Tensor]  # keys and values, each (B, n, H, D)


class ClassContext(NamedTuple):
    """What image tokens see of their class: it depends on the class alone, so it is made once."""

    keys_values: list[KeyValue]  # per layer, of the class tokens: (B, class_tokens, H, D)
    z0: Tensor  # (B, 1, d): the output at the last class token, which predicts column 0


class SelfAttention(nn.Module):
    """Windowed causal attention with RoPE; keeps the last W−1 keys and values when cached."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads, self.window, self.dropout = config.heads, config.window, config.dropout
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)  # rows: all q, all k, all v
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, rope: Rope,
                past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """x (B, n, d) to (the same, the keys and values that the next tokens can still see).

        rope: tables of the past keys' positions and of x's, in order.  Keys are kept unrotated.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, n, H, D)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        o = window_attention(q, k, v, self.window, rope=rope,
                             dropout_p=self.dropout if self.training else 0.0)
        keep = max(0, k.shape[1] - (self.window - 1))
        o = F.dropout(self.proj(o.flatten(2)), self.dropout, self.training)
        return o, (k[:, keep:], v[:, keep:])


class CrossAttention(nn.Module):
    """From image tokens to class tokens; queries are rotated, class keys are not.

    That makes it the only place that sees a column's absolute position.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.heads, self.dropout = config.heads, config.dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d) for _ in range(4))

    def keys_values(self, c: Tensor) -> KeyValue:
        """Class tokens (B, T, d) to their keys and values."""
        k, v = (p(c).unflatten(-1, (self.heads, -1)) for p in (self.k, self.v))
        return k, v

    def forward(self, x: Tensor, keys_values: KeyValue, rope: Rope) -> Tensor:
        q = rotate(self.q(x).unflatten(-1, (self.heads, -1)), rope)
        q, k, v = (a.transpose(1, 2) for a in (q, *keys_values))  # (B, H, n, D)
        # torch's fused kernels know no tangents
        with sdpa_kernel(SDPBackend.MATH) if forward_mode() else nullcontext():
            o = F.scaled_dot_product_attention(q, k, v,
                                               dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(o.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Sequential):
    """Linear, GELU, Linear at four times the width, with dropout after both."""

    def __init__(self, config: GeneratorConfig) -> None:
        d = config.embed_dim
        super().__init__(nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(config.dropout),
                         nn.Linear(4 * d, d), nn.Dropout(config.dropout))

    def forward(self, x: Tensor) -> Tensor:  # of our own: MLP.compile() skips nn.Sequential's
        return super().forward(x)


class Block(nn.Module):
    """Self-attention, cross-attention to the class, MLP; the MLP also updates class tokens."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.norm1, self.attn = LayerNorm(d, eps=1e-6), SelfAttention(config)
        self.cross_norm = LayerNorm(d, eps=1e-5)  # of the image tokens
        self.class_norm = LayerNorm(d, eps=1e-5)  # of the class tokens
        self.cross = CrossAttention(config)
        self.norm2, self.mlp = LayerNorm(d, eps=1e-6), MLP(config)

    def class_step(self, c: Tensor) -> tuple[KeyValue, Tensor]:
        """Class tokens c (B, T, d): what image tokens read of them here, and c after the MLP."""
        return self.cross.keys_values(self.class_norm(c)), c + self.mlp(self.norm2(c))

    def forward(self, x: Tensor, class_kv: KeyValue, rope: Rope, cross_rope: Rope,
                past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Image tokens x (B, n, d) to (the same, the cache).

        rope: tables of the past keys and x, for self-attention; cross_rope: of x alone.
        """
        o, past = self.attn(self.norm1(x), rope, past)
        x = x + o
        x = x + self.cross(self.cross_norm(x), class_kv, cross_rope)
        return x + self.mlp(self.norm2(x)), past


class Generator(nn.Module):
    """p(x | class) = Π_i p(x_i | x_<i, class) over normalised column tokens (Eq. 2).

    num_classes: size of the class table; channels: of one token.
    """

    def __init__(self, config: GeneratorConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        self.config, self.num_classes, self.channels = config, num_classes, channels
        d = config.embed_dim
        self.class_table = nn.Embedding(num_classes, d)
        self.no_class = nn.Parameter(torch.empty(1, d))
        self.class_embed = nn.Parameter(torch.empty(1, config.class_tokens, d))
        self.x_in = nn.Linear(channels, d)
        self.norm_in = LayerNorm(d, eps=1e-6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = LayerNorm(d, eps=1e-6)
        self.init_weights()
        self.head = HEADS[config.objective](channels, d, config.head_width, config.head_depth)
        self.recompute = False  # see checkpoint_activations

    def checkpoint_activations(self) -> None:
        """Train with less memory: between blocks, and between those of the head, activations are
        kept for the backward pass; those inside a block are computed again."""
        self.recompute = self.head.recompute = True

    def init_weights(self) -> None:
        """Linear layers Xavier-uniform with zero biases; embeddings from N(0, 0.02²)."""
        self.apply(xavier)
        for table in (self.class_table.weight, self.no_class, self.class_embed):
            nn.init.normal_(table, std=0.02)

    def encode_classes(self, labels: Tensor, drop: Tensor | None = None) -> ClassContext:
        """Everything that image tokens need of their class.

        labels: (B,) class numbers; drop: (B,) bool, True replaces the class by "no class".
        """
        c = self.class_table(labels)
        if drop is not None:
            c = torch.where(drop[:, None], self.no_class, c)
        c = self.norm_in(c[:, None] + self.class_embed)  # (B, T, d)
        keys_values = []
        for block in self.blocks:
            kv, c = maybe_recomputed(self.recompute, block.class_step, c)
            keys_values.append(kv)
        return ClassContext(keys_values, self.norm_out(c[:, -1:]))

    def forward(self, tokens: Tensor, context: ClassContext, position: int | Tensor = 0,
                cache: list[KeyValue] | None = None, max_position: int | None = None,
                shift: Tensor | None = None) -> Tensor:
        """Tokens x_p … x_{p+n−1} (B, n, C), p = position, to z_{p+1} … z_{p+n} (B, n, d).

        position: a number, also as a tensor on the device (which a CUDA graph reads when replayed).
        cache: one (keys, values) per layer of the tokens before, extended and trimmed to the
        last W−1 in place; start with an empty list.  max_position: the largest one that
        cross-attention is shown, for columns beyond any length seen in training; None: no limit.
        shift: (B,), what cross-attention is shown is moved by, one number per image.
        Self-attention sees differences of positions only, and always the true ones.
        """
        x = self.norm_in(self.x_in(tokens))
        known = cache[0][0].shape[1] if cache else 0
        positions = position + torch.arange(-known, x.shape[1], device=x.device)
        head_dim = self.config.embed_dim // self.config.heads
        rope = rope_tables(positions, head_dim)
        cross_rope = rope[0][known:], rope[1][known:]
        if max_position is not None:
            cross_rope = rope_tables(positions[known:].clamp(max=max_position), head_dim)
        if shift is not None:
            cross_rope = rope_tables(positions[known:] + shift[:, None], head_dim)  # (B, n, D/2)
        pasts = list(cache) if cache else [None] * len(self.blocks)
        for i, block in enumerate(self.blocks):
            x, pasts[i] = maybe_recomputed(self.recompute, block, x, context.keys_values[i], rope,
                                           cross_rope, pasts[i])
        if cache is not None:
            cache[:] = pasts
        return self.norm_out(x)

    def predict(self, tokens: Tensor, labels: Tensor, drop: Tensor | None = None,
                shift: int | Tensor = 0) -> Tensor:
        """z_0 … z_{N−1} (B, N, d) for all columns of `tokens` (B, N, C) at once.

        shift: the training's position augmentation, added to every position; or (B,), one for each
        image, added where it shows, in cross-attention.
        """
        context = self.encode_classes(labels, drop)
        if tokens.shape[1] == 1:
            return context.z0
        if isinstance(shift, Tensor) and shift.dim():
            z = self(tokens[:, :-1], context, shift=shift)
        else:
            z = self(tokens[:, :-1], context, shift)
        return torch.cat((context.z0, z), 1)


class RealEquivariant(Generator):
    """Eq. 6: nothing beyond the window exists, p(x_i | x_{i−W+1} … x_{i−1}).

    Trained on random crops of W columns; each z is computed from the W−1 columns before it alone,
    with the positions of a crop, whatever their place in the image.
    """

    def forward(self, tokens: Tensor, context: ClassContext, position: int | Tensor = 0,
                cache: list[KeyValue] | None = None, max_position: int | None = None,
                shift: Tensor | None = None) -> Tensor:
        """As `Generator.forward`; the cache holds the columns themselves.

        Near the left end of the image there are fewer: column i < W−1 is drawn as the i-th of a
        crop that begins with the image, column 0 from the class alone, as in any crop.
        """
        reach = self.config.window - 1
        if cache is None and tokens.shape[1] <= reach:  # a crop, in training
            return super().forward(tokens, context, position, shift=shift)
        past = cache[0][0] if cache else tokens[:, :0]
        known, tokens, parts = past.shape[1], torch.cat((past, tokens), 1), []
        if known < reach:
            first = super().forward(tokens[:, :reach], context, position if cache is None else 0)
            parts.append(first[:, known:])
        if tokens.shape[1] > reach:
            windows = tokens.unfold(1, reach, 1)[:, 1:].transpose(2, 3)  # (B, m, W−1, C)
            m = windows.shape[1]
            keys_values = [(k.repeat_interleave(m, 0), v.repeat_interleave(m, 0))
                           for k, v in context.keys_values]
            z = super().forward(windows.flatten(0, 1), ClassContext(keys_values, context.z0))
            parts.append(z[:, -1].unflatten(0, (-1, m)))
        if cache is not None:
            cache[:] = [(tokens[:, -reach:], tokens[:, -reach:])] * len(self.blocks)
        return torch.cat(parts, 1)


def make_generator(config: GeneratorConfig, num_classes: int, channels: int) -> Generator:
    """The paper's model, or its variant of Eq. 6 where the configuration asks for it."""
    kind = RealEquivariant if config.real_equivariant else Generator
    return kind(config, num_classes, channels)


def random_crops(tokens: Tensor, length: int, starts: Tensor) -> Tensor:
    """Crops of `length` columns: tokens (B, N, C), first columns (B, k) to (B·k, length, C)."""
    columns = starts[:, :, None] + torch.arange(length, device=starts.device)  # (B, k, length)
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None, None],
                  columns].flatten(0, 1)


def flow_matching_errors(generator: Generator, tokens: Tensor, labels: Tensor, u: Tensor,
                         eps: Tensor, drop: Tensor | None = None,
                         shift: int | Tensor = 0) -> Tensor:
    """Eq. 8 for every draw: (v − (ε − x))², (M, B, N), the mean over channels (in Eq. 8 the sum).

    tokens: (B, N, C), normalised; u: (M, B, N), uniform, gives t = u·(1−1e-5) + 1e-5; eps:
    (M, B, N, C), standard normal.  Each token is used M times (the paper's batch multiplier).
    """
    z = generator.predict(tokens, labels, drop, shift)  # (B, N, d)
    t = u * (1 - 1e-5) + 1e-5
    x_t = torch.lerp(tokens, eps, t[..., None])  # t·ε + (1−t)·x
    v = generator.head(x_t, t, z).float()
    return (v - (eps - tokens)).square().mean(3)


def flow_matching_loss(*arguments: Any) -> Tensor:
    """`flow_matching_errors` averaged over the repeats: the loss of every column, (B, N)."""
    return flow_matching_errors(*arguments).mean(0)
