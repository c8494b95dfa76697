"""The authors' files: our modules compute what they mean, and nothing in them is run.

The numbers are compared with the straight-line code of release_reference.py, which shares nothing
with equimini.  Error is measured against the reference in float64, and may be a small multiple of
the reference's own error in float32.
"""

import argparse
import builtins
import collections
import contextlib
import io
import math
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Tuple

import numpy as np
import pytest
import torch

from equimini.convert import release as convert
from equimini.convert.unpickle import ForeignFile, stored
from equimini.sampler import ColumnSampler, Guidance, Stream, column_noise, sample_tokens
from equimini.sampling.image_generator import load_generator
from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from tests.helpers import release_reference as reference

# Our float32 error over the reference's own, its root mean square and its largest value.  Both
# sides are right up to rounding, but sum in orders of their own: the ratios scatter around 1.
TIMES_RMS, TIMES_LARGEST = 4, 8
FORMATS = pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])

TOKENIZERS = {  # name: (layout, image height)
    "semantic": (dict(base=32, multipliers=(2, 3, 2), blocks=2, attention_stages=(2,), z=8,
                      tokens=16, rows=8, semantic=64), 32),
    "plain": (dict(base=32, multipliers=(2, 1, 3, 2), blocks=1, attention_stages=(1, 2), z=20,
                   tokens=16, rows=4, semantic=0), 32),
    "tiny": (dict(base=32, multipliers=(1,), blocks=1, attention_stages=(0,), z=3, tokens=4,
                  rows=4, semantic=0), 4)}
GENERATOR = dict(layers=3, width=64, classes=3, class_tokens=5, tokens=16, head_width=32,
                 head_depth=2)
HEADS, WINDOW = 4, 3
VOLUMES = {"loud": 1.0, "quiet": 0.03}  # of the weights; the quiet ones show every norm's eps


@pytest.fixture(autouse=True)
def seeded():
    """The same inputs in every run, whichever tests are run."""
    torch.manual_seed(0)


# ---- files as the authors' programs write them -----------------------------------------------

@contextlib.contextmanager
def lightning():
    """A package with classes of its own, gone again when the file is read."""
    module = types.ModuleType("lightning_of_the_authors")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    module.Config = type("Config", (dict,), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]


def tokenizer_file(path, weights, extra=None, **options):
    """A Lightning checkpoint with these weights."""
    state = collections.OrderedDict(weights)
    state["loss.logvar"] = torch.zeros(())
    state["loss.discriminator.main.0.weight"] = torch.randn(4, 3, 4, 4)
    with lightning() as classes:
        callback = classes.Callback()
        callback.best = {"score": torch.ones(2)}
        torch.save({"epoch": 3, "global_step": 7, "state_dict": state,
                    "callbacks": {classes.Callback: callback},
                    "hyper_parameters": classes.Config(args=argparse.Namespace(z=[1])),
                    "loops": collections.defaultdict(list, {"fit": [collections.deque([1])]}),
                    "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(5)}}}],
                    "when": np.float64(3.0), "extra": extra}, path, **options)
    return path


def generator_file(path, ema, raw, extra=None, **options):
    """A checkpoint of the authors' generator training."""
    scaler = torch.amp.GradScaler("cpu").state_dict()
    args = argparse.Namespace(model="large", cond_length=WINDOW, extra=extra)
    torch.save({"model": raw, "model_ema": ema, "optimizer": {"state": {}}, "scaler": scaler,
                "epoch": 9, "args": args}, path, **options)
    return path


def converted(*argv):
    """Run the command; returns the path of --out."""
    convert.main([str(arg) for arg in argv])
    return argv[argv.index("--out") + 1]


def random_tokenizer(name="semantic", volume=1.0):
    """Weights of a small release tokenizer; raw and EMA copies differ."""
    layout = reference.tokenizer_layout(**TOKENIZERS[name][0])
    return reference.random_weights(layout, 0, volume)


def random_generator(seed=0, volume=1.0):
    """Weights of a small release generator."""
    return reference.random_weights(reference.generator_layout(**GENERATOR), seed, volume)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a release tokenizer and a generator of each volume, and what they became."""
    folder = tmp_path_factory.mktemp("shared")
    tokenizer_file(folder / "tokenizer.ckpt", random_tokenizer())
    converted(folder / "tokenizer.ckpt", "--out", folder / "tokenizer.pt")
    for name, volume in VOLUMES.items():
        generator_file(folder / "g.ckpt", random_generator(1, volume), random_generator(2))
        converted(folder / "g.ckpt", "--tokenizer", folder / "tokenizer.pt", "--heads", HEADS,
                  "--window", WINDOW, "--out", folder / f"{name}.pt")
    return folder


@pytest.fixture
def tokenizer_pt(shared, tmp_path):
    """A converted tokenizer; the file it was made from lies beside it."""
    for name in "tokenizer.ckpt", "tokenizer.pt":
        shutil.copy(shared / name, tmp_path)
    return tmp_path / "tokenizer.pt"


# ---- numbers ---------------------------------------------------------------------------------

def assert_agrees(ours, compute, weights, *inputs):
    """`ours` is compute(weights, *inputs) up to the rounding of float32 arithmetic."""
    def run(dtype):
        return compute(reference.in_dtype(weights, dtype), *(
            x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs)).double()

    exact, rounded = run(torch.float64), run(torch.float32)
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    error, own = (ours.double() - exact).abs(), (rounded - exact).abs()
    assert 0 < own.max() < 1e-3 * exact.std()  # the comparison means something
    ratios = error.square().mean().sqrt() / own.square().mean().sqrt(), error.max() / own.max()
    assert ratios[0] <= TIMES_RMS and ratios[1] <= TIMES_LARGEST, (
        f"error {error.max():.2e}; rms and largest over the reference's: {ratios}")


@pytest.mark.parametrize("volume", VOLUMES.values(), ids=VOLUMES)
@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokenizer_numerics(name, volume, tmp_path):
    weights, (layout, height) = random_tokenizer(name, volume), TOKENIZERS[name]
    source = tokenizer_file(tmp_path / "a.ckpt", weights)
    tokenizer = checkpoint.load_tokenizer(converted(source, "--out", tmp_path / "a.pt"))
    f = 2 ** (len(layout["multipliers"]) - 1)
    assert tokenizer.config.image_size == height
    for width in height, 2 * f, height + 5 * f:
        image = torch.rand(2, 3, height, width) * 2 - 1
        assert_agrees(tokenizer.encode(image), reference.tokens_of_image, weights, image)
        tokens = torch.randn(2, width // f, layout["tokens"]) * 2
        assert_agrees(tokenizer.decode(tokens), reference.image_of_tokens, weights, tokens)
        if layout["semantic"]:
            image, semantic = tokenizer.decode_with_semantics(tokens)
            assert torch.equal(image, tokenizer.decode(tokens))
            assert_agrees(semantic, reference.semantic_map, weights, tokens)
    normal = tokenizer.normalize(tokens)
    assert torch.allclose(normal, tokens * 0.05493, rtol=1e-6, atol=0)


@pytest.fixture(params=VOLUMES)
def generator_weights(request, shared):
    """A converted generator, and the release's weights that it must have."""
    weights = random_generator(1, VOLUMES[request.param])
    return load_generator(shared / f"{request.param}.pt").generator, weights


@pytest.mark.parametrize("shift", [0, 11])
@torch.no_grad()
def test_transformer_numerics(generator_weights, shift):
    generator, weights = generator_weights
    tokens, labels = torch.randn(4, 9, 16), [2, None, 0, None]
    drop = torch.tensor([label is None for label in labels])
    numbers = torch.tensor([label or 0 for label in labels])

    def conditions(w, tokens):
        return reference.transformer(w, tokens, labels, HEADS, WINDOW, shift)

    context = generator.encode_classes(numbers, drop)
    ours = torch.cat((context.z0, generator(tokens, context, shift)), 1)
    assert_agrees(ours, conditions, weights, tokens)
    assert_agrees(generator.predict(tokens, numbers, drop, shift),
                  lambda *args: conditions(*args)[:, :-1], weights, tokens)
    assert_agrees(generator.predict(tokens[:, :1], numbers, drop, shift),
                  lambda *args: conditions(*args)[:, :1], weights, tokens)


@torch.no_grad()
def test_head_numerics(generator_weights):
    generator, weights = generator_weights
    x, z = torch.randn(8, 16), torch.randn(8, 64)
    t = torch.tensor([0, 1e-5, 0.01, 0.3, 0.5, 0.7, 0.99, 1])
    assert_agrees(generator.head(x, t, z), reference.velocity, weights, x, t, z)


@pytest.mark.parametrize("guidance, schedule", [(3.5, "linear"), (2.0, "constant"),
                                                (1.0, "linear")])
@torch.no_grad()
def test_sampling_numerics(generator_weights, guidance, schedule):
    generator, weights = generator_weights
    seeds, labels, columns, steps = [5, 9], [2, 0], 7, 5  # longer than the window
    noise = torch.stack([column_noise(seeds, i, 16) for i in range(columns)], 1)
    options = dict(cfg=guidance, schedule=schedule, steps=steps)
    ours = sample_tokens(generator, torch.tensor(labels), columns, seeds, **options)
    stream = Stream(generator, torch.tensor(labels), seeds, ColumnSampler(generator.head, steps),
                    Guidance(guidance, schedule, columns))
    for i in range(4):
        stream.feed(ours[:, i])
    on = torch.cat((ours[:, :4], torch.stack([stream.draw() for _ in range(3)], 1)), 1)
    for drawn in ours, on:  # from the start, and from four given columns
        assert_agrees(drawn, lambda w, noise: reference.trajectory(
            w, noise, labels, HEADS, WINDOW, steps, guidance, schedule == "linear"), weights, noise)


@torch.no_grad()
def test_generated_image_numerics(shared):
    weights, decoder = random_generator(1), random_tokenizer()
    model = load_generator(shared / "loud.pt")
    noise = torch.stack([column_noise([4], i, 16) for i in range(5)], 1)
    ours = model.sample(["class 1"], 5, seed=4, cfg=2.0, steps=4)

    def image(w, noise):
        tokens = reference.trajectory(w, noise, [1], HEADS, WINDOW, 4, 2.0)
        decoded = reference.in_dtype(decoder, noise.dtype)
        return reference.image_of_tokens(decoded, tokens / 0.05493).clamp(-1, 1)

    assert_agrees(ours, image, weights, noise)


def test_every_weight_matters():
    """The comparisons above would notice any weight: all outputs' gradients together miss none.

    But for the biases of unrotated keys, which add the same to all of a query's scores.
    """
    weights = reference.in_dtype(random_tokenizer() | random_generator(), torch.float64)
    for w in weights.values():
        w.requires_grad_()
    image, tokens = torch.rand(1, 3, 32, 24).double(), torch.randn(2, 6, 16).double()
    x, t, z = (torch.randn(*shape).double() for shape in ((8, 16), (8,), (8, 64)))
    outputs = (reference.tokens_of_image(weights, image),
               reference.image_of_tokens(weights, tokens[:1]),
               reference.semantic_map(weights, tokens[:1]),
               reference.transformer(weights, tokens, [0, 1], HEADS, WINDOW),
               reference.transformer(weights, tokens, [2, None], HEADS, WINDOW),
               reference.velocity(weights, x, t.sigmoid(), z))
    sum((torch.randn_like(y) * y).mean() / y.std() for y in outputs).backward()
    keys = convert.plan_tokenizer({k: tuple(v.shape) for k, v in random_tokenizer().items()})[1]
    names = [*keys.values(), *random_generator()]
    blind = {name for name in names if weights[name].grad is None or not (
        weights[name].grad.norm() * weights[name].norm() > 1e-4)}
    assert {name for name in names if name.endswith(("attn_1kbias", "attn2.k.bias"))} < blind
    assert all("attn" in name and name.endswith(("kbias", "attn2.k.bias")) for name in blind)


# ---- keys ------------------------------------------------------------------------------------

def test_paper_sizes():
    """The released sizes map completely, to as many weights as the paper's models have."""
    def millions(shapes, keys, part=""):
        return round(sum(math.prod(shapes[key]) for ours, key in keys.items()
                         if ours.startswith(part)) / 1e6, 2)

    shapes = reference.tokenizer_layout()
    for raw in False, True:
        config, keys = convert.plan_tokenizer(shapes, raw)
        assert (config.image_size, config.multipliers, config.blocks) == (256, (1, 1, 2, 4, 4), 2)
        assert (config.base_channels, config.z_channels, config.token_channels) == (128, 256, 256)
        assert config.attention_rows == (16,) and config.semantic_channels == 768
        assert [millions(shapes, keys, part) for part in (
            "encoder.", "to_tokens.", "from_tokens.", "decoder.")] == [86.05, 3.15, 3.15, 121.55]
    for sizes, heads, total in (((16, 512, 960), 8, 127.31), ((24, 768, 1024), 12, 295.59),
                                ((32, 1024, 1280), 16, 644.50), ((40, 1280, 1536), 16, 1203.21)):
        layers, width, head_width = sizes
        shapes = reference.generator_layout(layers, width, 1000, head_width=head_width)
        config, keys = convert.plan_generator(shapes)
        assert (config.layers, config.embed_dim, config.head_width) == sizes
        assert (config.heads, config.window, config.head_depth) == (heads, 4, 12)
        assert millions(shapes, keys) == total and set(keys.values()) == set(shapes)


@pytest.mark.parametrize("sizes", [
    dict(multipliers=(2,), attention_stages=()),
    dict(multipliers=(1, 3), blocks=1, rows=5, attention_stages=(0, 1)),
    dict(base=32, multipliers=(1, 2, 1, 4), attention_stages=(0, 3), z=3, tokens=7),
    dict(blocks=4, semantic=0, attention_stages=(1, 4))])
def test_other_tokenizer_sizes(sizes):
    shapes = reference.tokenizer_layout(**sizes)
    config, keys = convert.plan_tokenizer(shapes)
    full = reference.tokenizer_layout.__defaults__
    names = ("base", "multipliers", "blocks", "attention_stages", "z", "tokens", "rows", "semantic")
    want = dict(zip(names, full)) | sizes
    f = 2 ** (len(want["multipliers"]) - 1)
    height = want["rows"] * f
    assert (config.base_channels, config.multipliers, config.blocks, config.z_channels,
            config.token_channels, config.image_size, config.semantic_channels) == (
        want["base"], want["multipliers"], want["blocks"], want["z"], want["tokens"], height,
        want["semantic"])
    assert config.attention_rows == tuple(height >> i for i in want["attention_stages"])
    unused = [key for key in shapes if key.startswith("ema_") and key not in keys.values()]
    assert all(key.endswith(("decay", "num_updates")) or "block2" in key for key in unused)


def bad(change):
    """Shapes of a release generator after `change`, and the message that they must cause."""
    shapes = reference.generator_layout(**GENERATOR)
    change(shapes)
    with pytest.raises(UserError) as caught:
        convert.plan_generator(shapes, HEADS)
    return str(caught.value)


def test_key_errors():
    name = "encoder_blocks.1.mlp.fc1.weight"
    assert bad(lambda s: s.update({"new.weight": (3,)})) == "unknown: new.weight"
    assert bad(lambda s: s.pop(name)) == f"missing: {name}"
    assert bad(lambda s: s.update({name: (256, 63)})) == (
        f"misshapen: {name} is (256, 63), not (256, 64)")
    assert bad(lambda s: s.update({name: None})) == (
        f"misshapen: {name} is no plain tensor, not (256, 64)")
    many = bad(lambda s: s.update({f"new.{i:02}": () for i in range(25)}))
    assert many.count("new.") == 10 and many.endswith("new.09 and 15 more")
    both = bad(lambda s: (s.pop(name), s.update({"new.weight": ()})))
    assert both == f"unknown: new.weight; missing: {name}"
    for key in "class_emb.weight", "diffloss.net.input_proj.weight", "z_proj.weight":
        assert key in bad(lambda s: s.pop(key)) and key in bad(lambda s: s.update({key: None}))
        assert key in bad(lambda s: s.update({key: ()}))
    assert "sizes" in bad(lambda s: s.update({"class_emb.weight": (3, 2**61)}))


@pytest.mark.parametrize("key", [
    "ema_encoder.conv_inweight", "ema_encoder.encoder1dweight", "ema_quant_layer.weight",
    "ema_encoder.down0block0conv1weight", "ema_encoder.down2attn1qbias",
    "ema_decoder.up0block2norm1bias",
    "ema_semantic_decoder.conv_outweight", "ema_semantic_decoder.down1block1conv2bias"])
def test_missing_tokenizer_keys(key):
    shapes = reference.tokenizer_layout(**TOKENIZERS["semantic"][0])
    convert.plan_tokenizer(shapes)
    for change in {}, {key: (5, 5)}, {key: ()}, {key: None}:
        with pytest.raises(UserError):
            convert.plan_tokenizer({k: v for k, v in shapes.items() if k != key} | change)


@pytest.mark.parametrize("key", ["ema_encoder.down3block0conv2weight", "ema_encoder.extra",
                                 "ema_semantic_decoder.down0block3conv1weight", "other.weight"])
def test_unknown_tokenizer_keys(key):
    shapes = reference.tokenizer_layout(**TOKENIZERS["semantic"][0])
    with pytest.raises(UserError, match=key):
        convert.plan_tokenizer(shapes | {key: (3,)})


# ---- the command -----------------------------------------------------------------------------

def refused(*argv, match):
    """The command fails with one line, and writes nothing."""
    folder = Path(argv[argv.index("--out") + 1]).parent
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        converted(*argv)
    assert "\n" not in str(caught.value)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_raw_and_ema(tmp_path, tokenizer_pt):
    weights = random_tokenizer()
    raw = converted(tmp_path / "tokenizer.ckpt", "--raw", "--latent-scale", 0.25,
                    "--out", tmp_path / "raw.pt")
    contents = [checkpoint.load(path, "tokenizer") for path in (tokenizer_pt, raw)]
    for content, key in zip(contents, ("ema_encoder.conv_inweight", "encoder.conv_in.weight")):
        assert torch.equal(content["ema"]["encoder.conv_in.weight"], weights[key])
        assert content["classes"] == [] and content["config"]["preset"] == "converted"
        assert set(content) == {"config", "classes", "ema", "equimini", "format"}
    assert torch.equal(contents[1]["ema"]["latent_std"], torch.full((16,), 4.0))
    source = generator_file(tmp_path / "g.ckpt", random_generator(1), random_generator(2))
    for flags, seed in ([], 1), (["--raw"], 2):
        path = converted(source, *flags, "--tokenizer", tokenizer_pt, "--heads", 4, "--overwrite",
                         "--out", tmp_path / "g.pt")
        content = checkpoint.load(path, "generator")
        want = random_generator(seed)["class_emb.weight"]
        assert torch.equal(content["ema"]["class_table.weight"], want)
        assert content["classes"] == ["class 0", "class 1", "class 2"]
        assert content["config"]["model"]["window"] == 4
        inner = content["tokenizer"]
        assert inner["config"] == contents[0]["config"]["model"]
        assert all(torch.equal(inner["weights"][k], v) for k, v in contents[0]["ema"].items())


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype, new_format, tmp_path):
    weights = reference.in_dtype(random_tokenizer("tiny"), dtype)
    source = tokenizer_file(tmp_path / "a.ckpt", weights,
                            _use_new_zipfile_serialization=new_format)
    ema = checkpoint.load(converted(source, "--out", tmp_path / "a.pt"), "tokenizer")["ema"]
    assert all(w.dtype == torch.float32 for w in ema.values())
    assert torch.equal(ema["to_tokens.bias"], weights["ema_quant_layer.bias"].float())


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """Neither the raw copies nor anything else of the file enters memory."""
    weights = random_tokenizer("tiny")
    source = tokenizer_file(tmp_path / "a.ckpt", weights)
    seen, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read",
                        lambda self, name, *rest: seen.append(name) or read(self, name, *rest))
    converted(source, "--out", tmp_path / "a.pt")
    tensors = sum("/data/" in name for name in seen)
    bookkeeping = 8  # decay and num_updates of four parts
    assert tensors == sum(key.startswith("ema_") for key in weights) - bookkeeping


def test_options_and_output(tmp_path, tokenizer_pt):
    ours, out = tmp_path / "tokenizer.ckpt", ("--out", tmp_path / "new.pt")
    source = generator_file(tmp_path / "g.ckpt", random_generator(), random_generator())
    good = (source, "--tokenizer", tokenizer_pt, "--heads", 4)
    refused(ours, "--out", tokenizer_pt, match="exists.*--overwrite")
    refused(ours, "--out", tmp_path, match="exists")
    refused(ours, "--out", ours, "--overwrite", match="one of the files to read")
    refused(*good, "--out", tokenizer_pt, "--overwrite", match="one of the files to read")
    refused(ours, "--heads", 4, *out, match="--heads is for generators")
    refused(ours, "--class-names", ours, *out, match="--class-names is for generators")
    refused(ours, "--latent-scale", 0, *out, match="above 0")
    refused(ours, "--latent-scale", "nan", *out, match="above 0")
    refused(*good, "--latent-scale", 1, *out, match="for tokenizers")
    refused(source, *out, match="--tokenizer is needed")
    refused(source, "--tokenizer", tmp_path / "none.pt", *out, match="no checkpoint")
    refused(source, "--tokenizer", ours, *out, match="not an equimini checkpoint")
    for heads in 0, 5, 64, -1:
        refused(source, "--tokenizer", tokenizer_pt, "--heads", heads, *out, match="heads")
    refused(*good, "--window", 0, *out, match="window must be at least 1")
    refused(tmp_path / "none", *out, match="No such file")
    refused(tmp_path, *out, match="directory")
    refused(tokenizer_pt, *out, match="neither 'state_dict'")
    names = tmp_path / "names.txt"
    for text in "a\nb\n", "a\nb\nb\n", "a\n\nc\n":
        names.write_text(text)
        refused(*good, "--class-names", names, *out, match="3 different names")
    names.write_bytes(b"\xff\xfe\n")
    refused(*good, "--class-names", names, *out, match="cannot read")
    names.write_text("sea\nmountain road\nforêt\n")
    path = converted(*good, "--class-names", names, *out)
    assert checkpoint.load(path, "generator")["classes"] == ["sea", "mountain road", "forêt"]


def test_tokenizer_must_fit(tmp_path, tokenizer_pt):
    shapes = reference.generator_layout(**GENERATOR | {"tokens": 8})
    weights, out = reference.random_weights(shapes, 0), ("--out", tmp_path / "g.pt")
    source = generator_file(tmp_path / "g.ckpt", weights, weights)
    refused(source, "--tokenizer", tokenizer_pt, "--heads", 4, *out, match="16 channels.*8")
    content = checkpoint.load(tokenizer_pt, "tokenizer")
    content["ema"]["latent_std"].fill_(math.nan)
    checkpoint.save(tmp_path / "unmeasured.pt", "tokenizer", content)
    source = generator_file(tmp_path / "g.ckpt", random_generator(), random_generator())
    refused(source, "--tokenizer", tmp_path / "unmeasured.pt", "--heads", 4, *out,
            match="statistics have not been measured")
    torch.save({"model": random_generator()}, source)
    refused(source, "--tokenizer", tokenizer_pt, "--heads", 4, *out, match="no weights under")
    whole = random_generator()
    whole["fake_latent"] = whole["fake_latent"].long()
    generator_file(source, whole, whole)
    refused(source, "--tokenizer", tokenizer_pt, "--heads", 4, *out, match="fake_latent.*int64")


# ---- files that nobody should trust ----------------------------------------------------------

class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


class Trap:
    """Pickles as an object whose state is handed to a function of ours."""

    def __init__(self, path=None):
        self.path = path

    def __setstate__(self, state):
        Path(state["path"]).touch()


def payloads(marker):
    """Objects that create the file `marker` when they are unpickled."""
    touch = f"open({str(marker)!r}, 'w').close()"
    evil = Call(os.system, f"touch {marker}")
    tensor = torch._tensor._rebuild_from_type_v2
    return {
        "system": evil, "eval": Call(builtins.eval, touch), "exec": Call(builtins.exec, touch),
        "namespace": argparse.Namespace(deep=[{"er": argparse.Namespace(x=(evil,))}]),
        "setstate": Trap(str(marker)),
        "list of items": collections.deque([evil]), "key": {evil: 1},
        "array": [np.arange(3), np.array([evil], dtype=object)],
        "tensor": Call(tensor, os.system, torch.Tensor, (f"touch {marker}",), {}),
        "parameter": Call(torch._utils._rebuild_parameter, evil, False, collections.OrderedDict()),
    }


@pytest.mark.parametrize("place, new_format", [
    ("weights", False), ("extra", True), *(pytest.param(*rest, marks=pytest.mark.slow)
                                           for rest in (("weights", True), ("extra", False)))])
@pytest.mark.parametrize("name", payloads(""))
def test_nothing_is_run(name, new_format, place, tmp_path):
    marker, source = tmp_path / "marker", tmp_path / "a.ckpt"
    payload = payloads(marker)[name]
    weights = random_tokenizer("tiny")
    if place == "weights":
        weights["loss.evil"] = payload
    tokenizer_file(source, weights, extra=payload,
                   _use_new_zipfile_serialization=new_format)
    out = converted(source, "--out", tmp_path / "a.pt")
    assert not marker.exists()
    weight = checkpoint.load(out, "tokenizer")["ema"]["from_tokens.weight"]
    assert torch.equal(weight, weights["ema_post_quant_layer.weight"])
    with ForeignFile(source) as file:
        assert stored(file.content["state_dict"].get("loss.evil")) is None
    assert not marker.exists()
    try:  # the trap is a real one: torch's own loading without weights_only springs it
        with lightning():
            torch.load(source, weights_only=False)
    except (TypeError, AttributeError, RuntimeError):
        pass
    assert marker.exists()


class Script(torch.nn.Module):
    """Writes a file when it is loaded, with nothing but TorchScript."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> Tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: Tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_is_not_run(tmp_path):
    marker, source = tmp_path / "marker", tmp_path / "a.ckpt"
    torch.jit.script(Script(str(marker))).save(str(source))
    marker.unlink(missing_ok=True)
    refused(source, "--out", tmp_path / "a.pt", match="neither")
    assert not marker.exists()
    inert = types.SimpleNamespace(Unpickler=pickle.Unpickler, load=None, __name__="inert")
    torch.load(source, weights_only=False, pickle_module=inert)  # the trap is a real one
    assert marker.exists()


@pytest.mark.parametrize("function", [os.system, os.popen])
def test_nothing_is_run_in_a_bare_pickle(function, tmp_path):
    """Each of the legacy format's pickles is a program of its own, and so is an old protocol's."""
    marker = tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for before in ([], [convert_magic()], [convert_magic(), 1001],
                       [convert_magic(), 1001, {}], [convert_magic(), 1001, {}, {}]):
            parts = [*before, Call(function, f"touch {marker}")]
            (tmp_path / "a.ckpt").write_bytes(b"".join(pickle.dumps(p, protocol) for p in parts))
            refused(tmp_path / "a.ckpt", "--out", tmp_path / "a.pt", match="damaged|neither")
    (tmp_path / "a.ckpt").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    refused(tmp_path / "a.ckpt", "--out", tmp_path / "a.pt", match="damaged")
    assert not marker.exists()


def convert_magic():
    """The number a legacy file starts with, taken from torch."""
    return torch.serialization.MAGIC_NUMBER


class Writer(pickle.Pickler):
    """Writes data.pkl with storages of our own invention."""

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Storage) else None


class Storage(tuple):
    """A reference to a storage in a hand-made file."""


def hand_made(path, content, **storages):
    """A zip file with this content, and raw bytes as its storages."""
    buffer = io.BytesIO()
    Writer(buffer, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return path


def tensor(offset, size, stride, numel=6, key="s", kind=torch.FloatStorage, view=None):
    """A tensor's pickle with numbers of our choice."""
    storage = Storage(("storage", kind, key, "cpu", numel, *([] if view is None else [view])))
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def test_tensors_are_bounds_checked(tmp_path):
    data = np.arange(6, dtype=np.float32)
    cases = [((0, (2, 3), (3, 1)), True), ((0, (3, 2), (1, 3)), True), ((1, (2,), (3,)), True),
             ((5, (), ()), True), ((6, (0,), (1,)), True),
             ((6, (), ()), False), ((0, (2, 3), (4, 1)), False), ((1, (2, 3), (3, 1)), False),
             ((-1, (2,), (1,)), False), ((5, (2,), (-1,)), False), ((0, (-1,), (1,)), False),
             ((0, (2, 3), (3,)), False), ((0, (7,), (0,)), False), ((0, (2**62,), (1,)), False),
             ((0, (1, 2**80), (0, 0)), False), (("0", (2,), (1,)), False),
             ((0, 2, (1,)), False), ((0, ("2",), (1,)), False), ((0, (2.0,), (1,)), False)]
    for (offset, size, stride), fits in cases:
        path = hand_made(tmp_path / "a.ckpt", tensor(offset, size, stride), s=data.tobytes())
        with ForeignFile(path) as file:
            found = stored(file.content)
            assert (found is not None) == fits, (offset, size, stride)
            if fits:
                want = torch.from_numpy(data).as_strided(size, stride, offset)
                assert torch.equal(file.read(found), want)
    for made in (tensor(0, (7,), (1,), numel=7), tensor(0, (6,), (1,), kind=torch.DoubleStorage),
                 tensor(0, (2,), (1,), numel=2), tensor(0, (2,), (1,), key="../data.pkl"),
                 tensor(0, (2,), (1,), key="t")):
        with ForeignFile(hand_made(tmp_path / "a.ckpt", made, s=data.tobytes())) as file:
            with pytest.raises(UserError, match="damaged"):
                file.read(stored(file.content))
    for kind in (os.system, argparse.Namespace, "torch.FloatStorage", None):
        with ForeignFile(hand_made(tmp_path / "a.ckpt", tensor(0, (2,), (1,), kind=kind))) as file:
            assert stored(file.content) is None
    with pytest.raises(UserError, match="view of a storage"):
        ForeignFile(hand_made(tmp_path / "a.ckpt", tensor(0, (2,), (1,), view=("s", 0, 2))))
    with pytest.raises(UserError, match="damaged"):
        ForeignFile(hand_made(tmp_path / "a.ckpt", Storage()))


@FORMATS
def test_tensors_of_every_kind(new_format, tmp_path):
    """What torch.save writes of a tensor is read as torch reads it."""
    base = torch.arange(24.0).reshape(4, 6)
    tagged, state = torch.randn(3), torch.nn.Parameter(torch.randn(2, 2))
    tagged.note, state.note = "with an attribute", "and so has this"
    values = {"plain": base, "transposed": base.T, "slice": base[1:3, ::2], "row": base[2],
              "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "tagged": tagged,
              "parameter": torch.nn.Parameter(base[1]), "with state": state,
              "alone": torch.randn(7), "view of view": base.T[1:4].T[2:],
              **{str(dtype): torch.arange(5).to(dtype) for dtype in (
                  torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                  torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)}}
    path = tmp_path / "a.ckpt"
    torch.save(values, path, _use_new_zipfile_serialization=new_format)
    with ForeignFile(path) as file:
        assert list(file.content) == list(values)
        for name, want in values.items():
            tensor = file.read(stored(file.content[name]))
            assert tensor.dtype == want.dtype and torch.equal(tensor, want), name
            assert tensor.is_contiguous() and type(tensor) is torch.Tensor


@FORMATS
def test_damaged_files(new_format, tmp_path):
    """Cut short or with bytes changed, a file gives a UserError or what it says, nothing else."""
    whole, path, errors = io.BytesIO(), tmp_path / "a.ckpt", 0
    torch.save({"state_dict": {f"w{i}": torch.randn(3, 3) for i in range(3)}, "n": [1, "x"],
                "args": argparse.Namespace(a=1)}, whole, _use_new_zipfile_serialization=new_format)
    whole, rng = whole.getvalue(), np.random.default_rng(0)
    for trial in range(300):
        data = bytearray(whole)
        if trial % 3:
            for place in rng.integers(len(data), size=rng.integers(1, 4)):
                data[place] = rng.integers(256)
        else:
            data = data[:rng.integers(len(data))]
        path.write_bytes(data)
        try:
            with ForeignFile(path) as file:
                args = argparse.Namespace(raw=False, latent_scale=None, tokenizer=None, heads=None,
                                          window=None, class_names=None)
                with pytest.raises(UserError):
                    convert.convert_tokenizer(file, args)
                weights = file.content.get("state_dict", {})
                for tensor in map(stored, weights.values()):
                    if tensor is not None:
                        file.read(tensor)
        except UserError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 100


def test_command_line(tmp_path, capsys, monkeypatch):
    from equimini.utils.command_line import run
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "none"), "--out", "x.pt"])
    with pytest.raises(SystemExit) as caught:
        run(convert.main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read")
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    shown = capsys.readouterr().out
    assert "--latent-scale" in shown and "python -m equimini.convert tokenizer.ckpt" in shown
