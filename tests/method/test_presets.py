"""The numbers of the paper, and command lines made of them."""

import argparse
import dataclasses

import pytest
import torch

from equimini.autoencoder import TokenizerConfig
from equimini.generator import GeneratorConfig
from equimini.presets import PRESETS, GeneratorTraining, TokenizerTraining, measure
from equimini.utils.command_line import add_flags, config_from_dict, override, pick_device
from equimini.utils.errors import UserError


@pytest.mark.parametrize("name, millions, linear, printed", (
    ("small", 127.31, 5.12, 5.41), ("base", 295.59, 13.04, 9.78), ("large", 644.50, 29.15, 19.66),
    ("huge", 1203.21, 55.20, 34.91)))
def test_sizes_of_the_papers_models(name, millions, linear, printed):
    m, g = measure(PRESETS[name]), PRESETS[name].generator
    assert m["training_gmacs"] == pytest.approx(printed, abs=0.008)  # the paper's GFLOPs
    assert round(m["generator"], 2) == millions
    assert round(m["linear_gflops"], 2) == linear
    pairs = sum(min(i + 1, 4) for i in range(16)) + 16 * 16  # in the window; with the class
    assert pairs == 58 + 256
    attention = g.layers * pairs * g.embed_dim * 2 * 2 / 1e9  # q·k and p·v, 2 per multiply-add
    assert m["gflops"] == pytest.approx(m["linear_gflops"] + attention, rel=1e-9)
    assert [round(m[k], 2) for k in ("encoder", "to_tokens", "from_tokens", "decoder")] == [
        86.05, 3.15, 3.15, 121.55]


def test_tiny_is_small_enough_for_a_cpu():
    m, shape = measure(PRESETS["tiny"]), PRESETS["tiny"].tokenizer
    assert (shape.image_size, shape.f, shape.columns) == (64, 4, 16)
    assert m["generator"] < 8 and m["encoder"] + m["decoder"] + m["to_tokens"] * 2 < 4


@pytest.mark.parametrize("config", (TokenizerConfig(), TokenizerTraining(), GeneratorConfig(),
                                    GeneratorTraining()))
def test_every_field_is_a_flag_with_help_and_survives_a_checkpoint(config):
    parser = argparse.ArgumentParser()
    add_flags(parser, config, "model")
    text = parser.format_help()
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"]
    plain = {k: list(v) if isinstance(v, tuple) else v
             for k, v in dataclasses.asdict(config).items()}
    assert config_from_dict(type(config), plain) == config
    with pytest.raises(UserError, match="does not know.*unknown"):
        config_from_dict(type(config), plain | {"unknown": 1})


def test_a_field_younger_than_the_checkpoint_gets_its_default():
    config = TokenizerConfig(dropout=0.3)
    plain = dataclasses.asdict(config)
    del plain["dropout"]
    assert config_from_dict(TokenizerConfig, plain) == TokenizerConfig(dropout=0.0)


def test_flags_override_and_are_checked():
    parser = argparse.ArgumentParser()
    add_flags(parser, TokenizerConfig(), "model")
    args = parser.parse_args(["--multipliers", "1,2", "--noise", "0.5"])
    config = override(TokenizerConfig(), args)
    assert config.multipliers == (1, 2) and config.noise == 0.5 and config.f == 2
    for flags in (["--base-channels", "-4"], ["--noise", "nan"], ["--image-size", "100"],
                  ["--norm-groups", "48"]):
        with pytest.raises(UserError, match=flags[0]):
            override(TokenizerConfig(), parser.parse_args(flags))


def test_impossible_head_sizes_are_refused():
    for sizes in (dict(embed_dim=40, heads=4), dict(embed_dim=512, heads=2)):
        with pytest.raises(ValueError, match="embed-dim"):
            GeneratorConfig(**sizes)


@pytest.mark.parametrize("wrong, what", [
    (dict(window=None), "whole number, got None"), (dict(window=(3, 0)), r"number, got \(3, 0\)"),
    (dict(window=2.5), "whole number, got 2.5"), (dict(window=True), "whole number, got True"),
    (dict(dropout="0.1"), "a number, got '0.1'"), (dict(window=0), "at least 1, got 0")])
def test_values_of_the_wrong_type_are_refused(wrong, what):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be .*{what}"):
        GeneratorConfig(**wrong)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device"):
        pick_device("cuda:77")
    with pytest.raises(UserError, match="--device"):
        pick_device("abacus")
