"""The operators `equimini::window_attention` and its backward pass, for PyTorch.

Their default implementation, for any device, is the reference: plain PyTorch that attention.py
hands over.  A binary adds others to the same two operators (binary.py); autograd, torch.compile
and the FLOP counter see no difference.  Forward-mode and second derivatives are the reference's
everywhere.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula


class Reference(NamedTuple):
    """The plain computation of an operator, of its gradients and of its tangent."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    tangent: Callable[..., Tensor]


def fall_back_on(reference: Reference) -> None:
    """Give the operators their plain PyTorch."""
    global _reference
    _reference = reference


FORWARD, BACKWARD = "equimini::window_attention", "equimini::window_attention_backward"
_REST = "Tensor? cos, Tensor? sin, Tensor? seed, SymInt window, float dropout_p, float scale"
torch.library.define(FORWARD, f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)")
torch.library.define(BACKWARD, "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
                                     f"Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)")
_FORWARD = torch.ops.equimini.window_attention.default
_BACKWARD = torch.ops.equimini.window_attention_backward.default


@torch.library.impl(FORWARD, "CompositeExplicitAutograd")
def _(*args) -> tuple[Tensor, Tensor]:
    return _reference.forward(*args)


@torch.library.impl(BACKWARD, "CompositeExplicitAutograd")
def _(*args) -> tuple[Tensor, Tensor, Tensor]:
    return _reference.backward(*args)


@torch.library.register_fake(FORWARD)
def _(q, k, v, cos, sin, seed, window, dropout_p, scale):
    b, n_q, h, _ = q.shape
    return (torch.empty_like(q, memory_format=torch.contiguous_format),
            q.new_empty((b, h, n_q), dtype=torch.promote_types(q.dtype, torch.float32)))


@torch.library.register_fake(BACKWARD)
def _(grad, q, k, v, out, lse, cos, sin, seed, window, dropout_p, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


# Derivatives: Functions, since torch.library's own way (register_autograd) drops tangents.


class _Attention(torch.autograd.Function):
    """The operator with its gradient and its tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _FORWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, cos, sin, seed, *ctx.rest = inputs
        saved = q, k, v, *output, cos, sin, seed
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _grad_lse):
        none = (None,) * 6  # cos, sin, seed, window, dropout_p, scale
        if grad is None:
            return None, None, None, *none
        backward = _AttentionBackward.apply if _transforms() else _BACKWARD
        return *backward(grad, *ctx.saved_tensors, *ctx.rest), *none

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, v, _, _, cos, sin, seed = ctx.saved_tensors
        moves = (torch.zeros_like(x) if move is None else move
                 for x, move in zip((q, k, v), tangents))
        return _reference.tangent(q, k, v, *moves, cos, sin, seed, *ctx.rest), None


class _AttentionBackward(torch.autograd.Function):
    """The backward operator; its own derivatives are those of the reference, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return _BACKWARD(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.window, ctx.dropout_p, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def pullback(ctx):
        """The gradients, and what takes their gradients back to (grad, q, k, v)."""
        grad, q, k, v, out, lse, *rest = ctx.saved_tensors
        rest += ctx.window, ctx.dropout_p, ctx.scale
        return torch.func.vjp(lambda *x: _reference.backward(*x, out, lse, *rest), grad, q, k, v)

    @staticmethod
    def backward(ctx, *grads):
        return *_AttentionBackward.pullback(ctx)[1](grads), *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        results, pull = _AttentionBackward.pullback(ctx)
        return torch.func.vjp(pull, results)[1](tangents[:4])[0]  # pull is linear: its transpose


def _differentiable(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def call(*args):
        needed = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return function.apply(*args) if needed else function.forward(*args)
    return call


torch.library.impl(FORWARD, "Autograd")(_differentiable(_Attention))
torch.library.impl(BACKWARD, "Autograd")(_differentiable(_AttentionBackward))


def _transforms() -> str:
    """The transforms of torch.func that are under way, outermost first: "Grad Jvp Vmap", say."""
    return " ".join(x.key().name for x in torch._C._functorch.get_interpreter_stack() or ())


# torch.compile asks while it traces.  This is all that torch.compiler.assume_constant_result does,
# after importing all of the compiler, which takes a second or two.
_transforms._dynamo_marked_constant = True


def forward_mode() -> bool:
    """Whether tangents may be under way, by torch.func.jvp or torch.autograd.forward_ad."""
    return "Jvp" in _transforms() or forward_ad._current_level >= 0


def attend(*args) -> tuple[Tensor, Tensor]:
    """The operator, where the transforms under way can differentiate it; else the reference.

    They look into a Function, at one forward-mode level; torch.compile only into the operator.
    """
    transforms = _transforms()
    if torch.compiler.is_compiling() and transforms or transforms.count("Jvp") > 1:
        return _reference.forward(*args)
    return _Attention.apply(*args) if transforms else _FORWARD(*args)


def visible_pairs(n_q: int, n_k: int, window: int) -> int:
    """How many (query, key) pairs one head attends over: ones in window_mask."""
    return sum(min(window, n_k - n_q + i + 1) for i in range(n_q))


@register_flop_formula(torch.ops.equimini.window_attention)
def _(q, k, v, cos, sin, seed, window, *args, **kwargs) -> int:
    (b, n_q, h, d), n_k = q, k[1]
    return 2 * 2 * b * h * d * visible_pairs(n_q, n_k, window)  # q·k and p·v


@register_flop_formula(torch.ops.equimini.window_attention_backward)
def _(grad, q, k, v, out, lse, cos, sin, seed, window, *args, **kwargs) -> int:
    (b, n_q, h, d), n_k = q, k[1]
    return 5 * 2 * b * h * d * visible_pairs(n_q, n_k, window)  # q·k again, dV, dP, dQ, dK
