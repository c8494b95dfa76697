"""Every kind of derivative of window_attention is that of the plain formula, in float64.

Rotation and dropout included.  The formula is torch's own softmax over a masked matrix, which
torch differentiates in every mode.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from equimini.attention import keep_mask, window_attention
from tests.kernel.attention_cases import Case, dense, draw_inputs

CASE = Case(2, 4, 6, 2, 8, 3, torch.float64, dropout_p=0.3)
Q, K, V, GRAD, ROPE, SEED, SCALE = draw_inputs(CASE)
AT = Q, K, V = tuple(x.contiguous() for x in (Q, K, V))  # compiled jvp's own: layouts must be plain
MOVES = tuple(torch.randn_like(x) for x in AT)
ALL = (0, 1, 2)
same = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def attention(q, k, v):
    return window_attention(q, k, v, CASE.window, rope=ROPE, dropout_p=CASE.dropout_p, seed=SEED)


def formula(q, k, v):
    keep = keep_mask(SEED, (CASE.b, CASE.h, CASE.n_q, CASE.n_k), CASE.dropout_p).double()
    return dense(q, k, v, ROPE, keep / (1 - CASE.dropout_p), CASE.window, SCALE)[0]


def squares(f):
    return lambda *x: sum(y.square().sum() for y in tree_leaves(f(*x)))


def dual(f, *at):
    """The tangents of f, by torch.autograd.forward_ad."""
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, at, MOVES))
        return [forward_ad.unpack_dual(x)[1] for x in tree_leaves(out)]


def backward(f, *at, create_graph=False):
    return torch.autograd.grad(squares(f)(*at), at, create_graph=create_graph)


def twice(f, *at):
    return backward(lambda *x: backward(f, *x, create_graph=True), *at)


def leaves():
    return [x.clone().requires_grad_() for x in AT]


DERIVATIVES = {
    "jvp": lambda f: jvp(f, AT, MOVES),
    "jvp of one": lambda f: jvp(lambda k: f(Q, k, V), (K,), (MOVES[1],)),
    "dual numbers": lambda f: dual(f, *AT),
    "grad": lambda f: grad(squares(f), ALL)(*AT),
    "vjp": lambda f: vjp(f, *AT)[1](GRAD),
    "jacrev": lambda f: jacrev(squares(f), ALL)(*AT),
    "jacfwd": lambda f: jacfwd(squares(f), ALL)(*AT),
    "backward": lambda f: backward(f, *leaves()),
    "backward, recomputed": lambda f: backward(
        lambda *x: checkpoint(f, *x, use_reentrant=False), *leaves()),
    "vmap of grad": lambda f: vmap(grad(squares(f), ALL))(*(torch.stack((x, -x)) for x in AT)),
    "vmap of jvp": lambda f: vmap(lambda *x: jvp(f, x, MOVES))(*(torch.stack((x, -x)) for x in AT)),
    # second derivatives
    "backward twice": lambda f: twice(f, *leaves()),
    "backward three times": lambda f: twice(
        lambda *x: backward(f, *x, create_graph=True), *leaves()),
    "backward of jvp": lambda f: backward(lambda *x: jvp(f, x, MOVES), *leaves()),
    "dual numbers of backward": lambda f: dual(
        lambda *x: backward(f, *x, create_graph=True), *leaves()),
    "grad of grad": lambda f: grad(squares(grad(squares(f), ALL)), ALL)(*AT),
    "jvp of grad": lambda f: jvp(grad(squares(f), ALL), AT, MOVES),
    "grad of jvp": lambda f: grad(squares(lambda *x: jvp(f, x, MOVES)), ALL)(*AT),
    "jvp of jvp": lambda f: jvp(lambda *x: jvp(f, x, MOVES), AT, MOVES),
    "hessian": lambda f: hessian(lambda q: squares(f)(q, K, V))(Q),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str):
    same(tree_leaves(DERIVATIVES[name](attention)), tree_leaves(DERIVATIVES[name](formula)))


@pytest.mark.parametrize("name", ["jvp", "grad", "grad of grad", "backward"])
def test_derivatives_in_a_compiled_function(name: str):
    torch._dynamo.reset()
    whole, compiler = DERIVATIVES[name], dict(fullgraph=True, backend="aot_eager")
    compiled = (whole(torch.compile(attention, **compiler)) if name == "backward" else
                torch.compile(lambda: whole(attention), **compiler)())
    same(tree_leaves(compiled), tree_leaves(whole(formula)))


def test_backward_of_a_compiled_jvp():
    def tangents(f):
        return lambda *x: jvp(f, x, MOVES)
    compiled = torch.compile(tangents(attention), fullgraph=True, backend="aot_eager")
    same(backward(compiled, *leaves()), backward(tangents(formula), *leaves()))


@pytest.mark.skipif(torch.__version__ >= "2.15", reason="torch.compile refuses them, in words")
def test_dual_numbers_pass_a_compiled_function():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    same(dual(compiled, *AT), dual(formula, *AT))


def test_tangents_sum_in_float32_under_autocast():
    at, moves = ([x.bfloat16() for x in y] for y in (AT, MOVES))
    plain = jvp(attention, tuple(at), tuple(moves))
    with torch.autocast("cpu", torch.bfloat16):
        cast = jvp(attention, tuple(at), tuple(moves))
    assert all(map(torch.equal, plain, cast)) and plain[1].dtype == torch.bfloat16


def test_tables_take_no_gradient():
    tables = [x.clone().requires_grad_() for x in ROPE]
    with pytest.raises(ValueError, match="cos.*gradient"):
        window_attention(Q, K, V, 3, rope=tables)


class Velocity(torch.nn.Module):
    """The whole generator, columns before to the velocity of each: what weights can be given to."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, noisy, t):
        z = self.model.predict(tokens, torch.tensor([0, 2]))
        return self.model.head(noisy, t, z)


@pytest.mark.parametrize("dropout", (0.0, 0.2))
def test_the_model_moves_as_finite_differences_say(no_dropout, dropout: float):
    """In float64, tokens, noise, time and every weight at once."""
    model = Velocity(no_dropout.double().train())
    for block in model.model.blocks:
        block.attn.dropout = dropout
    at = (dict(model.named_parameters()), torch.randn(2, 7, 6, dtype=torch.float64),
          torch.randn(2, 7, 6, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64))
    moves = tree_map(lambda x: torch.randn_like(x) / 10, at)

    def velocity(weights, *args):
        torch.manual_seed(0)  # of dropout
        return functional_call(model, weights, args)

    def moved(step: float):
        return velocity(*tree_map(lambda x, move: x + step * move, at, moves))

    with torch.no_grad():
        differences = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(jvp(velocity, at, moves)[1], differences, rtol=1e-6, atol=1e-8)
