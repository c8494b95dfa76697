"""How columns are drawn: one value that goes from any command line to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

from equimini.config import Checked, flag
from equimini.sampler import (SCHEDULES, SOLVERS, ColumnSampler, VelocityHead, evaluation_times,
                              time_grid)
from equimini.sampling.nodes import NodeSampler
from equimini.sampling.packed_weights import PRECISIONS
from equimini.utils.errors import UserError

POSITIONS = ("hold", "grow")


@dataclass(frozen=True)
class SamplingOptions(Checked):
    """Guidance, positions, solver and arithmetic; all of it can be recorded with a picture."""

    cfg: float = flag(2.0, "guidance scale; 1: none (sample.py draws long pictures by the model in "
                      "the box with 1.5)", min=0)
    cfg_schedule: str = flag("auto", "guidance from 1 up to --cfg (linear, the paper's), or --cfg "
                             "throughout; auto: linear for pictures up to the length of the "
                             "training pictures, constant for longer ones",
                             choices=("auto", *SCHEDULES))
    guide: str = flag("", "checkpoint of a worse generator of the same tokens, such as an earlier "
                      "one of the same training: guidance leads away from what it draws without a "
                      "class, in place of what the generator itself draws so; empty: itself")
    guidance_columns: int = flag(0, "columns over which linear guidance rises; 0: the picture's, "
                                 "at most the training pictures'", min=0)
    positions: str = flag("hold", "positions that cross-attention sees: none beyond the training "
                          "pictures' last, or the true ones", choices=POSITIONS)
    steps: int = flag(0, "steps of the solver per column; 0: 1 for mean-flow, else the paper's "
                      "100", min=0)
    solver: str = flag("auto", "how a column follows the head's flow: euler asks the head once "
                       "a step, midpoint and heun (second order) twice, mean-flow once, a head that "
                       "was trained for it; auto: mean-flow for such a head, else euler",
                       choices=("auto", *SOLVERS))
    time_shift: float = flag(1.0, "above 1: smaller steps near the noise, below 1: near the "
                             "token; 1: equal steps", min=1e-3)
    temperature: float = flag(1.0, "factor on the noise that columns start from; above 1: more "
                              "detail and variety, below 1: smoother", min=0)
    nodes: int = flag(0, "above 0: where a column takes more evaluations than so many, what the "
                      "head makes of time is computed at so many Chebyshev nodes, and interpolated; "
                      "16 deviate less than bf16 does; not with solver mean-flow", min=0)
    precision: str = flag("float32", "arithmetic of the generator's matrix products; bf16 is "
                          "faster and deviates slightly", choices=tuple(PRECISIONS))
    cuda_graphs: str = flag("off", "on: replay recorded kernels, which is faster for few "
                            "pictures at a time; needs CUDA", choices=("off", "on"))

    def resolved(self, head: VelocityHead) -> SamplingOptions:
        """The same with solver and steps for this head where they were left open.

        Raises UserError for a solver or a guidance scale that the head was not trained for.
        """
        solver = self.solver
        if solver == "auto":
            solver = "mean-flow" if head.scales else "euler"
        if SOLVERS[solver].average and not head.scales:
            raise UserError("--solver mean-flow needs a head of average velocities, which "
                            "train_generator.py --objective mean-flow trains; this one has "
                            "velocities: give euler, midpoint or heun")
        if self.guide and head.scales:
            raise UserError("--guide is for generators that follow velocities; this one's guidance "
                            "is what its head was trained with (train_generator.py --guide); give "
                            "--guide '' for a token file that was drawn with one")
        if SOLVERS[solver].average and self.nodes:
            raise UserError("--nodes is for solvers that follow velocities; give it with --solver "
                            "euler, midpoint or heun")
        if head.scales and not head.scales[0] <= self.cfg <= head.scales[1]:
            raise UserError("--cfg must be {:g} to {:g}, for which this generator's head was "
                            "trained, got {:g}".format(*head.scales, self.cfg))
        return replace(self, solver=solver, steps=self.steps or (
            1 if SOLVERS[solver].average else 100))

    def column_sampler(self, head: VelocityHead) -> ColumnSampler:
        """What draws a column with this solver."""
        flow = self.steps, self.solver, self.time_shift, self.temperature
        if 0 < self.nodes < self.evaluations:
            return NodeSampler(head, self.nodes, *flow)
        return ColumnSampler(head, *flow)

    @property
    def evaluations(self) -> int:
        """How often the head is asked per column and branch."""
        return len(evaluation_times(self.solver, time_grid(self.steps, self.time_shift)))
