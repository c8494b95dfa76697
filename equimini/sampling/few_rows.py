"""One picture's products on a CPU: a generator whose head and transformer run in C++.

A picture alone has one or two rows, so that calls and the reading of weights are all its time.
csrc/cpu/few_rows.h runs the whole head, and a token's whole way through the transformer, in one
call each, over weights that lie in the order in which they are read.  It serves many rows as well.
Where it was not compiled, packed_weights.py does with oneDNN; what either computes is written in
flow_head.py and generator.py.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.flow_head import FlowHead, TimeMLP
from equimini.generator import ClassContext, Generator, KeyValue
from equimini.rope import rope_tables

PANEL = 16  # outputs whose weights lie together, as in csrc/cpu/few_rows.h
operators = torch.ops.equimini_sampling


def compiled() -> bool:
    """Whether there is a binary, as for attention (kernel/binary.py)."""
    return hasattr(operators, "token")


def fits(part: nn.Module, *kinds: type) -> bool:
    """Whether the operators compute this part of a generator."""
    return compiled() and type(part) in kinds and next(part.parameters()).device.type == "cpu"


# Weights -----------------------------------------------------------------------------------


class PanelLinear(nn.Module):
    """A linear layer over weights in panels, matrix (out/16, in, 16) and vector (out,), padded."""

    def __init__(self, matrix: Tensor, vector: Tensor, out: int) -> None:
        super().__init__()
        self.arguments = matrix, vector, out

    def forward(self, x: Tensor) -> Tensor:
        return operators.linear(x, *self.arguments)


def lay_out(parent: nn.Module, layers: Sequence[nn.Module],
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices and vectors (biases, norms) of layers, in their order, as the operators read them.

    Linear layers anywhere in `parent` become `PanelLinear` of the same memory.
    """
    matrices, vectors, names = [], [], {id(m): name for name, m in parent.named_modules()}
    for layer in layers:
        tensors = [] if layer.weight is None else [layer.weight, layer.bias]
        tensors = [F.pad(t.detach(), (0,) * (2 * t.dim() - 1) + (-len(t) % PANEL,)) for t in tensors]
        if isinstance(layer, nn.Linear):
            matrices.append(tensors.pop(0).unflatten(0, (-1, PANEL)).transpose(1, 2).flatten())
        else:
            tensors.insert(0, torch.full((PANEL,), layer.eps))
        vectors.append(torch.cat(tensors))
    matrix, vector = torch.cat(matrices).to(dtype), torch.cat(vectors).float()
    views = iter(matrix.split([len(m) for m in matrices]))
    for layer, v in zip(layers, vector.split([len(v) for v in vectors])):
        if isinstance(layer, nn.Linear):
            panels = PanelLinear(next(views), v, layer.out_features)
            owner, _, name = names[id(layer)].rpartition(".")
            setattr(parent.get_submodule(owner), name, panels)
    return matrix, vector


# The head ----------------------------------------------------------------------------------


def replace_head(head: FlowHead, dtype: torch.dtype) -> None:
    """Let a head compute its modulations and velocities in C++."""
    width, depth = head.x_in.out_features, len(head.blocks)
    adas = [*(block.ada for block in head.blocks), head.ada_out]
    head.adas = nn.Linear(width, (3 * depth + 2) * width, device="meta")  # as one, 1 + scale as bias
    head.adas.weight, head.adas.bias = (
        nn.Parameter(torch.cat([getattr(ada, name) for ada in adas]), False)
        for name in ("weight", "bias"))
    head.adas.bias.view(-1, width)[[*range(1, 3 * depth, 3), -1]] += 1
    lay_out(head, [head.adas, head.z_in], dtype)
    lay_out(head, [layer for mlp in head.modules() if isinstance(mlp, TimeMLP)
                   for layer in (mlp[0], mlp[2])], torch.float32)
    head.modulations = partial(modulations, head)
    layers = [head.x_in, *(m for b in head.blocks for m in (b.norm, b.mlp[0], b.mlp[2])),
              head.norm_out, head.x_out]
    head.velocity = partial(velocity, *lay_out(head, layers, dtype), width, depth)
    if head.scales:
        head.embed_scale = remembered(head.embed_scale)


def modulations(head: FlowHead, time: Tensor, z: Tensor) -> list[tuple[Tensor]]:
    """All of `FlowHead.modulations` in one tensor."""
    return [(head.adas(head.condition(time, z)),)]


def velocity(matrix: Tensor, vector: Tensor, width: int, depth: int, x: Tensor,
             modulations: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """`FlowHead.velocity` of x (…, channels)."""
    (m,), = modulations
    if x.shape[:-1] != m.shape[:-1]:
        rows = torch.broadcast_shapes(x.shape[:-1], m.shape[:-1])
        x, m = x.expand(*rows, -1), m.expand(*rows, -1)
    return operators.head(x, m, matrix, vector, width, depth)


def remembered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, not asked again for the same numbers: guidance is often constant."""
    last: list[Tensor] = []

    def call(s: Tensor) -> Tensor:
        if not last or not torch.equal(s, last[0]):
            last[:] = s.clone(), function(s)
        return last[1]

    return call


# The transformer ---------------------------------------------------------------------------


def replace_transformer(generator: Generator, dtype: torch.dtype) -> None:
    """Let a generator's forward pass of one token run in C++, and encode every class once."""
    layers = [generator.x_in, generator.norm_in]
    for b in generator.blocks:
        layers += [b.norm1, b.attn.qkv, b.attn.proj, b.cross_norm, b.cross.q, b.cross.proj, b.norm2,
                   b.mlp[0], b.mlp[3]]
    layers.append(generator.norm_out)
    generator.forward = OneToken(generator, *lay_out(generator, layers, dtype))
    lay_out(generator, [m for b in generator.blocks for m in (b.cross.k, b.cross.v)], dtype)
    generator.encode_classes = partial(encode_distinct, generator)


def encode_distinct(generator: Generator, labels: Tensor,
                    drop: Tensor | None = None) -> ClassContext:
    """`Generator.encode_classes`: pictures of a class share its encoding."""
    none = generator.num_classes
    wanted = labels if drop is None else labels.masked_fill(drop, none)
    distinct, where = wanted.unique(return_inverse=True)
    context = type(generator).encode_classes(generator, distinct % none, distinct == none)
    return ClassContext([(k[where], v[where]) for k, v in context.keys_values], context.z0[where])


class OneToken:
    """`Generator.forward`, in C++ for one token and a cache."""

    def __init__(self, generator: Generator, matrix: Tensor, vector: Tensor) -> None:
        self.plain, self.weights = partial(type(generator).forward, generator), (matrix, vector)
        self.window, self.channels = generator.config.window, generator.channels
        self.head_dim = generator.config.embed_dim // generator.config.heads
        # differences of positions are all that self-attention sees, so 0 may be the oldest key
        self.rope = rope_tables(torch.arange(self.window), self.head_dim)
        self.position, self.cross_rope = None, ()

    def __call__(self, tokens: Tensor, context: ClassContext, position: int = 0,
                 cache: list[KeyValue] | None = None, max_position: int | None = None,
                 shift: Tensor | None = None) -> Tensor:
        if cache is None or tokens.shape[1:] != (1, self.channels) or shift is not None:
            return self.plain(tokens, context, position, cache, max_position, shift)
        position = position if max_position is None else min(position, max_position)
        if position != self.position:
            self.cross_rope = rope_tables(torch.tensor([position]), self.head_dim)
            self.position = position
        past, classes = ([x for pair in pairs for x in pair] for pairs in (cache, context.keys_values))
        z, kept = operators.token(tokens, past, classes, *self.rope, *self.cross_rope, *self.weights,
                                  self.window)
        kept = kept.unbind(0)
        cache[:] = zip(kept[::2], kept[1::2])
        return z
