"""Layers that keep float32 where fewer bits would hurt, and activation checkpointing."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Precision ---------------------------------------------------------------------------------


def widened(x: Tensor) -> Tensor:
    """x in float32 if it has fewer bits; itself otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, also of an x of fewer bits (CUDA's autocast sees to it, a CPU's not).

    So what is added to its result, the residual stream, is float32 as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(widened(x))


def float32_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) in the weights' own precision, also inside autocast."""
    if x.device.type == "meta":  # which autocast does not know
        return linear(x)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x)


# Memory ------------------------------------------------------------------------------------


def maybe_recomputed(recompute: bool, block: Callable[..., Any], *args: Any) -> Any:
    """block(*args); with `recompute`, what its backward pass needs is computed again there.

    The same numbers either way: dropout draws the same again.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
