"""Training a head of average velocities (equimini/mean_flow.py) on a frozen generator's flow."""

from typing import Any

import torch
from torch import Tensor

from equimini.generator import Generator
from equimini.mean_flow import mean_flow_errors
from equimini.training.generator_trainer import Draws, GeneratorTrainer, compiled
from equimini.utils import checkpoint
from equimini.utils.errors import UserError

NEW = ("head.span_mlp.", "head.scale_mlp.")  # what a flow head's weights lack


def distillation_errors(model: Generator, tokens: Tensor, labels: Tensor, u: Tensor, eps: Tensor,
                        more: Tensor, shift: int | Tensor, teacher: Generator,
                        guide: Generator | None, head_alone: bool) -> tuple[Tensor, Tensor]:
    """`mean_flow_errors` on tokens (B, N, C): the errors and t, (M, B, N).

    guide: gives the velocity without class, else the teacher does.  head_alone: the head reads the
    teacher's z, else that of its own transformer, with gradients.
    """
    def context(generator: Generator, drop: bool) -> Tensor:  # z (B, N, d)
        known = torch.zeros_like(labels) if drop else labels  # a guide may have fewer classes
        return generator.predict(tokens, known, torch.full_like(labels, drop).bool(), shift)

    def both(generator: Generator) -> Tensor:  # (2, B, N, d)
        return torch.stack([context(generator, drop) for drop in (False, True)])

    with torch.no_grad():
        z_teacher = both(teacher)
        without = (guide.head, context(guide, True)) if guide else (teacher.head, z_teacher[1])
    z = z_teacher if head_alone else both(model)
    return mean_flow_errors(model.head, ((teacher.head, z_teacher[0]), without), z, u, eps, more)


class MeanFlowTrainer(GeneratorTrainer):
    """A generator that learns to take in one step the way that its frozen teacher, the generator
    of --init-from, takes in many."""

    def __init__(self, teacher: Generator, guide: Generator | None, *parts: Any) -> None:
        """guide: see `distillation_errors`; parts: of `GeneratorTrainer`."""
        super().__init__(*parts)
        self.teacher, self.guide = teacher.eval().requires_grad_(False), guide
        self.compute = compiled(distillation_errors) if self.opts.compile else distillation_errors

    def errors(self, x: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The errors (M, B, N) on tokens (B, N, C), and their t."""
        with self.autocast():
            return self.errors_of(self.model, x, self.on_device(labels), draws)

    def errors_of(self, model: Generator, x: Tensor, labels: Tensor,
                  draws: Draws) -> tuple[Tensor, Tensor]:
        """The same of any weights."""
        if model.config.real_equivariant:
            x, labels, draws = self.crops(x, labels, draws)
        return self.compute(model, x, labels, draws.u, draws.eps[0], draws.more, draws.shift,
                            self.teacher, self.guide, self.opts.trained == "head")

    def held_out_errors(self, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """The errors of the EMA weights."""
        return self.errors_of(self.ema.model, x, labels, draws)[0]

    def more_state(self) -> dict:
        guide = {"guide": checkpoint.weights_hash(self.guide.state_dict())} if self.guide else {}
        return {**super().more_state(), "teacher": self.teacher.state_dict(), **guide}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`; raises UserError if the run had another guide."""
        super().load_state(state)
        checkpoint.load_weights(self.teacher, state["teacher"], "last.pt")
        mine = checkpoint.weights_hash(self.guide.state_dict()) if self.guide else None
        if state.get("guide") != mine:
            raise UserError("the run to resume was trained with another guide than --guide "
                            f"{self.opts.guide or '(none)'}")

    def start_from(self, state: dict) -> None:
        """The generator in `state` is the teacher, and the student's beginning."""
        new = {k: v for k, v in self.model.state_dict().items() if k.startswith(NEW)}
        super().start_from({**state, "ema": {**state["ema"], **new}})
        known = {k: v for k, v in self.model.state_dict().items() if k not in new}
        checkpoint.load_weights(self.teacher, known, "--init-from")
