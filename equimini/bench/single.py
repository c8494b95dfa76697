"""One picture at a time on a CPU, against another tree of equimini, in turns.

    python -m equimini.bench single --against ../equimini-before [--mean-flow FILE --busy 2]

Every measurement of either tree is made in a process of its own; shown are medians of processor
time and of elapsed time, and how many times less the tree here takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from equimini.bench.sample import positive
from equimini.utils.checkpoint import BOX
from equimini.utils.command_line import command
from equimini.utils.machine import machine

ROOT = Path(__file__).parents[2]
# Runs in any tree from the first release on: prints {name: [seconds elapsed, of the processor]}.
WORK = """
import json, sys, time
results, clocks = {}, lambda: (time.perf_counter(), time.process_time())
def measure(name, work, calls=1):
    start = clocks()
    for _ in range(calls):
        made = work()
    results[name] = [(b - a) / calls for a, b in zip(start, clocks())]
    return made
torch = measure("import torch", lambda: __import__("torch"))
box, quick, squares = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
def load():
    from equimini import load_generator
    return load_generator(box)
model = measure("import equimini, load the box", load)
draw = lambda n, columns: model.sample(["sea"] * n, columns, cfg=2.5, **quick)
draw(1, 8)
decode = model.decode
def decoded(tokens):  # within `sample`, whose arguments both trees share
    return measure("of it, decoding", lambda: decode(tokens))
model.decode = decoded
measure("a picture of 128 columns", lambda: draw(1, 128))
model.decode = decode
if squares:
    measure(f"{squares} squares", lambda: draw(squares, model.columns))
try:
    from equimini.sampling.packed_weights import packed
except ImportError:
    from equimini.inference import prepared as packed
with torch.no_grad():
    ready, t = packed(model.generator), torch.rand(1)
    x = torch.randn(1, 1, model.generator.channels)
    context, cache = ready.encode_classes(torch.tensor([0])), []
    step = lambda: ready(x, context, 20, cache)
    for _ in range(5):
        z = step()
    measure("a token through the transformer", step, 200)
    head = lambda: ready.head(x[0], t, z[0])
    head()
    measure("the head once, with modulations", head, 200)
print(json.dumps(results))
"""


def seconds(tree: Path, weights: str, quick: dict, squares: int) -> dict[str, list[float]]:
    """What WORK measures in one process."""
    done = subprocess.run([sys.executable, "-c", WORK, Path(weights).resolve(), json.dumps(quick),
                           str(squares)], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tree)})
    if done.returncode:
        raise SystemExit(f"{tree} does not run: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def first_look(tree: Path) -> list[float]:
    """`python sample.py`, from the shell to both files."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        subprocess.run([sys.executable, tree / "sample.py"], cwd=folder, check=True,
                       env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True)
        after = os.times()
    processor = sum(after[2:4]) - sum(before[2:4])  # of children
    return [after.elapsed - before.elapsed, processor]


def main(argv: list[str]) -> None:
    parser = command("equimini.bench single", __doc__)
    add = parser.add_argument
    add("--against", type=Path, required=True, help="folder of the other tree, built")
    add("--box", default=str(BOX / "scenes.pt"), help="weights that both draw with [the box's]")
    add("--mean-flow", default="",
        help="weights with a head of one evaluation, for this tree alone")
    add("--squares", type=int, default=64, help="squares drawn at once; 0: none [64]")
    add("--busy", type=int, default=0, help="processes that keep processors busy meanwhile [0]")
    add("--repeats", type=positive, default=5, help="processes of each, in turns [5]")
    add("--first-look", action="store_true", help="also `python sample.py` from the shell")
    args = parser.parse_args(argv)
    twenty = {"solver": "midpoint", "steps": 10}
    runs = {"before": (args.against, args.box, twenty), "now": (ROOT, args.box, twenty)}
    if args.mean_flow:
        runs["one evaluation"] = ROOT, args.mean_flow, {}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    found: dict[str, dict[str, list]] = {name: {} for name in runs}
    try:
        for _ in range(args.repeats):
            for name, (tree, weights, quick) in runs.items():
                measured = seconds(tree.resolve(), weights, quick, args.squares)
                if args.first_look and name != "one evaluation":
                    measured["python sample.py"] = first_look(tree.resolve())
                for what, value in measured.items():
                    found[name].setdefault(what, []).append(value)
    finally:
        for process in busy:
            process.kill()
    print(f"# {machine('cpu')}\n# 20 evaluations (10 midpoint steps) or one, cfg 2.5; medians of "
          f"{args.repeats} processes in turns, {args.busy} busy processes beside them\n"
          f"# {'':36} seconds of the processor (elapsed), times less")
    for what, before in found["before"].items():
        cells, was = [], median(v[1] for v in before)
        for name in runs:
            elapsed, processor = map(median, zip(*found[name].get(what, before)))
            cells.append(f"{name} {processor:.4g} ({elapsed:.4g})"
                         + (f" {was / processor:.2f}x" if name != "before" else ""))
        print(f"{what:36} " + "  ".join(cells), flush=True)
