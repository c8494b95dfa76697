"""Training a head of average velocities (equimini/mean_flow.py) on a frozen generator's flow."""

from typing import Any

import torch
from torch import Tensor

from equimini.generator import Generator
from equimini.mean_flow import mean_flow_errors
from equimini.training.generator_trainer import Draws, GeneratorTrainer, compiled
from equimini.utils import checkpoint

NEW = ("head.span_mlp.", "head.scale_mlp.")  # what a flow head's weights lack


def distillation_errors(model: Generator, tokens: Tensor, labels: Tensor, u: Tensor, eps: Tensor,
                        more: Tensor, shift: int | Tensor, teacher: Generator,
                        head_alone: bool) -> tuple[Tensor, Tensor]:
    """`mean_flow_errors` on tokens (B, N, C): the errors and t, (M, B, N).

    head_alone: the head reads the teacher's z, else that of its own transformer, with gradients.
    """
    def branches(generator: Generator) -> Tensor:  # z with the class and without, (2, B, N, d)
        return torch.stack([generator.predict(tokens, labels, torch.full_like(labels, drop).bool(),
                                              shift) for drop in (0, 1)])
    with torch.no_grad():
        z_teacher = branches(teacher)
    z = z_teacher if head_alone else branches(model)
    return mean_flow_errors(model.head, teacher.head, z, z_teacher, u, eps, more)


class MeanFlowTrainer(GeneratorTrainer):
    """A generator that learns to take in one step the way that its frozen teacher, the generator
    of --init-from, takes in many."""

    def __init__(self, teacher: Generator, *parts: Any) -> None:
        """parts: of `GeneratorTrainer`."""
        super().__init__(*parts)
        self.teacher = teacher.eval().requires_grad_(False)
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
                            self.teacher, self.opts.trained == "head")

    def held_out_errors(self, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """The errors of the EMA weights."""
        return self.errors_of(self.ema.model, x, labels, draws)[0]

    def more_state(self) -> dict:
        return {**super().more_state(), "teacher": self.teacher.state_dict()}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        checkpoint.load_weights(self.teacher, state["teacher"], "last.pt")

    def start_from(self, state: dict) -> None:
        """The generator in `state` is the teacher, and the student's beginning."""
        new = {k: v for k, v in self.model.state_dict().items() if k.startswith(NEW)}
        super().start_from({**state, "ema": {**state["ema"], **new}})
        known = {k: v for k, v in self.model.state_dict().items() if k not in new}
        checkpoint.load_weights(self.teacher, known, "--init-from")
