"""How columns are drawn: one value that goes from any command line to the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from equimini.config import Checked, flag
from equimini.sampler import (SCHEDULES, SOLVERS, ColumnSampler, VelocityHead, evaluation_times,
                              time_grid)
from equimini.sampling.packed_weights import PRECISIONS

POSITIONS = ("hold", "grow")


@dataclass(frozen=True)
class SamplingOptions(Checked):
    """Guidance, positions, solver and arithmetic; all of it can be recorded with a picture."""

    cfg: float = flag(2.0, "guidance scale; 1: none", min=0)
    cfg_schedule: str = flag("auto", "guidance from 1 up to --cfg (linear, the paper's), or --cfg "
                             "throughout; auto: linear for pictures up to the length of the "
                             "training pictures, constant for longer ones",
                             choices=("auto", *SCHEDULES))
    guidance_columns: int = flag(0, "columns over which linear guidance rises; 0: the picture's, "
                                 "at most the training pictures'", min=0)
    positions: str = flag("hold", "positions that cross-attention sees: none beyond the training "
                          "pictures' last, or the true ones", choices=POSITIONS)
    steps: int = flag(100, "steps of the solver per column", min=1)
    solver: str = flag("euler", "how a column follows the head's flow: euler asks the head once "
                       "a step, midpoint and heun (second order) twice", choices=tuple(SOLVERS))
    time_shift: float = flag(1.0, "above 1: smaller steps near the noise, below 1: near the "
                             "token; 1: equal steps", min=1e-3)
    temperature: float = flag(1.0, "factor on the noise that columns start from; above 1: more "
                              "detail and variety, below 1: smoother", min=0)
    precision: str = flag("float32", "arithmetic of the generator's matrix products; bf16 is "
                          "faster and deviates slightly", choices=tuple(PRECISIONS))
    cuda_graphs: str = flag("off", "on: replay recorded kernels, which is faster for few "
                            "pictures at a time; needs CUDA", choices=("off", "on"))

    def column_sampler(self, head: VelocityHead) -> ColumnSampler:
        """What draws a column with this solver."""
        return ColumnSampler(head, self.steps, self.solver, self.time_shift, self.temperature)

    @property
    def evaluations(self) -> int:
        """How often the head is asked per column and branch."""
        return len(evaluation_times(self.solver, time_grid(self.steps, self.time_shift)))
