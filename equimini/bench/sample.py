"""Sampling: seconds per image and per column, against a literal implementation.

    python -m equimini.bench sample [--preset small --batch 1 8 64 --precision float32 bf16 --json]

Both run in this one process, in turns, on the same random weights and the same noise.  The
literal one is `equimini.sampler.sample_plainly`, the paper's; both guidance branches share a batch
in either.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from contextlib import ExitStack
from statistics import median
from typing import Any, Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

from equimini import sampler
from equimini.generator import Generator
from equimini.presets import PRESETS
from equimini.sampler import ColumnSampler, Guidance, Stream, sample_plainly
from equimini.sampling.cuda_graphs import GraphedStep, graphed
from equimini.sampling.nodes import NodeSampler
from equimini.sampling.packed_weights import PRECISIONS, packed
from equimini.utils.command_line import command, pick_device
from equimini.utils.errors import UserError
from equimini.utils.machine import machine


def random_generator(preset: str, device: torch.device) -> Generator:
    """A generator with random weights, also where training starts at zero: all work is real."""
    torch.manual_seed(0)
    config, shape = PRESETS[preset].generator, PRESETS[preset].tokenizer
    generator = Generator(config, 1000, shape.token_channels)
    for module in generator.head.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.xavier_uniform_(module.weight)
    return generator.eval().requires_grad_(False).to(device)


class Stopwatch:
    """Adds up the time spent inside some functions; a call within a call counts once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.running = device, 0.0, False

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, function: Callable) -> Callable:
        """The function, with its calls timed."""
        def watched(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running, start = True, self.now()
            result = function(*args, **kwargs)
            self.running, self.seconds = False, self.seconds + self.now() - start
            return result
        return watched


TRANSFORMER = ((Generator, "forward"), (Generator, "encode_classes"), (GraphedStep, "__call__"))


def timed(draw: Callable[[], Tensor], device: torch.device) -> tuple[float, float, Tensor]:
    """Seconds of one run, seconds of it in the transformer, and what was drawn."""
    inside, total = Stopwatch(device), Stopwatch(device)
    with ExitStack() as patches:
        for owner, name in TRANSFORMER:
            patches.enter_context(patch.object(owner, name, inside.watch(getattr(owner, name))))
        x = total.watch(draw)()
    return total.seconds, inside.seconds, x


def contestants(generator: Generator, options: argparse.Namespace, labels: Tensor,
                seeds: list[int]) -> dict[str, Callable[[int, int], Tensor]]:
    """By name, functions of (columns, steps) that draw the batch."""
    def fast(ready: Generator, nodes: int = 0, **flow: Any) -> Callable[[int, int], Tensor]:
        def sampler_of(steps: int) -> ColumnSampler:
            if nodes:
                return NodeSampler(ready.head, nodes, steps)
            return ColumnSampler(ready.head, **{"steps": steps, **flow})
        recorded = functools.cache(lambda steps: graphed(sampler_of(steps), None, ready))

        def draw(columns: int, steps: int) -> Tensor:
            sampler, step = (recorded(steps) if options.cuda_graphs else (sampler_of(steps), None))
            stream = Stream(ready, labels, seeds, sampler, Guidance(options.cfg, "linear", columns),
                            step=step)
            return torch.stack([stream.draw() for _ in range(columns)], 1)
        return draw

    runs: dict[str, Callable[[int, int], Tensor]] = {}
    if not options.no_literal:
        runs["literal"] = lambda columns, steps: sample_plainly(generator, labels, columns, seeds,
                                                                options.cfg, "linear", steps)
    if options.plain:
        runs["plain"] = fast(generator)
    ways: dict[str, dict[str, Any]] = {"": {}}
    ways |= {f", {n} nodes": {"nodes": n} for n in options.nodes}
    ways |= {f", midpoint {n}": {"solver": "midpoint", "steps": n} for n in options.midpoint}
    for name in options.precision:
        ready = packed(generator, name)
        runs |= {name + way: fast(ready, **flow) for way, flow in ways.items()}
    return runs


def batch_rows(generator: Generator, options: argparse.Namespace, batch: int,
               device: torch.device) -> list[dict]:
    """One row (a dict) per contestant for one batch size."""
    labels, seeds = torch.arange(batch) % generator.num_classes, list(range(batch))
    runs = contestants(generator, options, labels, seeds)
    for draw in runs.values():  # warm-up; on a GPU in full, as graphs are recorded then
        draw(*(2, 2) if device.type != "cuda" else (options.columns, options.steps))
    results: dict[str, list] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, draw in runs.items():
            results[name].append(timed(lambda: draw(options.columns, options.steps), device))
    rows = []
    for name, measured in results.items():
        seconds, transformer = (median(m[k] for m in measured) for k in (0, 1))
        row = {"batch": batch, "method": name, "s_per_image": seconds / batch,
               "s_per_column": seconds / options.columns,
               "head_s_per_column": (seconds - transformer) / options.columns,
               "transformer_s_per_column": transformer / options.columns}
        if name != "literal" and not options.no_literal:
            x, truth = measured[0][2], results["literal"][0][2]
            row |= {"times_faster": rows[0]["s_per_image"] / row["s_per_image"],
                    "rms_deviation": ((x - truth).square().mean().sqrt()
                                      / truth.square().mean().sqrt()).item(),
                    "max_deviation": (x - truth).abs().max().item()}
        rows.append(row)
    return rows


def line(row: dict) -> str:
    """A row as a line of the table."""
    text = (f"{row['batch']:5} {row['method']:>20} {row['s_per_image']:9.3f} "
            f"{row['s_per_column']:9.4f} {row['head_s_per_column']:9.4f} "
            f"{row['transformer_s_per_column']:11.4f}")
    if "times_faster" in row:
        text += (f" {row['times_faster']:7.2f}x {row['rms_deviation']:13.1e} "
                 f"{row['max_deviation']:10.1e}")
    return text


def print_table(options: argparse.Namespace) -> None:
    """Print the table, or lines of JSON: what is measured, then a line per contestant."""
    device, sampler.PRODUCT_ROWS = pick_device(options.device), options.product_rows
    if options.cuda_graphs and device.type != "cuda":
        raise UserError(f"--cuda-graphs needs a CUDA device, got {device}")
    generator = random_generator(options.preset, device)
    columns = options.columns = options.columns or PRESETS[options.preset].tokenizer.columns
    about = (f"preset {options.preset}, random weights, {columns} columns, {options.steps} Euler "
             f"steps, cfg {options.cfg:g}, {options.repeats} run(s) of each in turns")
    if options.json:
        print(json.dumps({"machine": machine(device.type), "what": about}), flush=True)
    else:
        print(f"# {machine(device.type)}\n# {about}\nbatch               method   s/image  s/column "
              "     head  transformer   faster  deviation rms        max   (head, transformer: "
              "s/column)")
    for batch in options.batch:
        for row in batch_rows(generator, options, batch, device):
            print(json.dumps(row) if options.json else line(row), flush=True)
    if not options.json and not options.no_literal:
        print("# deviation from the literal tokens: rms over their rms, and largest (tokens of "
              "unit scale)")


def main(argv: list[str]) -> None:
    parser = command("equimini.bench sample", __doc__)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="small", help="sizes of the generator [small]")
    add("--batch", type=positive, nargs="+", default=[1, 8, 64], help="images at a time [1 8 64]")
    add("--columns", type=positive, help="length of the images [a square's]")
    add("--steps", type=positive, default=100, help="Euler steps per column [100]")
    add("--nodes", type=positive, nargs="*", default=[], help="also the fast path with so many "
        "nodes, see sample.py [none]")
    add("--midpoint", type=positive, nargs="*", default=[], help="also the fast path with so many "
        "midpoint steps a column [none]")
    add("--cfg", type=float, default=2.0, help="guidance scale; 1: no second branch in the fast "
        "path, which the literal one always runs [2]")
    add("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS),
        help="of the fast path; the literal one is float32 [both]")
    add("--repeats", type=positive, default=1, help="runs of each, in turns; medians are shown [1]")
    add("--plain", action="store_true", help="also the float32 fast path over the weights as they "
        "lie, without equimini.inference")
    add("--product-rows", type=positive, default=sampler.PRODUCT_ROWS, help="steps times images of "
        f"one matrix product for the head's modulations [{sampler.PRODUCT_ROWS}]")
    add("--no-literal", action="store_true", help="leave the slow one out")
    add("--cuda-graphs", action="store_true", help="replay recorded kernels (CUDA)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps [auto]")
    add("--json", action="store_true", help="print lines of JSON as they come")
    print_table(parser.parse_args(argv))


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
