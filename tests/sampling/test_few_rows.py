"""The C++ of few rows against the modules that it stands for, in float64."""

import copy
import dataclasses
import itertools
import platform
import random
import shutil
import subprocess

import pytest
import torch

from equimini.flow_head import FlowHead
from equimini.generator import Generator, GeneratorConfig, make_generator
from equimini.sampler import sample_tokens
from equimini.sampling import few_rows
from equimini.sampling.packed_weights import packed
from tests.conftest import SMALL_GENERATOR, randomize
from tests.helpers.scripts import ROOT

compiled = pytest.mark.skipif(not few_rows.compiled(), reason="no compiled kernels are installed")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def config_of(seed: int) -> GeneratorConfig:
    draw = random.Random(seed)
    heads = draw.randint(1, 3)
    return GeneratorConfig(layers=draw.randint(1, 3), heads=heads, window=draw.randint(1, 5),
                           embed_dim=heads * 8 * draw.randint(1, 9), dropout=0.1,
                           class_tokens=draw.randint(1, 17), head_width=draw.randint(8, 90),
                           head_depth=draw.randint(1, 3),
                           objective=draw.choice(("flow-matching", "mean-flow")))


def way_through(generator: Generator, tokens, labels, t, max_position) -> torch.Tensor:
    """Every column's z, and the head's velocity there."""
    context, cache = generator.encode_classes(labels), []
    z = torch.cat([generator(tokens[:, i:i + 1], context, i, cache, max_position)
                   for i in range(tokens.shape[1])], 1)
    return torch.cat((z, generator.head(tokens, t, z)), 2)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    assert x.dtype == torch.float32 and x.isfinite().all()
    return ((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


@compiled
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_head_and_transformer(seed, precision):
    """Within 8 times the error of PyTorch's float32, as sums run in one chain; bf16 rounds weights
    by 2⁻⁹, in some 30 layers."""
    channels, rows = 1 + 11 * seed, 1 + seed * seed // 2
    plain = randomize(Generator(config_of(seed), 3, channels), seed).eval()
    ready = packed(plain, precision)
    assert isinstance(ready.forward, few_rows.OneToken)
    inputs = torch.randn(rows, 7, channels), torch.randint(3, (rows,)), torch.rand(rows, 7)
    exact = copy.deepcopy(plain).double()
    truth = way_through(exact, inputs[0].double(), inputs[1], inputs[2].double(), 4)
    ours, theirs = (error(way_through(g, *inputs, 4), truth) for g in (ready, plain))
    assert ours <= (8 * theirs if precision == "float32" else 30 * 2**-9)


@pytest.fixture
def wide() -> Generator:
    """As large as it takes for several threads to share the rows, and layers' panels."""
    config = dataclasses.replace(SMALL_GENERATOR, embed_dim=256, heads=4, head_width=736)
    return randomize(Generator(config, 3, 6)).eval()


@compiled
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_a_picture_is_the_same_in_any_batch_and_on_any_number_of_threads(wide, precision):
    ready, threads = packed(wide, precision), torch.get_num_threads()
    labels, tokens, t = torch.arange(70) % 3, torch.randn(70, 4, 6), torch.rand(70, 4)
    try:
        torch.set_num_threads(3)
        together = way_through(ready, tokens, labels, t, None)
        for rows, now in itertools.product((1, 2, 5, 11), (1, 3)):
            torch.set_num_threads(now)
            alone = way_through(ready, tokens[:rows], labels[:rows], t[:rows], None)
            assert torch.equal(alone, together[:rows])
    finally:
        torch.set_num_threads(threads)


@compiled
@torch.no_grad()
def test_small_variances_and_large_activations(generator):
    """LayerNorm's ε counts, and gelu and silu reach their ends."""
    for linear in (generator.x_in, generator.head.x_in):
        linear.weight.zero_()
        linear.bias.mul_(1e-3)
    for mlp in (m.mlp for part in (generator, generator.head) for m in part.blocks):
        mlp[0].weight.zero_()
        mlp[0].bias.copy_(torch.linspace(-9, 9, len(mlp[0].bias)))
    inputs = torch.randn(2, 7, 6), torch.tensor([0, 2]), torch.rand(2, 7)
    truth = way_through(copy.deepcopy(generator).double(), inputs[0].double(), inputs[1],
                        inputs[2].double(), None)
    ours, theirs = (error(way_through(g, *inputs, None), truth)
                    for g in (packed(generator), generator))
    assert ours <= 8 * theirs


@compiled
@torch.no_grad()
def test_the_cache_is_the_generators_own(generator):
    """A stream may go from one to the other, and a state that was kept does not change."""
    ready, x, caches = packed(generator), torch.randn(2, 6, 6), ([], [])
    contexts = [g.encode_classes(torch.tensor([0, 2])) for g in (generator, ready)]
    for i in range(6):
        for g, context, cache in zip((generator, ready), contexts, caches):
            kept = list(cache), [k.clone() for pair in cache for k in pair]
            g(x[:, i:i + 1], context, i, cache)
            assert all(map(torch.equal, [k for pair in kept[0] for k in pair], kept[1]))
        torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-5)
    z = [g(x[:, :1], contexts[0], 6, cache) for g, cache in zip((ready, generator), caches)]
    torch.testing.assert_close(*z, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("rows, change", (
    (2, lambda k, v: (k, v[:0])), (2, lambda k, v: (k, torch.zeros(3, 0, 5))),
    (2, lambda k, v: (k[:, :0], v)), (2, lambda k, v: (v[:1], k[:1])), (2, lambda k, v: (v,)),
    (2, lambda k, v: 2 * (torch.zeros(2, 9, *k.shape[2:]),)), (2, lambda k, v: (k[0, 0], v)),
    (2, lambda k, v: (k, v.double())), (1, lambda k, v: (k, v)), (3, None), ("channels", None)))
@torch.no_grad()
def test_a_cache_that_does_not_fit_is_no_crash(generator, rows, change):
    """Memory beside it would be read; it may come from a scroll's state."""
    ready, cache, x = packed(generator), [], torch.randn(3, 2, 6)
    context = ready.encode_classes(torch.tensor([0, 2]))
    ready(x[:2, :1], context, 0, cache)
    cache = [change(*pair) for pair in cache] if change else []
    x = x[:2, :, :4] if rows == "channels" else x[:rows]
    with pytest.raises((RuntimeError, IndexError)):
        ready(x[:, 1:], context, 1, cache)


@compiled
def test_heads_and_generators_of_other_kinds_are_packed_without(generator):
    class Other(FlowHead):
        pass

    generator.head.__class__ = Other
    assert "velocity" not in vars(packed(generator).head)
    generator.head.__class__ = FlowHead
    assert "velocity" in vars(packed(generator).head)
    eq6 = dataclasses.replace(SMALL_GENERATOR, real_equivariant=True)
    assert not isinstance(packed(make_generator(eq6, 3, 6)).forward, few_rows.OneToken)


@compiled
def test_guidance_is_embedded_again_when_it_changes():
    config = dataclasses.replace(SMALL_GENERATOR, objective="mean-flow")
    plain = randomize(Generator(config, 3, 6)).eval()
    ready, drawn = packed(plain), []
    for g in (plain, ready):
        drawn.append([sample_tokens(g, torch.tensor([1]), 5, [3], cfg=s, steps=1,
                                    solver="mean-flow") for s in (1.5, 4.0)])
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def program(folder, *flags) -> str:
    """What tests/kernel/few_rows.cpp prints, compiled with these flags."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    binary = folder / "few_rows"
    subprocess.run(["c++", "-std=c++20", *flags, "-fno-math-errno", "-fopenmp", "-I", ROOT / "csrc",
                    ROOT / "tests/kernel/few_rows.cpp", "-o", binary], check=True)
    done = subprocess.run([binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_other_instructions_compute_the_same(tmp_path):
    here, sse = ([line.split() for line in program(tmp_path, "-O2", f"-march={m}").splitlines()]
                 for m in ("native", "x86-64"))
    for (name, *a), (_, *b) in zip(here, sse, strict=True):
        torch.testing.assert_close(*(torch.tensor([*map(float, x)]) for x in (a, b)), rtol=1e-3,
                                   atol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_under_the_sanitizers(tmp_path):
    """Nothing is read or written outside the buffers, whatever the shapes."""
    assert "nan" not in program(tmp_path, "-O1", "-g", "-march=native",
                                "-fsanitize=address,undefined",
                                "-fno-sanitize-recover=undefined")
