"""Precision, compilation and optimizer of a training.

None of it changes what is computed, but for rounding (and, with --compile, for which activations
dropout draws).
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn

from equimini.flow_head import HeadBlock
from equimini.generator import MLP, Block
from equimini.utils.errors import UserError, first_line

PRECISIONS = ("float32", "tf32", "bf16")
PARTS = (Block, MLP, HeadBlock)  # what is compiled; the class tokens' way calls MLP by itself


def set_float32(precision: str, device: torch.device) -> None:
    """What float32 products mean on CUDA: tf32 (10 bits of mantissa) or all their bits.

    A setting of the whole process.  Raises UserError for tf32 on another device.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        raise UserError(f"--precision tf32 is arithmetic of CUDA devices, got --device {device}; "
                        "give float32 or bf16")


def compiled(loss: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`loss`, with the blocks of the models among its arguments compiled at its first call.

    Block by block: all of a kind are one program, so depth costs no time to compile.
    """
    def call(*args: Any) -> Any:
        for model in args:
            for part in model.modules() if isinstance(model, nn.Module) else ():
                if isinstance(part, PARTS) and part._compiled_call_impl is None:
                    part.compile(backend=backend, fullgraph=True, dynamic=False)
        try:
            return loss(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"--compile does not work here ({first_line(error)}); on a CPU it "
                            "needs a C++ compiler, on a GPU triton; leave it out") from error

    return call


def adamw(groups: list[dict], lr: float, fused: bool) -> torch.optim.AdamW:
    """The generator's optimizer; fused: each weight read and written once per step."""
    try:
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused or None)
    except RuntimeError as error:
        raise UserError(f"--fused-optimizer does not work here ({first_line(error)}); give "
                        "--no-fused-optimizer") from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, but keep this one's own implementation (fused or not).

    Raises ValueError, KeyError or TypeError for a state that does not fit.
    """
    own = ("fused", "foreach")
    groups = [{**theirs, **{k: mine[k] for k in own}}
              for mine, theirs in zip(optimizer.param_groups, state["param_groups"])]
    optimizer.load_state_dict({**state, "param_groups": groups})
    if any(type(group[k]) is not type(optimizer.defaults[k]) for group in groups
           for k in ("betas", "eps", "weight_decay")):
        raise ValueError("the optimizer's settings are of other kinds")
    for p, kept in optimizer.state.items():  # torch looks at neither until the next step
        if kept.keys() != {"step", "exp_avg", "exp_avg_sq"} or any(
                x.shape != (p.shape if name != "step" else ()) for name, x in kept.items()):
            raise ValueError("the optimizer's state does not fit the weights")
