"""Many random cases of the attention kernels: C++ for each dtype, CUDA's families emulated.

    python -m tests.soak.kernels --cases 10000 --emulated 3000      # continues in soak/kernels.json

Every case is compared with a dense float64 computation and run twice, as in
tests/kernel/attention_cases.py; the first that fails ends the command with its seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from equimini.attention import implementation
from tests.soak.common import ROOT, Progress, figures

sys.path.insert(0, str(ROOT / "tests" / "kernel"))  # whose files import each other by bare names
import test_cuda_on_cpu as emulated  # noqa: E402
import test_window_attention as compiled  # noqa: E402
from attention_cases import draw_case  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="for each dtype, in C++ [10000]")
    parser.add_argument("--emulated", type=int, default=3_000, help="for each CUDA family [3000]")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these [never]")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="counts are kept here")
    args = parser.parse_args()
    if implementation("cpu") == "reference":
        raise SystemExit("there are no compiled kernels; install equimini with a C++ compiler")
    torch.set_num_threads(1)
    done, begun = Progress(args.out / "kernels.json"), time.time()
    with tempfile.TemporaryDirectory() as build:
        kernels = emulated.EmulatedKernels(Path(build)) if args.emulated else None
        jobs = {str(dtype).removeprefix("torch."): (args.cases, lambda n, dtype=dtype: compiled.run(
            draw_case(random.Random(n), (dtype,), 257), "cpu")) for dtype in compiled.ALL}
        jobs |= {path: (args.emulated, lambda n, path=path: emulate(kernels, path, n))
                 for path in emulated.PATHS[1:]}
        while time.time() - begun < args.seconds:
            left = {name: job for name, job in jobs.items() if done[name] < job[0]}
            for name, (_, run) in left.items():  # in turn, so that a short run sees all of them
                run(done[name])
                done.add(name)
            if not left:
                break
    done.save()
    figures("kernels, cases without a fault", begun, **{n: done[n] for n in jobs if done[n]})


def emulate(kernels: emulated.EmulatedKernels, path: str, number: int) -> None:
    kernels.path = path
    kernels.library.set_schedule(number)
    emulated.run(emulated.small_case(number, path), kernels)


if __name__ == "__main__":
    main()
