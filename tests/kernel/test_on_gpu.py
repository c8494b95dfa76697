"""What only a GPU runs: kernel families that are asked for, compiled calls, large tensors, graphs,
draws in pinned memory, half precision, deterministic resuming.

What CPUs share with GPUs of the attention is in test_window_attention.py.  Several workers of
pytest-xdist fit one GPU: python -m pytest -n 5 tests/kernel/test_on_gpu.py
EQUIMINI_TEST_DEVICE=cpu runs what a CPU can, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import pytest
import torch

from equimini.attention import implementation, window_attention
from equimini.rope import rope_tables
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from tests.helpers.scripts import GENERATOR, ROOT, TOKENIZER, command
from tests.kernel.attention_cases import draw_case, run_case
from tests.kernel.emulation import DTYPES, PATHS, GPUKernels
from tests.kernel.test_cuda_on_cpu import CHOSEN

DEVICE = os.environ.get("EQUIMINI_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="there is no CUDA device")
needs_kernels = pytest.mark.skipif(implementation("cuda") == "reference",
                                   reason="no compiled CUDA kernels are installed")
PLAIN = "--precision float32 --no-fused-optimizer"


# The kernels ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("needs a GPU and nvcc")
    major, minor = torch.cuda.get_device_capability()
    return GPUKernels(ROOT / "build" / "gpu", f"sm_{major}{minor}")


@pytest.mark.parametrize("path", PATHS[1:])
def test_every_family_where_it_is_asked_for(kernels, path):
    """Also where the operator would take another: shared memory for every window and dtype."""
    kernels.path = path
    dtypes = DTYPES[1:] if path == "tensor cores" else DTYPES
    cases = [draw_case(random.Random(seed), dtypes, 257) for seed in range(100)]
    for case in CHOSEN[path] + cases:
        if path == "registers":
            case.window = min(case.window, 4)
        run_case(case, kernels.forward, kernels.backward, DEVICE,
                 rounds_rotated=path == "tensor cores")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype, window", [(torch.float32, 3), (torch.bfloat16, 4),
                                           (torch.bfloat16, 9), (torch.bfloat16, 20)], ids=str)
def test_compiled_calls_have_the_same_bits(dtype, window, dropout_p):
    packed = torch.randn(2, 40, 3, 3, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    tables = tuple(t.to(DEVICE) for t in rope_tables(torch.arange(40), 64))

    def attend(packed):
        return window_attention(*packed.unbind(2), window, rope=tables, dropout_p=dropout_p, seed=7)

    torch._dynamo.reset()  # after 8 versions it would run uncompiled
    compiled = torch.compile(attend, fullgraph=True)
    outs = [f(packed) for f in (attend, compiled)]
    grad = torch.randn_like(outs[0])
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out, packed, grad)[0] for out in outs))


def test_compiled_calls_draw_their_own_dropout():
    """Without a seed: the call draws one, in the compiled code, from torch's generator."""
    q = torch.randn(2, 40, 3, 64, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: window_attention(q, q, q, 4, dropout_p=0.5), fullgraph=True)
    assert not torch.equal(compiled(q), compiled(q))


@needs_kernels
@pytest.mark.parametrize("window", [4, 9, 16])
@pytest.mark.parametrize("packed, gigabytes", [(True, 24), (False, 52)], ids=["strides", "rows"])
def test_more_than_2_31_elements(packed, gigabytes, window):
    """The last sequences of a call whose offsets pass 2³¹ have the bits of a small call."""
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")
    b = 24_576 if packed else 70_000  # 2.4e9 elements of q, k and v together, or 2.3e9 of each
    shape = (b, 16, 3, 16, 128) if packed else (3, b, 16, 16, 128)
    q, k, v = (x.requires_grad_() for x in torch.empty(
        shape, device=DEVICE, dtype=torch.bfloat16).normal_().unbind(2 if packed else 0))
    out = window_attention(q, k, v, window)
    grad = torch.empty_like(out).normal_()
    some = [x.detach()[-8:].clone().requires_grad_() for x in (q, k, v)]
    part = window_attention(*some, window)
    assert torch.equal(out[-8:], part)
    for whole, last in zip(torch.autograd.grad(out, (q, k, v), grad),
                           torch.autograd.grad(part, some, grad[-8:].clone())):
        assert torch.equal(whole[-8:], last)
    del q, k, v, out, grad, whole
    torch.cuda.empty_cache()


# The scripts ----------------------------------------------------------------------------------


def train(kind, *flags, device, cwd):
    """Losses of a training of a few steps on a device."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(f"train_{kind}.py", *flags, "--device", device), cwd=cwd,
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = cwd / (flags[flags.index("--out") + 1] if "--out" in flags else f"runs/{kind}")
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tokenizer, and the losses of a generator that was trained on the CPU."""
    folder = tmp_path_factory.mktemp("on_cpu")
    flags = ["--discriminator", "none", "--steps", 3]
    losses = train("tokenizer", *TOKENIZER, *flags, device="cpu", cwd=folder)
    mine = train("tokenizer", *TOKENIZER, *flags, "--out", "again", device=DEVICE, cwd=folder)
    assert mine == pytest.approx(losses, rel=1e-3)
    return folder, train("generator", *GENERATOR, *PLAIN.split(), "--dropout", 0, "--steps", 4,
                         device="cpu", cwd=folder)


@pytest.mark.parametrize("flags, rel", [
    (PLAIN, 1e-3), ("--precision float32 --fused-optimizer", 1e-3), ("--precision tf32", 1e-2),
    ("--precision bf16", 3e-2), ("--precision bf16 --checkpoint-activations", 3e-2),
    ("--precision bf16 --compile", 3e-2)], ids=str)
def test_training_goes_as_on_the_cpu(trained, flags, rel):
    folder, losses = trained
    mine = train("generator", *GENERATOR, *flags.split(), "--dropout", 0, "--steps", 4,
                 "--out", flags.replace("-", ""), device=DEVICE, cwd=folder)
    assert mine == pytest.approx(losses, rel=rel)


def test_a_resumed_run_is_the_uninterrupted_one(trained):
    """To the last bit, with --deterministic and dropout."""
    folder, _ = trained
    for name, steps in (("whole", [6]), ("parts", [3, 6])):
        train("generator", *GENERATOR, "--deterministic", "--steps", steps[0], "--out", name,
              device=DEVICE, cwd=folder)
        for more in steps[1:]:
            train("generator", "--resume", "--steps", more, "--out", name, device=DEVICE,
                  cwd=folder)
    whole, parts = (torch.load(folder / name / "last.pt", map_location="cpu")["ema"]
                    for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bf16", 3e-2)])
def test_graphs_draw_the_same_columns(generator, tokenizer, precision, tolerance):
    """With a class that changes, and again from the graphs that were kept."""
    model = ImageGenerator(generator.to(DEVICE), tokenizer.to(DEVICE), ["cat", "dog", "eel"])
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [2] * 8])
    plain, graphs, again = (
        torch.stack(list(model.draw(labels, [1, 2], SamplingOptions(
            steps=4, precision=precision, cuda_graphs=graphs))), 1)
        for graphs in ("off", *2 * ["on" if DEVICE == "cuda" else "off"]))
    torch.testing.assert_close(graphs, plain, rtol=tolerance, atol=tolerance)
    assert torch.equal(again, graphs)
