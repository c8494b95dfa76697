"""A generator packed for sampling: the same function, its weights laid out for speed.

A column costs hundreds of passes through the head with a handful of rows each, so that reading
the weights is what takes the time.  On a CPU few_rows.py has all of it in C++, where that was
compiled; else `packed`
- hands the weights to oneDNN once, in the blocked layout that it computes from (CPU);
- keeps them in bfloat16 for precision bf16: half the bytes.  Matrix products then read
  bfloat16 and sum in float32; everything between them (the residual stream, norms, softmax,
  the time embedding, the ODE's state x) stays float32;
- calls the head's blocks with as little Python between their operators as can be.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equimini.flow_head import FlowHead, HeadBlock
from equimini.generator import Generator
from equimini.mean_flow import MeanFlowHead
from equimini.sampling import few_rows

ONEDNN_NAMES = {type(None): ("none", ""), nn.SiLU: ("swish", ""), nn.GELU: ("gelu", "none")}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


class PackedLinear(nn.Module):
    """A linear layer with weights that are only read, and the activation that follows it.

    activation: nn.SiLU, nn.GELU or None.  Float32 in and out; with `hidden`, the output stays in
    dtype, for a layer whose output only the next matrix product reads.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, activation: nn.Module | None = None,
                 hidden: bool = False) -> None:
        super().__init__()
        self.dtype, self.dtype_out = dtype, dtype if hidden else torch.float32
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
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


class PackedBlock(nn.Module):
    """A block of the head over packed layers: the same numbers, without the calls in between.

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


class Packer:
    """What a head's `pack` is given: replaces layers by packed ones, in place."""

    def __init__(self, precision: str) -> None:
        self.dtype = PRECISIONS[precision]

    def linears(self, module: nn.Module, rounded: bool = True) -> None:
        """Pack the linear layers among a module's children, in an MLP with their activations.

        rounded: False keeps float32 whatever the precision is.
        """
        dtype, children = self.dtype if rounded else torch.float32, list(module.named_children())
        for k, (name, child) in enumerate(children):
            if isinstance(child, nn.Linear):
                after = children[k + 1:k + 2] if isinstance(module, nn.Sequential) else []
                fused = bool(after) and type(after[0][1]) in ONEDNN_NAMES
                packed = PackedLinear(child, dtype, after[0][1] if fused else None, fused)
                setattr(module, name, packed)
                if fused:
                    setattr(module, after[0][0], nn.Identity())

    def residual_block(self, block: HeadBlock) -> PackedBlock:
        """A block of the flow head."""
        self.linears(block)
        self.linears(block.mlp)
        return PackedBlock(block)


def packed(generator: Generator, precision: str = "float32") -> Generator:
    """A copy of the generator for sampling alone, with packed linear layers.

    On a CPU, and in bf16, their weights are a second set in memory; all other weights are shared,
    so that after a change of weights the copy has to be made again (`LastPacked` does).
    precision: 'float32' computes the same function up to rounding, 'bf16' makes the matrix
    products in bfloat16.
    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    tensors = (*generator.parameters(), *generator.buffers())
    copied = copy.deepcopy(generator, {id(t): t for t in tensors})  # shared
    packer, in_head = Packer(precision), set(copied.head.modules())
    if few_rows.fits(copied.head, FlowHead, MeanFlowHead):
        few_rows.replace_head(copied.head, packer.dtype)
    else:
        copied.head.pack(packer)
    if few_rows.fits(copied, Generator):
        few_rows.replace_transformer(copied, packer.dtype)
    else:
        for module in [m for m in copied.modules() if m not in in_head]:
            packer.linears(module)
    return copied.eval()


def fingerprint(module: nn.Module) -> tuple:
    """A value that changes with the weights, however they are written.

    torch counts in-place changes, but not those by fused optimizers or through `p.data`.  So all
    bytes are added up as 64-bit integers: any single change shows, and only writes that neither
    torch counts nor that change the sum (weights that merely change places) do not.
    """
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
    sums = []
    for t in tensors:
        flat = t.contiguous().view(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        sums += [flat[:whole].view(torch.int64).sum(), flat[whole:].sum()]
    found = torch.stack(sums).tolist() if sums else []
    return (*found, *((t.data_ptr(), t._version) for t in tensors))


class LastPacked:
    """Keeps the last packed copy of a generator, and its CUDA graphs, until its weights change.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.key, self.copy, self.graphs = None, None, {}

    def __reduce__(self) -> tuple:
        return LastPacked, ()

    def __call__(self, generator: Generator, precision: str) -> Generator:
        """`packed`, made again only where the precision or a weight is not the same."""
        key = (precision, fingerprint(generator))
        if key != self.key:
            self.copy, self.graphs = None, {}  # frees them first
            self.key, self.copy = key, packed(generator, precision)
        return self.copy

    def graphed(self, options: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` recorded last for these options; one set is kept.

        To record takes as long as drawing a column several times, so one picture after the other
        uses the same graphs.
        """
        if options not in self.graphs:
            self.graphs = {}
            self.graphs[options] = make()
        return self.graphs[options]
