"""Checkpoint files."""

import os
from pathlib import Path

import pytest
import torch

from equimini import load_generator, load_tokenizer
from equimini.convert.pack import pack
from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from tests.helpers.scripts import call


def test_round_trip(tokenizer, saved_tokenizer, tmp_path):
    again = load_tokenizer(saved_tokenizer)
    x = torch.rand(1, 3, 32, 24) * 2 - 1
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again.latent_std, tokenizer.latent_std) and not again.training
    assert checkpoint.load(saved_tokenizer, "tokenizer")["step"] == 7
    assert os.listdir(tmp_path) == ["t.pt"]


def test_what_cannot_be_read_is_one_clear_error(saved_tokenizer, tmp_path):
    path, content = saved_tokenizer, checkpoint.load(saved_tokenizer, "tokenizer")
    with pytest.raises(UserError, match="not a generator"):
        checkpoint.load(path, "generator")
    with pytest.raises(UserError, match="no checkpoint"):
        load_tokenizer(tmp_path / "missing.pt")
    whole = path.read_bytes()
    for broken in (whole[:1000], whole[:-200], b"", b"hello"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="t.pt"):
            load_tokenizer(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not an equimini checkpoint"):
        load_tokenizer(path)
    del content["ema"]["encoder.conv_in.weight"]
    checkpoint.save(path, "tokenizer", content)
    with pytest.raises(UserError, match="do not fit"):
        load_tokenizer(path)


def test_a_flipped_byte_is_detected_anywhere_in_the_weights(tokenizer, saved_tokenizer):
    path, whole = saved_tokenizer, bytearray(saved_tokenizer.read_bytes())
    for place in range(len(whole) // 4, 3 * len(whole) // 4, len(whole) // 16):
        whole[place] ^= 1
        path.write_bytes(whole)
        try:  # bytes between the records (padding) carry nothing: then all must be as it was
            again = checkpoint.load(path, "tokenizer")
        except UserError as error:
            assert "damaged" in str(error)
        else:
            assert all(torch.equal(again["ema"][k], v) for k, v in tokenizer.state_dict().items())
        whole[place] ^= 1


def test_older_checkpoints_are_kept_and_used_when_the_last_is_damaged(tmp_path, capsys):
    path = tmp_path / "last.pt"
    for step in range(4):
        checkpoint.save(path, "tokenizer", {"step": step}, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["last-1.pt", "last-2.pt", "last.pt"]
    assert checkpoint.load_newest(path, "tokenizer")["step"] == 3
    path.write_bytes(path.read_bytes()[:-50])
    assert checkpoint.load_newest(path, "tokenizer")["step"] == 2
    assert "last-1.pt" in capsys.readouterr().err
    (tmp_path / "last-1.pt").write_bytes(b"")
    assert checkpoint.load_newest(path, "tokenizer")["step"] == 1
    (tmp_path / "last-2.pt").unlink()
    with pytest.raises(UserError, match="last.pt is damaged"):
        checkpoint.load_newest(path, "tokenizer")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_call_is_not_run(tmp_path):
    torch.save({"equimini": "tokenizer", "format": 1, "x": Malicious(tmp_path / "run")},
               tmp_path / "t.pt")
    with pytest.raises(UserError, match="not an equimini checkpoint"):
        load_tokenizer(tmp_path / "t.pt")
    assert not (tmp_path / "run").exists()


def test_an_interrupted_save_leaves_the_old_file(saved_tokenizer, tmp_path, monkeypatch):
    before = saved_tokenizer.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(saved_tokenizer, "tokenizer", {})
    assert saved_tokenizer.read_bytes() == before and os.listdir(tmp_path) == ["t.pt"]
    monkeypatch.setattr(Path, "unlink", full)  # as on a disk that has become read-only
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(saved_tokenizer, "tokenizer", {})


def test_a_packed_generator_draws_the_same_and_is_small(runs, tmp_path):
    source = runs / "runs/generator/last.pt"
    assert "differs by" in call("equimini.convert.pack", source, "--out", "box.pt",
                                 cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["box-tokenizer.pt", "box.pt"]
    one, other = (load_generator(path) for path in (source, tmp_path / "box.pt"))
    assert one.classes == other.classes and one.columns == other.columns
    for a, b in ((one.generator, other.generator), (one.tokenizer, other.tokenizer)):
        for p, q in zip(a.parameters(), b.parameters()):  # half: 11 bits, and none below 2^-24
            assert q.dtype == torch.float32 and torch.equal(q, p.half().float())
    weights = [p for model in (one.generator, one.tokenizer) for p in model.state_dict().values()]
    overhead = 1000 * (len(weights) + 2)  # bytes of names and alignment
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < overhead + 2 * sum(
        p.numel() for p in weights)
    images = [model.sample([1], steps=2) for model in (one, other)]
    assert not torch.equal(*images) and (images[0] - images[1]).abs().max() < 0.05
    with pytest.raises(UserError, match="one set of weights"):
        load_generator(tmp_path / "box.pt", ema=False)
    (tmp_path / "box-tokenizer.pt").unlink()
    with pytest.raises(UserError, match="box-tokenizer.pt"):
        load_generator(tmp_path / "box.pt")


def texts(value):
    """Every piece of text in a nested dict."""
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in texts(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in texts(part)]
    return [value] if isinstance(value, str) else []


def test_packed_files_tell_the_recipe_and_nothing_of_the_machine(runs, tmp_path):
    content = checkpoint.load(runs / "runs/generator/last.pt", "generator")
    asked = {**content["config"]["run"], "data": "/home/me/pictures", "val_data": "D:\\val",
             "out": "runs/secret", "tokenizer": "/home/me/t.pt", "latents": "/home/me/latents",
             "init_from": "/home/me/g.pt", "device": "cuda:3", "seed": 5, "precision": "bf16"}
    content["config"]["run"] = asked
    checkpoint.save(tmp_path / "g.pt", "generator", content)
    paths = pack(tmp_path / "g.pt", tmp_path / "box.pt")
    for path, kind in zip(paths, ("generator", "tokenizer")):
        found = texts(checkpoint.load(path, kind))
        assert not [t for t in found if "/" in t or "\\" in t or "secret" in t or "cuda" in t]
        assert b"/home" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    kept = checkpoint.load(paths[0], "generator")
    assert kept["config"]["training"] == content["config"]["training"]
    assert kept["config"]["run"].items() >= {"seed": 5, "precision": "bf16"}.items()
    assert kept["step"] == 6 and kept["classes"] == content["classes"]


def test_a_fine_tuned_decoder_is_packed_and_another_tokenizer_is_not(runs, tmp_path):
    content = checkpoint.load(runs / "runs/tokenizer/last.pt", "tokenizer")
    for name, fits in (("decoder.conv_out.bias", True), ("encoder.conv_in.bias", False)):
        content["ema"][name] += 0.25
        checkpoint.save(tmp_path / "t.pt", "tokenizer", content)
        arguments = runs / "runs/generator/last.pt", tmp_path / "box.pt", 15, 30, tmp_path / "t.pt"
        if fits:
            pack(*arguments)
            packed = load_tokenizer(tmp_path / "box-tokenizer.pt").decoder.conv_out.bias
            torch.testing.assert_close(packed, content["ema"][name], rtol=1e-3, atol=1e-4)
        else:
            with pytest.raises(UserError, match="other tokens"):
                pack(*arguments)


def test_packed_files_that_would_be_too_large_are_not_written(runs, tmp_path):
    source, out = runs / "runs/generator/last.pt", tmp_path / "box.pt"
    with pytest.raises(UserError, match=r"box.pt would be .* the limit is 0.01 .*--file-mb"):
        pack(source, out, file_mb=0.01)
    with pytest.raises(UserError, match="together; at most 0.02"):
        pack(source, out, total_mb=0.02)
    assert not list(tmp_path.iterdir())


def test_models_in_the_box_are_found_by_name(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BOX", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="came without the model scenes"):
        load_generator("scenes")
    (tmp_path / "assets").mkdir()
    pack(runs / "runs/generator/last.pt", tmp_path / "assets" / "scenes.pt")
    (tmp_path / "scenes").mkdir()  # a folder is no checkpoint: scenes/train, say
    assert load_generator("scenes").classes == load_generator(tmp_path / "assets/scenes.pt").classes
    assert load_tokenizer("scenes-tokenizer").has_statistics
    with pytest.raises(UserError, match="no checkpoint dreams.*: scenes, scenes-tokenizer"):
        load_generator("dreams")
    for path in ("x/scenes", "../assets/scenes", "scenes.pt"):  # paths, not names
        with pytest.raises(UserError, match="there is no checkpoint"):
            load_generator(path)
    (tmp_path / "scenes").rmdir()
    (tmp_path / "scenes").write_bytes(b"my own file")
    with pytest.raises(UserError, match="scenes is damaged"):
        load_generator("scenes")
