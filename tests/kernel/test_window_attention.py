"""Windowed attention: every implementation against the truth, forward and backward.

In pytest a few dozen cases; thousands, on any implementation, by one command:

    python tests/kernel/test_window_attention.py --cases 3000 [--device cuda | --sanitize]
    python tests/kernel/test_window_attention.py --cases 200 --gradcheck
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from attention_cases import REACH, Case, check_reach, draw_case, draw_inputs, run_case  # noqa: E402
from emulation import SANITIZE, CPUKernels, begin_under_sanitizers  # noqa: E402

import equimini.attention as module  # noqa: E402
from equimini.attention import (implementation, keep_mask, reference_backward,  # noqa: E402
                                reference_forward, window_attention, window_mask)
from equimini.kernel.operators import visible_pairs  # noqa: E402

ROOT = Path(module.__file__).parent
OPERATOR = (torch.ops.equimini.window_attention.default,
            torch.ops.equimini.window_attention_backward.default)
REFERENCE = (reference_forward, reference_backward)
ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
compiled = pytest.mark.skipif(implementation("cpu") == "reference",
                              reason="no compiled kernels are installed")
DEVICES = [
    pytest.param("cpu", marks=compiled),
    pytest.param("cuda", marks=[
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
        pytest.mark.skipif(implementation("cuda") == "reference",
                           reason="no compiled CUDA kernels are installed")]),
]

# The model's own shapes, then what random cases meet too seldom.
CHOSEN = [
    Case(4, 16, 16, 4, 64, 4, torch.float32),
    Case(2, 16, 16, 4, 80, 4, torch.bfloat16, dropout_p=0.1),
    Case(8, 1, 4, 4, 64, 4, torch.float32),  # cached sampling
    Case(8, 1, 2, 4, 64, 4, torch.float32),
    Case(1, 1023, 1023, 1, 64, 4, torch.float32),
    Case(1, 1023, 1023, 1, 64, 300, torch.bfloat16),
    Case(2, 200, 250, 3, 64, 12, torch.float32, dropout_p=0.2),  # the CPU's widest narrow window
    Case(1, 150, 150, 5, 24, 13, torch.float32),
    Case(2, 70, 70, 20, 16, 5, torch.float32, dropout_p=0.1),  # more heads than lanes
    Case(1, 9, 130, 11, 40, 7, torch.float64, dropout_p=0.1),
    Case(1, 400, 1000, 2, 32, 128, torch.float16, dropout_p=0.5),
    Case(1, 700, 700, 2, 128, 2000, torch.float32, rope=False),
    Case(2, 300, 300, 1, 8, 17, torch.float64, spread=100.0),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only slow these small cases down; test_threads has its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def device_dtypes(device: str) -> tuple[torch.dtype, ...]:
    return ALL if device == "cpu" else ALL[:3]


def run(case: Case, device: str, judge_device: str | None = None) -> None:
    run_case(case, *OPERATOR, device, device == "cuda", judge_device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case: Case, device: str):
    if case.dtype in device_dtypes(device):
        run(case, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int, device: str):
    run(draw_case(random.Random(seed), device_dtypes(device), 257), device)


@pytest.mark.parametrize("seed", range(20))
def test_reference(seed: int):
    run_case(draw_case(random.Random(seed), ALL, 130), *REFERENCE)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_kernels_run(device: str, monkeypatch):
    """With the reference broken, the operators still work: something else computes them."""
    def fail(*args):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "reference_forward", fail)
    monkeypatch.setattr(module, "reference_backward", fail)
    run(CHOSEN[0], device)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_slices_are_read_in_place(device: str):
    qkv = torch.randn(2, 9, 3, 2, 32, device=device, requires_grad=True)
    with torch.profiler.profile() as profile:
        window_attention(*qkv.unbind(2), 4)
    assert not {"aten::clone", "aten::copy_", "aten::contiguous"} & {e.key for e in
                                                                      profile.key_averages()}


@compiled
@pytest.mark.parametrize("window", [4, 70])
def test_threads(window: int):
    """The number of threads changes no bit."""
    q, k, v, grad, rope, seed, scale = draw_inputs(
        Case(2, 520, 520, 3, 64, window, torch.float32, dropout_p=0.2))
    rest = (*rope, seed, window, 0.2, scale)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out, lse = OPERATOR[0](q, k, v, *rest)
        results.append((out, lse, *OPERATOR[1](grad, q, k, v, out, lse, *rest)))
    assert all(torch.equal(x, y) for x, y in zip(*results))


def gradcheck(case: Case) -> None:
    """Gradients and tangents against finite differences, in float64."""
    q, k, v, _, rope, seed, _ = draw_inputs(case)
    assert torch.autograd.gradcheck(
        lambda *x: window_attention(*x, case.window, rope=None if rope[0] is None else rope,
                                    dropout_p=case.dropout_p, seed=seed),
        [x.detach().clone().requires_grad_() for x in (q, k, v)], check_forward_ad=True)


def test_gradcheck():
    gradcheck(Case(1, 3, 5, 2, 8, 3, torch.float64, dropout_p=0.3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("device", ["cpu", DEVICES[1]])
def test_opcheck(device: str, rope: bool, dropout_p: float):
    q, k, v, grad, tables, seed, scale = draw_inputs(
        Case(2, 5, 7, 2, 16, 3, torch.float32, rope=rope, dropout_p=dropout_p), device)
    rest = (*tables, seed, 3, dropout_p, scale)
    out, lse = OPERATOR[0](q, k, v, *rest)
    torch.library.opcheck(OPERATOR[0], (*(x.requires_grad_() for x in (q.detach(), k.detach(),
                                                                        v.detach())), *rest))
    torch.library.opcheck(OPERATOR[1], (grad, q.detach(), k.detach(), v.detach(), out, lse, *rest))


@pytest.mark.parametrize("backend", (
    "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compile(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    q, k, v, _, rope, _, _ = draw_inputs(Case(2, 6, 6, 2, 16, 3, torch.float32))

    def attend(q, k, v):
        return window_attention(q, k, v, 3, rope=rope, dropout_p=0.2, seed=7)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grads = [torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (attend, compiled)]
    for x, y in zip(*grads):  # inductor may sum the squares' gradients in another order
        exact = {"atol": 0, "rtol": 0} if backend == "aot_eager" else {}
        torch.testing.assert_close(x, y, **exact)


def test_autocast():
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(q, k, v, 2)
    assert torch.equal(out, window_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2))


def test_the_reference_sums_in_float32_under_autocast():
    q, k, v, grad = torch.randn(4, 1, 4, 2, 16).bfloat16()
    rest = (None, None, None, 2, 0.0, 0.25)

    def attend():
        out, lse = reference_forward(q, k, v, *rest)
        return out, lse, *reference_backward(grad, q, k, v, out, lse, *rest)

    with torch.autocast("cpu", torch.bfloat16):
        inside = attend()
    assert all(map(torch.equal, inside, attend()))


@pytest.mark.parametrize("device", DEVICES)
def test_without_queries_keys_have_no_gradient(device: str):
    q, k, v = (torch.randn(2, n, 2, 16, device=device) for n in (0, 3, 3))
    rest = (None, None, None, 2, 0.0, 0.25)
    torch.use_deterministic_algorithms(True)  # which fills uninitialised tensors with NaN
    try:
        out, lse = OPERATOR[0](q, k, v, *rest)
        dq, dk, dv = OPERATOR[1](out, q, k, v, out, lse, *rest)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == dq.shape == q.shape and not dk.any() and not dv.any()


def test_window_one_returns_v():
    q, k, v = (torch.randn(2, 5, 2, 16) for _ in range(3))
    assert torch.equal(window_attention(q, k, v, 1), v)


@pytest.mark.parametrize("forward", [pytest.param(OPERATOR[0], id="operator"), reference_forward])
@pytest.mark.parametrize("window", [2, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_read_and_rounded_as_torch_does(forward, window: int, dtype: torch.dtype):
    """All of them, subnormal ones, infinities and NaN too: the mean of two values is rounded."""
    a = torch.arange(2**16).to(torch.int16).view(dtype)
    b = a[torch.randperm(len(a))]
    b = torch.where((a.float() + b.float()).isinf() & a.isfinite() & b.isfinite(), 0, b)
    v = torch.zeros(1, window, len(a) // 72 + 1, 72, dtype=dtype)  # 72: no multiple of 16 lanes
    for n, x in enumerate((a, b)):
        v[0, n].view(-1)[:len(a)] = x
    q = torch.zeros_like(v)
    out = forward(q, q, v, None, None, None, window, 0.0, 1.0)[0][0, -1].view(-1)[:len(a)]
    torch.testing.assert_close(out, ((a.float() + b.float()) / window).to(dtype), rtol=0, atol=0,
                               equal_nan=True)


def test_nan_is_seen_where_it_is_visible():
    q, k, v = (torch.randn(1, 40, 1, 16) for _ in range(3))
    k[0, 3, 0, 5] = float("nan")
    out = window_attention(q, k, v, 4)
    assert out[0, 3:7].isnan().all() and out[0, 7:].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 4, 12, 13, 40])
def test_nan_goes_no_further_than_a_tile(device: str, window: int):
    narrow = device == "cpu" and window <= 12
    for dtype in device_dtypes(device):
        for n_q in (160, 100):
            check_reach(*OPERATOR, window, dtype, n_q, 0 if narrow else REACH, device)
    check_reach(*REFERENCE, window, torch.float32, 100, None)


def test_cached_decoding_reads_no_unset_memory(generator):
    """With every uninitialised tensor full of NaN, column by column is still the whole."""
    tokens, context = torch.randn(2, 9, 6), generator.encode_classes(torch.tensor([0, 1]))
    whole, cache = generator(tokens, context), []
    torch.use_deterministic_algorithms(True)  # which fills them
    try:
        assert torch.empty(1).isnan()
        parts = [generator(tokens[:, i:i + 1], context, i, cache) for i in range(9)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_keep_mask_is_murmur():
    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ x >> 16

    seed, (b, h, i, j) = -(2**40) - 12345, (1, 2, 3, 4)
    state = mix(seed & 0xFFFFFFFF ^ 0x9E3779B9)
    for word in (seed >> 32 & 0xFFFFFFFF, b, h, i + 2, j):  # query i of 5 stands at i + 2 of 7
        state = mix(state ^ word)
    for p in (0.3, 0.9):
        mask = keep_mask(torch.tensor(seed), (2, 3, 5, 7), p)
        assert mask[b, h, i, j].item() == (state >= int(p * 2**32))


def test_dropout_rate_and_seeds():
    shape, p = (8, 8, 64, 64), 0.1
    a, b = (keep_mask(torch.tensor(seed), shape, p).double() for seed in (0, 1))
    deviation = (p * (1 - p) / a.numel()) ** 0.5
    for x in (a, b):
        assert abs(x.mean().item() - 0.9) < 5 * deviation
    assert abs((a * b).mean().item() - 0.81) < 5 * (0.81 * 0.19 / a.numel()) ** 0.5
    q, k, v = (torch.randn(2, 9, 2, 16) for _ in range(3))
    torch.manual_seed(0)
    first, second = (window_attention(q, k, v, 4, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, window_attention(q, k, v, 4, dropout_p=0.5))


@pytest.mark.parametrize("n_q,n_k,window", [(4, 4, 2), (3, 9, 4), (16, 16, 4), (5, 5, 99)])
def test_flops(n_q: int, n_k: int, window: int):
    assert visible_pairs(n_q, n_k, window) == window_mask(n_q, n_k, window).sum()
    for device in ("cpu", "meta"):
        q, k, v = (torch.randn(2, n, 3, 16, device=device, requires_grad=True)
                   for n in (n_q, n_k, n_k))
        with FlopCounterMode(display=False) as counter:
            window_attention(q, k, v, window).sum().backward()
        pairs = 2 * 3 * visible_pairs(n_q, n_k, window)
        assert counter.get_total_flops() == (2 + 5) * 2 * 16 * pairs


@pytest.mark.parametrize("changes,error,names", [
    ({"q": (2, 4, 16)}, ValueError, "q and k"),
    ({"k": (2, 4, 2, 8)}, ValueError, "k and v"),
    ({"v": (2, 5, 2, 16)}, ValueError, "k and v"),
    ({"q": (2, 4, 2, 12), "k": (2, 4, 2, 12), "v": (2, 4, 2, 12)}, ValueError, "head size D"),
    ({"q": (2, 5, 2, 16)}, ValueError, "k must hold"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    ({"dtype": torch.int32}, TypeError, "q, k and v"),
    ({"dropout_p": 0.1, "seed": torch.zeros(1)}, ValueError, "seed"),
    ({"rope": (torch.ones(4, 8), torch.ones(3, 8))}, ValueError, "sin"),
    ({"rope": (torch.ones(4, 8).double(), torch.ones(4, 8))}, TypeError, "cos"),
])
def test_errors_name_the_argument(changes: dict, error: type, names: str):
    shapes = {name: changes.pop(name, (2, 4, 2, 16)) for name in "qkv"}
    dtype = changes.pop("dtype", torch.float32)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    with pytest.raises(error, match=names):
        window_attention(**tensors, window=2, **changes)


@pytest.mark.parametrize("window,error,told", [
    (0, ValueError, "at least 1 .*got 0"), (None, TypeError, "one whole number, got None"),
    ((3, 0), TypeError, r"one whole number, got \(3, 0\)"),
    (2.5, TypeError, "one whole number, got 2.5"), (True, TypeError, "one whole number, got True")])
def test_what_a_window_may_be(window, error: type, told: str):
    q = torch.zeros(1, 2, 1, 8)
    for attend in (lambda: window_attention(q, q, q, window),
                   lambda: reference_forward(q, q, q, None, None, None, window, 0.0, 1.0)):
        with pytest.raises(error, match=f"window must be {told}"):
            attend()


@compiled
def test_the_bare_operator_checks_its_window():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="window must be at least 1.*got 0"):
        OPERATOR[0](q, q, q, None, None, None, 0, 0.0, 1.0)


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(cwd), **environment})


def test_the_package_offers_the_function():
    """Whatever was imported before: a module of its name would hide it."""
    code = ("import equimini.attention\n"
            "for _ in range(2):\n"
            "    from equimini import window_attention as f\n"
            "    assert f is equimini.attention.window_attention, f")
    assert run_python(code, ROOT.parent).returncode == 0


def test_environment_forces_the_reference():
    code = "import equimini.attention as m; print(m.implementation())"
    result = run_python(code, ROOT.parent, EQUIMINI_ATTENTION="reference")
    assert result.stdout.strip() == "reference"
    result = run_python(code, ROOT.parent, EQUIMINI_ATTENTION="C++")
    assert "EQUIMINI_ATTENTION must be" in result.stderr


@pytest.mark.parametrize("name,told", [
    (None, "reference equimini was installed without compiled kernels"),
    ("_kernels.cpython-27-x86_64-linux-gnu.so", "_kernels.cpython-27-x86_64-linux-gnu.so is for "
     "another Python"), ("_kernels.abi3.so", "present but do not load.*file too short")])
def test_without_a_binary_that_loads(tmp_path: Path, name: str | None, told: str):
    """A missing one is silent, one of another Python warns, a broken one is an error."""
    package = tmp_path / "equimini"
    (package / "kernel").mkdir(parents=True)
    (package / "__init__.py").touch()
    for file in ("rope.py", "attention.py", *(f"kernel/{x}.py" for x in (
            "__init__", "binary", "operators"))):
        shutil.copy(ROOT / file, package / file)
    if name:
        (package / name).write_bytes(b"not a library")
    result = run_python(
        "import sys\n"  # an editable installation's finder would still offer the real binary
        "sys.meta_path = [x for x in sys.meta_path if 'editable' not in str(x).lower()]\n"
        "import equimini.attention as m; print(m.implementation(), m.why_reference())", tmp_path)
    assert re.search(told, result.stdout + result.stderr), result
    assert ("Warning" in result.stderr) == ("cpython-27" in told)


def source_tree(folder: Path) -> None:
    """Copy what an installation needs, without a binary."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT.parent / name, folder)
    shutil.copytree(ROOT.parent / "csrc", folder / "csrc")
    shutil.copytree(ROOT, folder / "equimini",
                    ignore=shutil.ignore_patterns("_kernels*", "assets", "__pycache__"))


x86_64 = pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("c++"),
                            reason="needs an x86-64 processor and a C++ compiler")


@pytest.mark.slow
@x86_64
@pytest.mark.parametrize("march", ["x86-64", "haswell"])
def test_other_processors(march: str, tmp_path: Path):
    """Kernels built for vectors of 16 (SSE) and 32 bytes (AVX2) are right, too."""
    if march == "haswell" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    kernels = CPUKernels(tmp_path, march)
    for case in [*CHOSEN, *(draw_case(random.Random(n), ALL, 140) for n in range(120))]:
        run_case(case, kernels.forward, kernels.backward)
    for window in (4, 13, 40):
        check_reach(kernels.forward, kernels.backward, window, torch.bfloat16)


@pytest.mark.slow
@x86_64
def test_a_binary_for_another_processor_is_left_out(tmp_path: Path):
    """With a warning, and a reason where one asks; Python goes on."""
    pytest.importorskip("setuptools")
    flags = Path("/proc/cpuinfo").read_text()
    march = next((march for flag, march in (("avx512f", "x86-64-v4"),
                                            ("avx512_fp16", "sapphirerapids"))
                  if flag not in flags), None)
    if march is None:
        pytest.skip("this processor has everything")
    source_tree(tmp_path)
    environment = {"EQUIMINI_BUILD": "cpu", "EQUIMINI_MARCH": march, "OMP_NUM_THREADS": "1"}
    built = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
                           cwd=tmp_path, env={**os.environ, **environment}, capture_output=True,
                           text=True)
    assert f"built the attention kernels: C++ for -march={march}" in built.stdout, built.stderr
    assert len(list(tmp_path.glob("equimini/_kernels.abi3.so"))) == 1
    told = run_python("import torch, equimini.attention as m; x = torch.ones(1, 4, 1, 8)\n"
                      "assert (m.window_attention(x, x, x, 2) == 1).all()\n"
                      "print(m.implementation(), m.why_reference())", tmp_path)
    assert told.stdout.startswith(f"reference the kernels were compiled with -march={march}, and "
                                  "this processor has no avx512"), told
    assert "UserWarning: attention runs as slow plain PyTorch" in told.stderr
    versions = subprocess.run([sys.executable, "-m", "equimini.show", "versions"], cwd=tmp_path,
                              capture_output=True, text=True)
    assert "attention on cpu: reference (the kernels were compiled with" in versions.stdout


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_graph_draws_anew(device: str):
    """A captured call reads its inputs and its seed when it is replayed."""
    q, k, v = torch.randn(3, 4, 16, 4, 64, device=device, dtype=torch.bfloat16)
    seed = torch.tensor([1], device=device)
    window_attention(q, k, v, 4, dropout_p=0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = window_attention(q, k, v, 4, dropout_p=0.5, seed=seed)
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(out, window_attention(q, k, v, 4, dropout_p=0.5, seed=number))


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("window", [4, 12, 32])  # each family; 12 asks for more shared memory
def test_cuda_graph_trains(device: str, window: int):
    """Forward and backward can be captured, and read their inputs when they are replayed."""
    packed = torch.randn(2, 40, 3, 3, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def gradient() -> torch.Tensor:
        out = window_attention(*packed.unbind(2), window)
        return torch.autograd.grad(out.square().sum(), packed)[0]

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient()  # libraries allocate at their first calls: not in a graph
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = gradient()
    with torch.no_grad():
        packed.normal_()
    graph.replay()
    assert torch.equal(captured, gradient())


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_stream(device: str):
    """Work goes to the current stream: it waits for what that stream does before."""
    stream = torch.cuda.Stream()
    q, k, v = (torch.zeros(64, 256, 8, 64, device=device) for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        v.fill_(1)
        out = window_attention(q, k, v, 4)
    stream.synchronize()
    assert (out == 1).all()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Many random cases of windowed attention.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--gradcheck", action="store_true", help="derivatives, in float64")
    parser.add_argument("--sanitize", action="store_true", help="C++, by GCC's sanitizers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--longest", type=int, default=257, help="most tokens in a case")
    parser.add_argument("--judge-device", help="where the truth is computed [--device]")
    options = parser.parse_args()
    if options.sanitize:
        begin_under_sanitizers()
    numbers = tqdm(range(options.first, options.first + options.cases), "cases", disable=None)
    if options.gradcheck:
        for number in numbers:
            case = draw_case(random.Random(number), (torch.float64,), 9)
            gradcheck(replace(case, h=min(case.h, 2), d=8, spread=1.0))
    elif options.sanitize:
        with tempfile.TemporaryDirectory() as build:
            kernels = CPUKernels(Path(build), "native", SANITIZE)
            for number in numbers:
                run_case(draw_case(random.Random(number), ALL, options.longest), kernels.forward,
                         kernels.backward)
    else:
        dtypes = device_dtypes(options.device)
        print(f"{options.cases} cases on {options.device}: {implementation(options.device)}")
        for case in [case for case in CHOSEN if case.dtype in dtypes]:
            run(case, options.device, options.judge_device)
        for number in numbers:
            case = draw_case(random.Random(number), dtypes, options.longest)
            run(case, options.device, options.judge_device)
    print("all right")
