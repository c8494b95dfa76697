"""Checkpoint files: plain dicts of tensors, numbers and strings, written whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import shutil
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.generator import GeneratorConfig
from equimini.utils.command_line import config_from_dict
from equimini.utils.errors import UserError, first_line, reading
from equimini.utils.files import replacing

FORMAT = 1  # of the dict's layout
CONFIGS = {"tokenizer": TokenizerConfig, "generator": GeneratorConfig}  # by kind
BOX = Path(__file__).parents[1] / "assets"  # models that come with equimini
DRAWN_WITH = "scenes-mean-flow"  # by sample.py and the page, if no other checkpoint is asked for
IN_THE_BOX = ("scenes", "scenes-tokenizer", DRAWN_WITH)


def save(path: Path | str, kind: str, content: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, then rename it to `path`.

    kind: 'tokenizer', 'generator', 'tokens' or 'scroll'.  content: tensors, numbers, strings, lists
    and dicts only.  keep: how many to keep; older ones are path-1, path-2, … (before the suffix).
    """
    path = Path(path)
    with replacing(path) as file:
        torch.save({**content, "equimini": kind, "format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())  # a full disk shows here, before the older ones are moved
        _rotate(path, keep)


def older(path: Path, i: int) -> Path:
    """Where the checkpoint before the last i ones is kept: last.pt, last-1.pt, last-2.pt, …"""
    return path.with_name(f"{path.stem}-{i}{path.suffix}") if i else path


def _rotate(path: Path, keep: int) -> None:
    """Give the present file a second name, so that `path` itself exists at every moment."""
    if keep < 2 or not path.exists():
        return
    for i in range(keep - 1, 1, -1):
        if older(path, i - 1).exists():
            os.replace(older(path, i - 1), older(path, i))
    older(path, 1).unlink(missing_ok=True)
    try:
        os.link(path, older(path, 1))
    except OSError:  # a file system without hard links
        shutil.copyfile(path, older(path, 1))


def load_newest(path: Path, kind: str) -> dict[str, Any]:
    """The checkpoint at `path`, or, with a message, the newest older one that can be read."""
    try:
        return load(path, kind)
    except UserError as first:
        for i in itertools.count(1):
            if not older(path, i).exists():
                raise
            with suppress(UserError):
                content = load(older(path, i), kind)
                print(f"{first}; continuing from the one before it, {older(path, i)}",
                      file=sys.stderr)
                return content


def find(path: Path | str) -> Path:
    """The file of a checkpoint: `path` itself, or, for a bare name, the model in the box.

    'scenes' is equimini/assets/scenes.pt, unless the present folder has a file of that name.
    """
    path, boxed = Path(path), BOX / f"{path}.pt"
    return boxed if boxed.parent == BOX and not path.is_file() and boxed.is_file() else path


def load(path: Path | str, kind: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (weights_only).

    path: of a file, or the name of a model in the box (see `find`).
    """
    content = _read(path, kind)
    if "base" in content:
        content = _with_base(content, path, kind)
    if kind in CONFIGS and "config" in content:
        with reading(path):
            check_sizes(config_from_dict(CONFIGS[kind], content["config"]["model"]), content)
    return content


def _with_base(content: dict[str, Any], path: Path | str, kind: str) -> dict[str, Any]:
    """A packed file's content, which has only the weights that its base has not, with all."""
    with reading(path):
        base, known = (str(content["base"][key]) for key in ("file", "weights"))
        mine = dict(content["ema"])
    rest = _read(beside(path, base), kind)
    with reading(base):
        if weights_hash(rest["ema"]) != known:
            raise UserError(f"{path} belongs to another {base} than the one beside it; take both "
                            "from one copy, or pack it anew")
        return {**content, "ema": {**rest["ema"], **mine}}


def _read(path: Path | str, kind: str) -> dict[str, Any]:
    """The content of one file, checked to be whole and of this kind."""
    name, path = path, find(path)
    if not path.is_file():
        raise UserError(missing(name, kind))
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # reads every record and compares its checksum
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not an equimini checkpoint (it holds more than tensors and "
                        "plain values, which is not read)") from None
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} is damaged or no checkpoint: {first_line(error)}") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} does not match its checksum")
    if not isinstance(content, dict) or "equimini" not in content:
        raise UserError(f"{path} is not an equimini checkpoint")
    if content["equimini"] != kind:
        raise UserError(f"{path} holds a {content['equimini']}, not a {kind}")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version reads {FORMAT}")
    if not _whole(content):
        raise UserError(f"{path} is damaged: a tensor in it is more than what is stored of it")
    return content


def check_sizes(config: TokenizerConfig | GeneratorConfig, content: dict[str, Any]) -> None:
    """Raise ValueError where the weights are another model's than the configuration's, which may
    be too large to be built: every width must be a side of a weight, and there must be at least as
    many weights as layers."""
    if isinstance(config, TokenizerConfig):
        depth, widths = config.blocks, {
            config.z_channels, config.token_channels, config.column_values,
            *(config.base_channels * m for m in config.multipliers)}
        widths |= {config.semantic_channels} - {0}
    else:
        depth = max(config.layers, config.head_depth)
        widths = {config.embed_dim, config.class_tokens, config.head_width}
    weights = content["ema"].values()
    if depth > len(weights) or not widths <= {side for weight in weights for side in weight.shape}:
        raise ValueError("its configuration is of another model than its weights")


def beside(path: Path | str, name: str) -> Path:
    """The file that a packed one, `path`, names, in its folder; raises UserError without it."""
    file = find(path).with_name(Path(name).name)
    if not file.is_file():
        raise UserError(f"{path} needs {file.name} beside it; there is no {file}")
    return file


def _whole(values: Any) -> bool:
    """Whether all tensors in nested dicts and lists are dense, with all elements in the file."""
    if isinstance(values, (dict, list, tuple)):
        return all(map(_whole, values.values() if isinstance(values, dict) else values))
    return not isinstance(values, Tensor) or values.layout is torch.strided and (
        values.numel() * values.element_size() <= values.untyped_storage().nbytes())


def missing(path: Path | str, kind: str) -> str:
    """What to say where there is no such checkpoint."""
    if str(path) in IN_THE_BOX:
        return (f"this copy of equimini came without the model {path} (there is no "
                f"{BOX / f'{path}.pt'}); install it from a complete copy of the repository, or "
                "give the --checkpoint of a model of your own")
    names = ", ".join(sorted(p.stem for p in BOX.glob("*.pt")))
    return (f"there is no checkpoint {path}; train one with train_{kind}.py, or give the path of "
            f"one{f', or the name of a model in the box: {names}' if names else ''}")


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Any) -> None:
    """Load a state dict strictly; raises UserError naming the file if it does not fit."""
    try:
        module.load_state_dict(weights)
    except Exception as error:  # what are no weights at all raise many kinds
        raise UserError(f"the weights in {path} do not fit their configuration: "
                        f"{str(error).splitlines()[:2][-1].strip()}") from None


def weights_of(content: dict[str, Any], ema: bool, path: Any) -> dict[str, torch.Tensor]:
    """The EMA or the raw weights; raises UserError for raw ones that the file does not hold."""
    if not ema and "model" not in content:
        raise UserError(f"{path} holds only one set of weights (a converted checkpoint); leave "
                        "out --weights raw")
    return content["ema" if ema else "model"]


def tokenizer_from_dict(content: dict[str, Any], path: Any, ema: bool = True) -> Tokenizer:
    """The tokenizer of a loaded checkpoint, in eval mode, with the EMA (or the raw) weights."""
    with reading(path):
        config = config_from_dict(TokenizerConfig, content["config"]["model"])
        check_sizes(config, content)
        load_weights(tokenizer := Tokenizer(config), weights_of(content, ema, path), path)
    return tokenizer.eval().requires_grad_(False)


def check_statistics(tokenizer: Tokenizer, path: Any) -> None:
    """Raise UserError for a tokenizer whose latents have not been measured."""
    if not tokenizer.has_statistics:
        raise UserError(
            f"{path} has no latent statistics, because its training did not end; end it with "
            f"train_tokenizer.py --out {Path(path).parent} --resume --steps "
            f"{load(path, 'tokenizer')['step']}")


def check_same_latents(mine: Tokenizer, theirs: Tokenizer, path: Any) -> None:
    """Raise UserError where the tokenizer from `path`, `theirs`, makes other latents than `mine`.

    Their decoders may differ: --finetune-decoder leaves the encoder and the statistics alone.
    """
    a, b = mine.latent_side(), theirs.latent_side()
    if a.keys() != b.keys() or any(not torch.equal(a[k].cpu(), b[k].cpu()) for k in a):
        raise UserError(f"--tokenizer {path} makes other tokens than the tokenizer that the "
                        "generator was trained with; only one whose decoder was trained on "
                        "(train_tokenizer.py --finetune-decoder) can take its place")


def load_tokenizer(path: Path | str, device: str | torch.device = "cpu",
                   ema: bool = True) -> Tokenizer:
    """A trained tokenizer from its checkpoint file, ready to encode and decode."""
    return tokenizer_from_dict(load(path, "tokenizer"), path, ema).to(device)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's weights and statistics."""
    return weights_hash(tokenizer.state_dict())


def latents_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of what latents depend on: a tokenizer with a fine-tuned decoder has the same."""
    return weights_hash(tokenizer.latent_side())


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """The same nest of dicts, lists and tuples, with the function applied to its tensors."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {k: map_tensors(function, v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(map_tensors(function, v) for v in values)
    return values


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a generator's checkpoint holds of its tokenizer, so that one file is enough."""
    return {"config": asdict(tokenizer.config), "weights": tokenizer.state_dict()}


def tokenizer_inside(content: dict[str, Any], path: Any) -> Tokenizer:
    """The tokenizer that a generator's checkpoint, loaded from `path`, holds or (packed) names."""
    with reading(path):
        inside = dict(content["tokenizer"])
        parts = {"config": {"model": inside.get("config")}, "ema": inside.get("weights")}
    if "file" in inside:
        return load_tokenizer(beside(path, inside["file"]))
    return tokenizer_from_dict(parts, path)


def load_any_tokenizer(path: Path | str, device: str | torch.device = "cpu",
                       ema: bool = True) -> Tokenizer:
    """The tokenizer of a checkpoint of either kind (a generator's holds its own, EMA only)."""
    try:
        return load_tokenizer(path, device, ema)
    except UserError as first:
        if not ema:
            raise
        try:
            content = load(path, "generator")
        except UserError:
            raise first from None
    return tokenizer_inside(content, path).to(device)
