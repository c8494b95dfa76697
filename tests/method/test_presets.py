"""The numbers of the paper, and command lines made of them."""

import argparse
import dataclasses
import math

import pytest
import torch

from equimini.autoencoder import TokenizerConfig
from equimini.generator import GeneratorConfig
from equimini.presets import PRESETS, GeneratorTraining, TokenizerTraining, sizes
from equimini.utils.command_line import add_flags, config_from_dict, override, pick_device
from equimini.utils.errors import UserError


@pytest.mark.parametrize("name, millions, linear, printed", (
    ("small", 127.31, 5.12, 5.41), ("base", 295.59, 13.04, 9.78), ("large", 644.50, 29.15, 19.66),
    ("huge", 1203.21, 55.20, 34.91)))
def test_sizes_of_the_papers_models(name, millions, linear, printed):
    found, g = sizes(PRESETS[name]), PRESETS[name].generator
    assert found["GMACs"] == pytest.approx(printed, abs=0.008)  # the paper's GFLOPs
    assert round(found["generator"], 2) == millions
    assert round(found["linear"], 2) == linear
    pairs = 58 + 256  # of 16 columns in the window; with the 16 class tokens
    attention = g.layers * pairs * g.embed_dim * 2 * 2 / 1e9  # q·k and p·v, 2 per multiply-add
    assert found["GFLOPs"] == pytest.approx(found["linear"] + attention, rel=1e-9)
    assert [round(found[k], 2) for k in ("encoder", "to tokens", "from tokens", "decoder")] == [
        86.05, 3.15, 3.15, 121.55]


def test_tiny_is_small_enough_for_a_cpu():
    found, shape = sizes(PRESETS["tiny"]), PRESETS["tiny"].tokenizer
    assert (shape.image_size, shape.f, shape.columns) == (64, 4, 16)
    assert found["generator"] < 8
    assert found["encoder"] + found["decoder"] + found["to tokens"] * 2 < 4


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


@pytest.mark.parametrize("config, field, before", (
    (TokenizerConfig(dropout=0.3), "dropout", 0.0), (TokenizerConfig(), "layout", "columns"),
    (GeneratorConfig(), "real_equivariant", False), (GeneratorTraining(), "shift_group", 0),
    (TokenizerTraining(), "carry_disc", False)))
def test_a_field_younger_than_the_checkpoint_gets_what_was_done_before(config, field, before):
    plain = dataclasses.asdict(config)
    del plain[field]
    assert config_from_dict(type(config), plain) == dataclasses.replace(config, **{field: before})


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


@pytest.mark.parametrize("wrong, message", (
    (dict(window=None), "window must be a whole number, got None"),
    (dict(window=(3, 0)), r"window must be a whole number, got \(3, 0\)"),
    (dict(window=2.5), "window must be a whole number, got 2.5"),
    (dict(window=True), "window must be a whole number, got True"),
    (dict(window=0), "window must be at least 1, got 0"),
    (dict(dropout="0.1"), "dropout must be a finite number, got '0.1'"),
    (dict(dropout=math.nan), "dropout must be a finite number, got nan"),
    (dict(dropout=-math.inf), "dropout must be a finite number, got -inf"),
    (dict(embed_dim=40, heads=4), "embed-dim / heads, .* must be .*, got 40 / 4"),
    (dict(embed_dim=512, heads=2), "embed-dim / heads, .* up to 128, got 512 / 2")))
def test_wrong_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        GeneratorConfig(**wrong)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("cuda:77", "abacus"):
        with pytest.raises(UserError, match="--device"):
            pick_device(wrong)
