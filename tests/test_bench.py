"""The benchmarks of sampling, small: what they compute, and what they print."""

import json

import pytest
import torch
from torch import Tensor, nn

from equimini.bench import sample, solvers
from equimini.cli import UserError
from equimini.pipeline import ImageGenerator


class Features(nn.Module):
    """Called as a feature network is: 4 features of uint8 pictures."""

    def forward(self, x: Tensor, return_features: bool = False,
                no_output_bias: bool = False) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), (2, 2)).mean(1).flatten(1)


@pytest.fixture
def model(generator, tokenizer, monkeypatch) -> ImageGenerator:
    model = ImageGenerator(generator, tokenizer, ["cat", "dog", "eel"])
    monkeypatch.setattr(solvers, "load_generator", lambda *_: model)
    return model


def test_sampling_benchmark(capsys):
    arguments = ["--preset", "tiny", "--columns", "5", "--steps", "2", "--batch", "1", "2"]
    sample.main([*arguments, "--json", "--plain"])
    rows = json.loads(capsys.readouterr().out)["rows"]
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
    with pytest.raises(UserError, match="--cuda-graphs needs a CUDA device"):
        sample.main([*arguments, "--cuda-graphs", "--device", "cpu"])


def test_solver_benchmark(model, picture_folder, tmp_path, capsys):
    torch.jit.script(Features()).save(str(tmp_path / "net.pt"))
    arguments = ["--count", "5", "--evaluations", "4,40", "--batch-size", "2", "--columns", "4",
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


@pytest.mark.parametrize("cfg", (1.0, 3.0))
def test_single_columns_are_the_samplers(model, cfg):
    """Columns drawn alone after a solver's own columns are that solver's image."""
    bench = solvers.SolverBench(cfg=cfg, count=3, batch_size=2)
    case = solvers.Case(model, bench, 3)
    tokens = case.images(3, "", steps=3, solver="heun")
    again = case.single_columns(tokens, steps=3, solver="heun")
    torch.testing.assert_close(again, tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, message", (
    (["--solvers", "euler,rk4"], "--solvers takes euler, midpoint, heun, got 'rk4'"),
    (["--time-shifts", "1,0"], "--time-shifts takes numbers above 0"),
    (["--network", "net.pt"], "both --network and --data")))
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        solvers.main(arguments)
