"""A generator made ready for sampling: the same function, its weights laid out for speed.

A column costs hundreds of passes through the head with a handful of rows each, so that reading
the weights is what takes the time.  `prepared` therefore
- hands the weights to oneDNN once, in the blocked layout that it computes from (CPU);
- keeps them in bfloat16 where that is asked for: half the bytes.  Matrix products then read
  bfloat16 and sum in float32; everything between them (the residual stream, norms, softmax,
  the time embedding, the ODE's state x) stays float32;
- calls the head's blocks with as little Python between their operators as can be.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.flow_head import HeadBlock
from equimini.generator import Generator

ONEDNN_NAMES = {type(None): ("none", ""), nn.SiLU: ("swish", ""), nn.GELU: ("gelu", "none")}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


class ReadyLinear(nn.Module):
    """A linear layer with weights that are only read, and the activation that follows it.

    activation: nn.SiLU, nn.GELU or None.  Float32 in and out; with `hidden`, the output stays in
    dtype, for a layer whose output only the next matrix product reads.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, activation: nn.Module | None = None,
                 hidden: bool = False) -> None:
        super().__init__()
        self.dtype, self.dtype_out = dtype, dtype if hidden else torch.float32
        self.bias = linear.bias.detach().to(dtype)
        self.weight = linear.weight.detach().to(dtype)
        self.activation, self.packed = activation, packs(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            name, algorithm = ONEDNN_NAMES[type(activation)]
            self.arguments = self.weight, self.bias, name, [], algorithm

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.to(self.dtype)).to(self.dtype_out)

    def product(self, x: Tensor) -> Tensor:
        """The layer and its activation, from dtype to dtype."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, *self.arguments)
        y = F.linear(x, self.weight, self.bias)
        return y if self.activation is None else self.activation(y)


class ReadyBlock(nn.Module):
    """A block of the head over ready layers: the same numbers, without the calls in between.

    With two rows, modules, casts and look-ups take about as long as one product.
    """

    def __init__(self, block: HeadBlock) -> None:
        super().__init__()
        assert isinstance(block.mlp[1], nn.Identity)  # fused into the layer before it
        self.norm, self.mlp, self.ada = block.norm, block.mlp, block.ada
        self.layers = self.norm, self.mlp[0], self.mlp[2]  # read without a look-up

    modulation, conditioned = HeadBlock.modulation, HeadBlock.conditioned

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (norm, first, second), (shift, factor, gate) = self.layers, modulation
        h = torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[0]
        h = second.product(first.product(torch.addcmul(shift, factor, h).to(first.dtype)))
        return torch.addcmul(x, gate, h)  # float32, whatever h is


def packs(weight: Tensor) -> bool:
    """Whether this torch, on this processor, lets oneDNN lay out such a weight in advance."""
    ops = torch.ops.mkldnn
    return (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
            and (weight.dtype != torch.bfloat16 or ops._is_mkldnn_bf16_supported()))


def prepared(generator: Generator, precision: str = "float32") -> Generator:
    """A copy of the generator for sampling alone, with linear layers made ready.

    On a CPU, and in bf16, their weights are a second set in memory; all other weights are
    shared, so after a change of weights the copy is to be made again (`LastPrepared` does).
    precision: 'float32' computes the same function up to rounding, 'bf16' makes the matrix
    products in bfloat16.
    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    tensors = (*generator.parameters(), *generator.buffers())
    twin = copy.deepcopy(generator, {id(t): t for t in tensors})  # shared
    for module in list(twin.modules()):
        once = module is twin.head.time_mlp  # per run: no reason to round it
        _replace_linear_layers(module, torch.float32 if once else PRECISIONS[precision])
    twin.head.blocks = nn.ModuleList(map(ReadyBlock, twin.head.blocks))
    return twin.eval()


def _replace_linear_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the linear layers among a module's children ready, in an MLP with their activations."""
    children = list(module.named_children())
    for k, (name, child) in enumerate(children):
        if isinstance(child, nn.Linear):
            after = children[k + 1] if isinstance(module, nn.Sequential) and children[k + 1:] else 0
            fused = after and type(after[1]) in ONEDNN_NAMES
            setattr(module, name, ReadyLinear(child, dtype, after[1] if fused else None, fused))
            if fused:
                setattr(module, after[0], nn.Identity())


class LastPrepared:
    """Keeps the last prepared copy of a generator, until its weights change."""

    def __init__(self) -> None:
        self.key, self.copy = None, None

    def __call__(self, generator: Generator, precision: str) -> Generator:
        """`prepared`, made again only where the precision or a weight is not the same."""
        key = (precision, *((p.data_ptr(), p._version) for p in generator.parameters()))
        if key != self.key:
            self.copy = None  # frees it first
            self.key, self.copy = key, prepared(generator, precision)
        return self.copy
