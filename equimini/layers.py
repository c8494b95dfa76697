"""What several modules share: float32 where fewer bits would hurt, initial weights, less memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def widened(x: Tensor) -> Tensor:
    """x in float32 if it has fewer bits; itself otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, also of an x of fewer bits (CUDA's autocast sees to it, a CPU's not).

    So what is added to its result, the residual stream, is float32 as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(widened(x))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """In it, products on x's device keep the precision of what they multiply."""
    if x.device.type == "meta":  # which autocast does not know
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, if it is a linear layer; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def maybe_recomputed(recompute: bool, block: Callable[..., Any], *args: Any) -> Any:
    """block(*args); with `recompute`, what its backward pass needs is computed again there.

    The same numbers either way: dropout draws the same again.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
