"""Turn the authors' released checkpoints into equimini's.

    python -m equimini.convert tokenizer.ckpt --out tokenizer.pt
    python -m equimini.convert places_large.ckpt --tokenizer tokenizer.pt --out generator.pt

A tokenizer is known by its `state_dict` (a Lightning checkpoint), a generator by its `model_ema`.
The EMA weights are taken (--raw: the others), every size is read from the shapes, and every key
has to be accounted for: what is unknown, missing or of another shape is listed, and nothing is
written.  No code in the file is run (see unpickle.py).

The method of renaming: build our module on the meta device from the sizes, say for each of its
weights what the release calls it, and compare both lists.
"""

from __future__ import annotations

import argparse
import math
import re
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.convert.unpickle import ForeignFile, Stored, stored
from equimini.generator import Generator, GeneratorConfig
from equimini.utils import checkpoint
from equimini.utils.errors import UserError, first_line

LATENT_SCALE = 0.05493  # the release multiplies latents by it; no mean is subtracted
SHOWN = 10  # keys of each kind in an error message
Shapes = dict[str, tuple[int, ...] | None]  # None: not a plain tensor
Rules = list[tuple[str, Any]]  # regular expression in our name, its replacement
# In the release's tokenizer file, the EMA copy of `encoder.conv_in.weight` is called
# `ema_encoder.conv_inweight`.
TOKENIZER_PARTS = r"(encoder|decoder|quant_layer|post_quant_layer|semantic_decoder)\."
BOOKKEEPING = rf"ema_{TOKENIZER_PARTS}(decay|num_updates)$|loss\."
UNUSED_BLOCK = r"(ema_)?semantic_decoder\.down\.?\d\.?block\.?2\.?(norm|conv|nin_shortcut)"
GENERATOR_RULES: Rules = [
    (r"^class_table\.", "class_emb."), (r"^no_class$", "fake_latent"),
    (r"^class_embed$", "encoder_pos_embed_learned"),
    (r"^x_in\.", "z_proj."), (r"^norm_in\.", "z_proj_ln."), (r"^norm_out\.", "encoder_norm."),
    (r"^blocks\.", "encoder_blocks."), (r"\.cross\.q\.", ".attn2.qkv."),
    (r"\.cross\.", ".attn2."), (r"\.class_norm\.", ".cross_cond_norm."),
    (r"^(encoder_blocks.*\.mlp)\.0\.", r"\1.fc1."), (r"^(encoder_blocks.*\.mlp)\.3\.", r"\1.fc2."),
    (r"^head\.blocks\.(\d+)\.norm\.", r"head.blocks.\1.in_ln."),
    (r"^head\.blocks\.", "head.res_blocks."), (r"\.ada\.", ".adaLN_modulation.1."),
    (r"^head\.x_in\.", "head.input_proj."), (r"^head\.z_in\.", "head.cond_embed."),
    (r"^head\.time_mlp\.", "head.time_embed.mlp."),
    (r"^head\.ada_out\.", "head.final_layer.adaLN_modulation.1."),
    (r"^head\.x_out\.", "head.final_layer.linear."), (r"^head\.", "diffloss.net.")]


def tokenizer_rules(stages: int) -> Rules:
    """How the release names our tokenizer's weights; it counts the decoder's stages downwards."""
    def up(match: re.Match) -> str:
        return f"decoder.up.{stages - 1 - int(match[1])}."

    def semantic(match: re.Match) -> str:
        level, block = divmod(int(match[1]), 2)
        return f"semantic_decoder.down.{level}.block.{block}."

    return [
        (r"^to_tokens\.", "quant_layer."), (r"^from_tokens\.", "post_quant_layer."),
        (r"^semantic_head\.blocks\.(\d+)\.", semantic), (r"^semantic_head\.", "semantic_decoder."),
        (r"^(encoder|decoder)\.column_conv\.", r"\1.\g<1>1d."),
        (r"^encoder\.downs\.(\d+)\.", r"encoder.down.\1.downsample.conv."),
        (r"^encoder\.stages\.(\d+)\.", r"encoder.down.\1."),
        (r"^decoder\.ups\.(\d+)\.", lambda match: f"{up(match)}upsample.conv."),
        (r"^decoder\.stages\.(\d+)\.", up),
        (r"\.middle\.0\.", ".mid.block_1."), (r"\.middle\.1\.", ".mid.attn_1."),
        (r"\.middle\.2\.", ".mid.block_2."), (r"\.blocks\.", ".block."),
        (r"\.attention\.", ".attn."), (r"\.skip\.", ".nin_shortcut."), (r"\.out\.", ".proj_out.")]


def rename(ours: str, rules: Rules) -> str:
    """The release's name of one of our weights."""
    for pattern, replacement in rules:
        ours = re.sub(pattern, replacement, ours)
    return ours


def ema_key(name: str) -> str:
    """The release's key of a tokenizer weight's EMA copy: the name loses its dots."""
    part, rest = name.split(".", 1)
    return f"ema_{part}.{rest.replace('.', '')}"


class Sizes:
    """Reads a model's sizes from the shapes of a release checkpoint."""

    def __init__(self, shapes: Shapes, key: Callable[[str], str] = str) -> None:
        self.shapes, self.key = shapes, key

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.shapes

    def count(self, pattern: str) -> int:
        """How many consecutive n from 0 the checkpoint has of a name such as 'down.{}.weight'."""
        n = 0
        while pattern.format(n) in self:
            n += 1
        return n

    def at(self, name: str, dim: int) -> int:
        """One size of a weight; raises UserError if there is no such weight, or it has none."""
        if name not in self:
            raise UserError(f"missing: {self.key(name)}, which tells the model's size")
        shape = self.shapes[self.key(name)]
        if shape is None or len(shape) <= dim or shape[dim] < 1:
            raise UserError(f"misshapen: {self.key(name)}, which tells the model's size, "
                            f"is {shape or 'no plain tensor'}")
        return shape[dim]


def tokenizer_config(sizes: Sizes) -> TokenizerConfig:
    """The architecture of a release tokenizer; raises UserError if the shapes do not show it."""
    base, z = sizes.at("encoder.conv_in.weight", 0), sizes.at("encoder.conv_out.weight", 0)
    stages = sizes.count("encoder.down.{}.block.0.conv1.weight")
    channels = [sizes.at(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(stages)]
    height = (sizes.at("encoder.encoder1d.weight", 0) // z) << max(0, stages - 1)
    semantic = "semantic_decoder.conv_out.weight"
    return TokenizerConfig(
        image_size=height, base_channels=base,
        multipliers=tuple(c // base for c in channels),
        blocks=sizes.count("encoder.down.0.block.{}.conv1.weight"),
        attention_rows=tuple(height >> i for i in range(stages)
                             if f"encoder.down.{i}.attn.0.q.weight" in sizes),
        z_channels=z, token_channels=sizes.at("quant_layer.weight", 0),
        semantic_channels=sizes.at(semantic, 0) if semantic in sizes else 0)


def generator_config(sizes: Sizes, heads: int | None, window: int | None) -> GeneratorConfig:
    """The architecture of a release generator; heads and window do not show in its shapes."""
    width = sizes.at("class_emb.weight", 1)
    if heads is None and width % 64:
        raise UserError(f"--heads is needed: the width, {width}, is no multiple of 64")
    return GeneratorConfig(
        layers=sizes.count("encoder_blocks.{}.norm1.weight"), embed_dim=width,
        heads=(16 if width == 1280 else width // 64) if heads is None else heads,
        window=4 if window is None else window,
        class_tokens=sizes.at("encoder_pos_embed_learned", 1),
        head_width=sizes.at("diffloss.net.input_proj.weight", 0),
        head_depth=sizes.count("diffloss.net.res_blocks.{}.in_ln.weight"))


@contextmanager
def readable_sizes() -> Iterator[None]:
    """Sizes that no model can have become a UserError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"its sizes are not those of a model: {first_line(error)}") from None


def plan_tokenizer(shapes: Shapes, raw: bool = False) -> tuple[TokenizerConfig, dict[str, str]]:
    """The configuration of a release tokenizer, and its key for each of our weights.

    shapes: of everything under its `state_dict`.  raw: take the weights that are not the EMA's.
    """
    key = str if raw else ema_key
    with readable_sizes(), torch.device("meta"):
        config = tokenizer_config(Sizes(shapes, key))
        model = Tokenizer(config)
    rules = tokenizer_rules(len(config.multipliers))
    other = ("ema_" if raw else "") + TOKENIZER_PARTS
    ignored = re.compile(f"{BOOKKEEPING}|{UNUSED_BLOCK}|{other}")
    kept = {k: v for k, v in shapes.items() if not ignored.match(k)}
    return config, match(model, lambda ours: key(rename(ours, rules)), kept)


def plan_generator(shapes: Shapes, heads: int | None = None, window: int | None = None,
                   ) -> tuple[GeneratorConfig, dict[str, str]]:
    """The configuration of a release generator, and its key for each of our weights.

    shapes: of everything under its `model_ema` or `model`.  heads, window: None for the default.
    """
    sizes = Sizes(shapes)
    with readable_sizes(), torch.device("meta"):
        config = generator_config(sizes, heads, window)
        model = Generator(config, sizes.at("class_emb.weight", 0), sizes.at("z_proj.weight", 1))
    return config, match(model, lambda ours: rename(ours, GENERATOR_RULES), shapes)


def match(model: nn.Module, key: Callable[[str], str], shapes: Shapes) -> dict[str, str]:
    """The key of each of the model's weights; raises UserError unless `shapes` holds just these."""
    keys = {ours: key(ours) for ours, _ in model.named_parameters()}
    wanted = {keys[ours]: tuple(p.shape) for ours, p in model.named_parameters()}
    wrong = [f"{key} is {shapes[key] or 'no plain tensor'}, not {shape}"
             for key, shape in wanted.items() if key in shapes and shapes[key] != shape]
    problems = {"unknown": sorted(shapes.keys() - wanted), "misshapen": wrong,
                "missing": sorted(wanted.keys() - shapes)}
    found = [f"{kind}: {', '.join(those[:SHOWN])}"
             + (f" and {len(those) - SHOWN} more" if len(those) > SHOWN else "")
             for kind, those in problems.items() if those]
    if found:
        raise UserError("; ".join(found))
    return keys


def read_weights(file: ForeignFile, tensors: dict[str, Stored | None],
                 keys: dict[str, str]) -> dict[str, Tensor]:
    """Our state dict, in float32; raises UserError for weights that are no floats."""
    for key in keys.values():
        if not tensors[key].dtype.is_floating_point:
            raise UserError(f"{key} holds {tensors[key].dtype}, not floating-point numbers")
    return {ours: file.read(tensors[key]).float() for ours, key in keys.items()}


def convert_tokenizer(file: ForeignFile, args: argparse.Namespace) -> dict[str, Any]:
    """The content of our checkpoint of the tokenizer in `file`."""
    for name in ("tokenizer", "heads", "window", "class_names"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for generators; this is a tokenizer")
    scale = LATENT_SCALE if args.latent_scale is None else args.latent_scale
    if not 0 < scale < math.inf:
        raise UserError(f"--latent-scale must be a number above 0, got {scale}")
    tensors, shapes = tensors_under(file, "state_dict")
    config, keys = plan_tokenizer(shapes, args.raw)
    weights = read_weights(file, tensors, keys)
    weights["latent_mean"] = torch.zeros(config.token_channels)
    weights["latent_std"] = torch.full((config.token_channels,), 1 / scale)
    return {"config": {"preset": "converted", "model": asdict(config)}, "classes": [],
            "ema": weights}


def convert_generator(file: ForeignFile, args: argparse.Namespace) -> dict[str, Any]:
    """The content of our checkpoint of the generator in `file`."""
    if args.latent_scale is not None:
        raise UserError("--latent-scale is for tokenizers; this is a generator")
    if args.tokenizer is None:
        raise UserError("--tokenizer is needed: a generator's checkpoint also holds its tokenizer")
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    tensors, shapes = tensors_under(file, "model" if args.raw else "model_ema")
    config, keys = plan_generator(shapes, args.heads, args.window)
    channels, theirs = shapes[keys["x_in.weight"]][1], tokenizer.config.token_channels
    if channels != theirs or not tokenizer.has_statistics:
        raise UserError(f"{args.tokenizer} does not go with it: " + (
            f"its tokens have {theirs} channels, the generator's {channels}"
            if channels != theirs else "its latents' statistics have not been measured"))
    return {"config": {"preset": "converted", "model": asdict(config)},
            "classes": class_names(args.class_names, shapes[keys["class_table.weight"]][0]),
            "tokenizer": checkpoint.tokenizer_content(tokenizer),
            "ema": read_weights(file, tensors, keys)}


def tensors_under(file: ForeignFile, name: str) -> tuple[dict[str, Stored | None], Shapes]:
    """The tensors of one dict in the file, and their shapes; None for anything else in it."""
    values = file.content.get(name)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"it has no weights under '{name}'")
    tensors = {key: stored(value) for key, value in values.items()}
    return tensors, {key: tensor and tensor.shape for key, tensor in tensors.items()}


def class_names(path: str | None, count: int) -> list[str]:
    """The lines of a file, one per class; without a file 'class 0', 'class 1', …"""
    if path is None:
        return [f"class {i}" for i in range(count)]
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --class-names {path}: {error}") from None
    if len(names) != count or "" in names or len(set(names)) != count:
        raise UserError(f"--class-names must hold {count} different names, one a line, got "
                        f"{len(names)} lines, {len(set(names) - {''})} different names")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m equimini.convert", description=__doc__.split("\n\nThe method")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("file", help="checkpoint of the authors: a tokenizer or a generator")
    add("--out", required=True, help="checkpoint to write")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--raw", action="store_true", help="take the raw weights, not the EMA's")
    add("--latent-scale", type=float, metavar="X",
        help=f"tokenizer: 1 / standard deviation of its latents [{LATENT_SCALE}]")
    add("--tokenizer", metavar="PT", help="generator: its converted tokenizer")
    add("--heads", type=int, metavar="N",
        help="generator: attention heads [width/64; 16 at width 1280]")
    add("--window", type=int, metavar="N",
        help="generator: columns that a column attends to, itself counted [4]")
    add("--class-names", metavar="TXT",
        help="generator: file with the classes' names, one a line [class 0, class 1, …]")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not (args.overwrite and out.is_file()):
        raise UserError(f"{out} exists; give another --out" +
                        (", or --overwrite" if out.is_file() else ""))
    if any(source and out.exists() and Path(source).exists() and out.samefile(source)
           for source in (args.file, args.tokenizer)):
        raise UserError(f"--out {out} is one of the files to read")
    with ForeignFile(args.file) as file:
        top = file.content if isinstance(file.content, dict) else {}
        kind, convert = (("tokenizer", convert_tokenizer) if "state_dict" in top else
                         ("generator", convert_generator))
        if not top.keys() & {"state_dict", "model", "model_ema"}:
            raise UserError(f"{args.file} holds neither 'state_dict' (a tokenizer) nor 'model_ema' "
                            "(a generator)")
        try:
            content = convert(file, args)
        except UserError as error:
            raise UserError(f"{args.file}: {error}; nothing was written") from None
    checkpoint.save(out, kind, content)
    size = sum(weight.numel() for weight in content["ema"].values()) / 1e6
    print(f"{out}: {kind} of {size:.2f} M weights")
