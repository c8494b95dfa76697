"""The CUDA kernels themselves, compiled by g++ and run on the CPU (see cuda_on_cpu/).

    python tests/kernel/test_cuda_on_cpu.py --cases 500 [--sanitize]   # many cases, by hand
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Iterator

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from attention_cases import Case, check_reach, draw_case, draw_inputs, run_case  # noqa: E402
from emulation import (CSRC, DTYPES, PATHS, SANITIZE, EmulatedKernels,  # noqa: E402
                       begin_under_sanitizers, sanitizers)

from equimini.attention import window_mask  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

# Several blocks of keys in shared memory, tiles that end in the middle, D of every bucket, one of
# them not full (72); for narrow windows sequences of one, two and three stretches, groups beyond
# the last head.
CHOSEN = {
    "registers": [Case(2, 16, 16, 3, 64, 4, torch.bfloat16, dropout_p=0.1),
               Case(1, 130, 130, 2, 64, 4, torch.float32, dropout_p=0.1),
               Case(1, 66, 70, 3, 80, 3, torch.float16),
               Case(2, 1, 4, 3, 128, 4, torch.float32)],
    "shared memory": [Case(1, 16, 16, 3, 64, 4, torch.bfloat16, dropout_p=0.1),
                   Case(1, 70, 70, 1, 64, 45, torch.float32),
                   Case(1, 21, 45, 2, 80, 30, torch.float16),
                   Case(2, 1, 9, 3, 128, 8, torch.float32)],
    "tensor cores": [Case(1, 140, 140, 1, 64, 40, torch.bfloat16),
                     Case(1, 30, 100, 1, 72, 20, torch.float16, dropout_p=0.2),
                     Case(1, 66, 66, 2, 128, 100, torch.bfloat16)],
}


def small_case(seed: int, path: str) -> Case:
    dtypes = DTYPES[1:] if path == "tensor cores" else DTYPES
    case = draw_case(random.Random(seed), dtypes, 140 if path == "registers" else 40)
    case.b, case.h = min(case.b, 2), min(case.h, 2)
    if path == "registers":
        case.window = min(case.window, 4)
    return case


def run(case: Case, kernels: EmulatedKernels) -> None:
    run_case(case, kernels.forward, kernels.backward,
             rounds_rotated=kernels.path == "tensor cores")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Iterator[EmulatedKernels]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield EmulatedKernels(tmp_path_factory.mktemp("cuda_on_cpu"))
    torch.set_num_threads(threads)  # later tests compare bits with processes of their own


@pytest.mark.parametrize("path,case", [(path, case) for path in CHOSEN for case in CHOSEN[path]],
                         ids=str)
def test_chosen(kernels: EmulatedKernels, path: str, case: Case):
    kernels.path = path
    run(case, kernels)


@pytest.mark.parametrize("path,window", [("registers", 3), ("shared memory", 9),
                                         ("tensor cores", 18), ("tensor cores", 34)])
def test_each_query_meets_its_window(kernels: EmulatedKernels, path: str, window: int):
    """With equal weights of one-hot rows a lost key shows, which 16 bits may hide among others.

    18, 34: a query meets one key alone of a group of 16.
    """
    kernels.path = path
    none = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16)
    one_hot = torch.eye(64, dtype=torch.bfloat16)[None, :, None]
    rest = (None, None, None, window, 0.0, 1.0)
    out, lse = kernels.forward(none, none, one_hot, *rest)
    _, _, dv = kernels.backward(one_hot, none, none, one_hot, out, lse, *rest)
    seen = window_mask(64, 64, window).float()
    weights = seen / seen.sum(-1, keepdim=True)
    for x, y in ((out, weights), (dv, weights.T)):
        torch.testing.assert_close(x[0, :, 0].float(), y, rtol=2**-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("path", PATHS[1:])
def test_random(kernels: EmulatedKernels, path: str, seed: int):
    kernels.path = path
    kernels.library.set_schedule(seed)
    run(small_case(seed, path), kernels)


@pytest.mark.slow
def test_long_stretches(tmp_path: Path):
    """Sequences this few are cut into short stretches; here as where they are many."""
    kernels = EmulatedKernels(tmp_path, "registers", flags=("-O1", "-DEQUIMINI_FEW_GROUPS=0"))
    for case in CHOSEN["registers"]:
        run(case, kernels)
    for seed in range(12):
        kernels.library.set_schedule(seed)
        run(small_case(seed, "registers"), kernels)


@pytest.mark.slow
@pytest.mark.parametrize("path,window", [("registers", 4), ("shared memory", 5),
                                         ("shared memory", 15), ("tensor cores", 20)])
def test_nan_goes_no_further_than_a_tile(kernels: EmulatedKernels, path: str, window: int):
    kernels.path = path
    check_reach(kernels.forward, kernels.backward, window, torch.bfloat16)


@pytest.mark.parametrize("window,dtype,paths", [
    (4, torch.bfloat16, ["registers"]), (4, torch.float32, ["registers"]),
    (5, torch.bfloat16, ["registers", "shared memory"]),
    (15, torch.float16, ["registers", "shared memory"]),
    (16, torch.float16, ["tensor cores"]),
    (16, torch.float32, ["registers", "shared memory", "tensor cores"])], ids=str)
def test_which_kernels_run(kernels: EmulatedKernels, window: int, dtype: torch.dtype,
                           paths: list[str]):
    """What runs unasked has the bits of these paths: a kernel's, or of what they fall back to."""
    q, k, v, *_ = draw_inputs(Case(1, 40, 40, 2, 64, window, dtype))
    out = {}
    for kernels.path in PATHS:
        out[kernels.path] = kernels.forward(q, k, v, None, None, None, window, 0.0, 0.125)[0]
    assert [path for path in PATHS[1:] if torch.equal(out[path], out["automatic"])] == paths


# What is broken, where, and what the report must say: a wrong result, or the machine's own error.
FAULTS = {
    "no barrier after filling shared memory": (
        "shared_memory.cuh", "    __syncwarp();  // all rows are there\n", "", "is off by"),
    "no barrier before refilling it": (
        "shared_memory.cuh", "    __syncwarp();  // nobody reads the old rows any more\n", "",
        "is off by"),
    "a shuffle that one lane misses": (
        "shared_memory.cuh", "  tile.own(q, p.q, tile.offset, true, float(p.scale) * kLog2e);\n",
        "  tile.own(q, p.q, tile.offset, true, float(p.scale) * kLog2e);\n"
        "  if (threadIdx.x == 3) __shfl_xor_sync(kWarp, 0, 1);\n", "meets"),
    "a barrier that one warp misses": (
        "tensor_tile.cuh", "        __syncthreads();\n        also();",
        "        if (threadIdx.x >= 32) __syncthreads();\n        also();", "__syncthreads"),
    "statistics written beside their readers": (
        "tensor_tile.cuh", "        __syncthreads();\n        also();",
        "        also();\n        __syncthreads();", "is off by|differs"),
}


@pytest.mark.slow
def test_faults_are_caught(tmp_path: Path):
    """Break copies of the sources one by one: each fault must show."""
    builds = {}
    for number, (fault, (file, old, new, report)) in enumerate(FAULTS.items()):
        copy = tmp_path / str(number)
        shutil.copytree(CSRC, copy)
        text = (copy / "cuda" / file).read_text()
        assert old in text, f"{fault}: {file} no longer holds {old!r}"
        (copy / "cuda" / file).write_text(text.replace(old, new, 1))
        builds[fault] = copy
    with ThreadPool() as pool:
        built = pool.map(lambda copy: EmulatedKernels(copy, csrc=copy, flags=("-O0",)),
                         builds.values())
    for fault, kernels in zip(builds, built):
        file, report = FAULTS[fault][0], FAULTS[fault][3]
        path = kernels.path = next(path for path in PATHS[1:] if path.split()[0] in file)
        with pytest.raises((AssertionError, RuntimeError), match=report):
            for schedule in range(6):
                kernels.library.set_schedule(schedule)
                for case in CHOSEN[path]:
                    run(case, kernels)
            pytest.fail(f"nothing shows: {fault}")


@pytest.mark.slow
def test_sanitizers():
    """A few cases under the address and undefined-behaviour sanitizers, in a process of its own."""
    if not Path(sanitizers()[0]).exists():
        pytest.skip("g++ has no address sanitizer")
    result = subprocess.run([sys.executable, __file__, "--cases", "6", "--sanitize"], text=True,
                            capture_output=True, env={**os.environ, "PYTHONPATH": str(CSRC.parent)})
    assert result.returncode == 0 and "all right" in result.stdout, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_compiles_without_spills(tmp_path: Path):
    result = subprocess.run(
        ["nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "--threads", "2",
         "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
         "-c", "-I", str(CSRC), str(CSRC / "cuda" / "attention.cu"),
         "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill", result.stderr)
    assert len(spills) >= 100 and set(spills) == {"0"}, result.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Many random cases of the emulated kernels.")
    parser.add_argument("--cases", type=int, default=100, help="for each kernel family")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--sanitize", action="store_true", help="by GCC's sanitizers")
    options = parser.parse_args()
    if options.sanitize:
        begin_under_sanitizers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as build:
        emulated = EmulatedKernels(Path(build), flags=SANITIZE if options.sanitize else ("-O1",))
        for emulated.path in PATHS[1:]:
            numbers = range(options.first, options.first + options.cases)
            for number in tqdm(numbers, emulated.path, disable=None):  # none where nobody looks
                emulated.library.set_schedule(number)
                run(small_case(number, emulated.path), emulated)
    print("all right")
