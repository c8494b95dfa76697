"""The benchmarks, small: what they compute, and what they print."""

import importlib.util
import json
import re

import pytest
import torch
from torch import Tensor, nn

from equimini.attention import implementation
from equimini.bench import attention, sample, solvers, train
from equimini.kernel.operators import visible_pairs
from equimini.presets import PRESETS
from equimini.sampling.image_generator import ImageGenerator
from equimini.utils.errors import UserError
from tests.conftest import small_generator


class Features(nn.Module):
    """Called as a feature network is: 4 features of uint8 pictures."""

    def forward(self, x: Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), (2, 2)).mean(1).flatten(1)


def test_sampling_benchmark(capsys):
    arguments = ["--preset", "tiny", "--columns", "5", "--steps", "2", "--batch", "1", "2"]
    sample.main([*arguments, "--json", "--plain"])
    about, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert "preset tiny" in about["what"]
    assert [(r["batch"], r["method"]) for r in rows] == [
        (b, m) for b in (1, 2) for m in ("literal", "plain", "float32", "bf16")]
    for row in rows:
        parts = row["head_s_per_column"] + row["transformer_s_per_column"]
        assert parts == pytest.approx(row["s_per_column"])
        assert 0 < row["head_s_per_column"] < row["s_per_column"]
        assert row["s_per_column"] * 5 == pytest.approx(row["s_per_image"] * row["batch"])
        if row["method"] in ("plain", "float32"):
            assert row["rms_deviation"] < 1e-4
        if row["method"] == "bf16":
            assert 1e-4 < row["rms_deviation"] < 0.1
    sample.main([*arguments, "--no-literal", "--precision", "bf16"])
    assert "literal" not in capsys.readouterr().out.split("faster")[1]


def test_solver_benchmark(model, picture_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solvers, "load_generator", lambda *_: model)
    torch.jit.script(Features()).save(str(tmp_path / "net.pt"))
    arguments = ["--count", "5", "--evaluations", "4,40", "--batch-size", "5", "--columns", "3",
                 "--out", str(tmp_path / "out"), "--time-shifts", "1,2"]
    solvers.main([*arguments, "--network", str(tmp_path / "net.pt"), "--data",
                  str(picture_folder), "--distance-count", "8"])
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert len(rows) == 12 and {r["evaluations"] for r in rows} == {4, 40}
    found = {(r["solver"], r["time_shift"], r["evaluations"]): r for r in rows}
    for solver in ("euler", "midpoint", "heun"):
        coarse, fine = (found[solver, 1.0, n]["column_error"] for n in (4, 40))
        assert fine < coarse / 5
    for solver in ("midpoint", "heun"):
        assert found[solver, 1.0, 40]["column_error"] < found["euler", 1.0, 40]["column_error"] / 5
    assert all(r["frechet"] >= 0 for r in rows)
    assert "midpoint: 40 evaluations give columns as exact as euler's 40" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json", "column-error.png", "image-error.png", "frechet.png"}


@pytest.mark.parametrize("objective, solver", (("flow-matching", "heun"),
                                               ("mean-flow", "mean-flow")))
@pytest.mark.parametrize("cfg", (1.0, 3.0))
def test_single_columns_are_the_samplers(tokenizer, cfg, objective, solver):
    """Columns drawn alone after a solver's own columns are that solver's image."""
    model = ImageGenerator(small_generator(objective=objective), tokenizer, ["cat", "dog", "eel"])
    case = solvers.Case(model, solvers.SolverBench(cfg=cfg, count=3, batch_size=2), 3)
    tokens = case.images(3, "", steps=3, solver=solver)
    again = case.single_columns(tokens, steps=3, solver=solver)
    torch.testing.assert_close(again, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bench, arguments, message", (
    (solvers, "--solvers euler,rk4",
     "--solvers takes euler, midpoint, heun, mean-flow, got 'rk4'"),
    (solvers, "--time-shifts 1,0", "--time-shifts takes numbers above 0"),
    (solvers, "--network net.pt", "both --network and --data"),
    (sample, "--cuda-graphs --device cpu", "--cuda-graphs needs a CUDA device"),
    (train, "--device cpu --settings plain,slow", "--settings takes plain, .*got 'slow'"),
    (train, "--device cpu --settings tf32", "--settings tf32 needs a CUDA device")))
def test_mistakes(bench, arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main([*arguments.split(), *(["--preset", "tiny"] if bench is not solvers else [])])


@pytest.mark.slow
def test_training_benchmark(capsys, monkeypatch):
    monkeypatch.setattr(train, "peak_rate", lambda *_: (1e12, "measured"))
    arguments = ["--preset", "tiny", "--batch-size", "2", "--steps", "1", "--device", "cpu"]
    train.main([*arguments, "--settings", "fused", "--profile"])  # bf16 products are slow here
    table = capsys.readouterr().out.splitlines()
    values = dict(zip(table[2].replace("of peak", "peak").replace("peak GiB", "GiB")
                      .replace("first s", "first").split(), table[3].split()))
    assert values["setting"] == "fused" and values["faster"] == "1.00"
    assert float(values["images/s"]) == pytest.approx(2000 / float(values["ms/step"]), rel=0.01)
    assert 0.1 < float(values["GiB"]) < 8
    assert 0 < float(values["MFU"].rstrip("%"))
    assert len(table) == 4 + 12 + 1 and any("aten::addmm" in line for line in table)


def test_model_flops():
    """Forward and backward of a linear layer on B rows: 6·B·in·out; 4 where the input is data."""
    preset = PRESETS["tiny"]
    n, c, g = preset.tokenizer.columns, preset.tokenizer.token_channels, preset.generator
    d, w, m, b = g.embed_dim, g.head_width, 4, 3
    total, head = train.model_flops("tiny", b, m)
    rows = b * n
    per_draw = 6 * (w * w * (1 + 5 * g.head_depth + 2) + w * c) + 4 * (256 + c) * w
    assert head == rows * (m * per_draw + 6 * d * w)
    image, classes = b * (n - 1), b * g.class_tokens
    body = image * (4 * c * d + 6 * g.layers * 14 * d * d)
    body += classes * 6 * g.layers * (2 + 8) * d * d
    assert head + body < total  # and the attention's products
    pairs = b * (visible_pairs(n - 1, n - 1, g.window) + (n - 1) * g.class_tokens)
    assert total - head - body <= g.layers * pairs * d * (4 + 10)
    assert train.model_flops("tiny", 2 * b, m) == (2 * total, 2 * head)


def test_peak_rates(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
             "NVIDIA H200 NVL": 835e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12,
             "NVIDIA L4": 121e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        assert train.peak_rate(torch.device("cuda"), "bf16") == (peak, "published")
    assert train.peak_rate(torch.device("cuda"), "float32")[0] < 1e14
    assert not any(re.search(rf"\b{known}\b", "NVIDIA L40") for known in train.PEAKS)
    monkeypatch.setattr(train, "median_seconds", lambda run, device: 0.5)
    rate, source = train.peak_rate(torch.device("cpu"), "bf16")
    assert rate == 4 * 2048**3 and source == "measured, 2048x2048"


def test_a_peer_that_cannot_is_left_out(monkeypatch, capsys):
    def cannot(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(attention, "PEERS", {
        "sdpa": cannot, "efficient": lambda *_: cannot, "flex": lambda *_: lambda q, k, v: q})
    rows = attention.attention_case((1, 5, 1, 8, 2), "cpu", torch.float32, 1e9,
                                    ["sdpa", "efficient", "flex"], (False,))
    assert [row["method"] for row in rows] == ["equimini", "equimini"]
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["# sdpa does not run here: no such kernel",
                        "# efficient does not run here: no such kernel"]
    assert any(re.fullmatch("# flex does not run here: it gives another result, .* off", line)
               for line in said)
    monkeypatch.setattr(attention, "window_attention", cannot)
    with pytest.raises(RuntimeError):  # ours has to
        list(attention.attention_case((1, 5, 1, 8, 2), "cpu", torch.float32, 1e9, []))


def test_attention_benchmark(capsys):
    """A line of JSON for each figure; peers give the same result, or a reason why not."""
    attention.main("--shape 2 12 2 16 3 --dtype float32 bfloat16 --json --no-rope --device cpu "
                   "--peers sdpa efficient cudnn".split())
    printed = capsys.readouterr()
    about, *rows = map(json.loads, printed.out.splitlines())
    assert about["dtype"] == ["float32", "bfloat16"]
    assert [(r["dtype"], r["method"], r["pass"], r["rope"]) for r in rows] == [
        (dtype, name, x, False) for dtype in about["dtype"] for name in ("equimini", "sdpa")
        for x in ("forward", "backward")], printed.err
    assert "# efficient does not run here: its kernels are for CUDA alone" in printed.err
    narrow = implementation("cpu") == "C++"
    for row, tensors, lse in zip(rows, (4, 7 if narrow else 8), (4, 4 * (not narrow))):
        moved = row["gb_per_s"] * row["ms"] * 1e6
        assert moved == pytest.approx(2 * 12 * 2 * (tensors * 16 * 4 + lse))


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["flex", "flex-folded", "shifts"])
def test_compiled_peers_attend_over_the_same_window(peer):
    q, k, v = torch.randn(8, 16, 3, 2, 16).unbind(2)
    ours = attention.window_attention(q, k, v, 3)
    torch.testing.assert_close(attention.PEERS[peer](8, 16, 3, "cpu")(q, k, v), ours)


def test_efficient_attention_takes_these_shapes():
    """As far as torch knows them without a GPU: forward on the meta device, backward's schema."""
    q, k, v = torch.empty(3, 2, 12, 2, 16, device="meta").unbind(0)
    assert attention.PEERS["efficient"](2, 12, 3, "meta")(q, k, v).shape == q.shape
    names = [x.name for x in torch.ops.aten._efficient_attention_backward.default._schema.arguments]
    assert names[:15] == ["grad_out_", "query", "key", "value", "bias", "out", "cu_seqlens_q",
                          "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "logsumexp", "dropout_p",
                          "philox_seed", "philox_offset", "custom_mask_type"]
    assert "window_size" in names


def test_jax_in_a_process_of_its_own():
    qkv = torch.randn(2, 12, 3, 2, 16)
    grad = attention.like_output(qkv)
    if not importlib.util.find_spec("jax"):
        with pytest.raises(UserError, match="No module named 'jax'"):
            attention.in_jax(qkv, grad, 3)
        return
    found, seconds = attention.in_jax(qkv, grad, 3, kind="xla", repeats=3)
    attend = lambda q, k, v: attention.window_attention(q, k, v, 3)  # noqa: E731
    attention.same(found, [x for backward in (False, True)
                           for x in attention.results(attend, qkv, backward)])
    assert len(seconds) == 2 and min(seconds) > 0
