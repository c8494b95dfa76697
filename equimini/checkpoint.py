"""Checkpoint files: plain dicts of tensors, numbers and strings, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from equimini.autoencoder import Tokenizer
from equimini.cli import UserError, config_from_dict, first_line
from equimini.presets import TokenizerConfig

FORMAT = 1  # of the dict's layout


def save(path: Path | str, kind: str, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, then rename it to `path`.

    kind: 'tokenizer' or 'generator'.  content: tensors, numbers, strings, lists and dicts only.
    Raises UserError if the disk is full or cannot be written; an older file then stays as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({**content, "equimini": kind, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {error}; what was there before is still "
                        "there") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path | str, kind: str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (weights_only).

    Raises UserError if the file is missing, damaged, or not an equimini checkpoint of this kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train one with train_{kind}.py, or give "
                        "the path of one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not an equimini checkpoint (it holds more than tensors and "
                        "plain values, which is not read)") from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict) or "equimini" not in content:
        raise UserError(f"{path} is not an equimini checkpoint")
    if content["equimini"] != kind:
        raise UserError(f"{path} holds a {content['equimini']}, not a {kind}")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has format {content['format']}; this version reads {FORMAT}")
    return content


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Any) -> None:
    """Load a state dict strictly; raises UserError naming the file if it does not fit."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"the weights in {path} do not fit their configuration: "
                        f"{str(error).splitlines()[1].strip()}") from None


def tokenizer_from_dict(content: dict[str, Any], path: Any, ema: bool = True) -> Tokenizer:
    """The tokenizer of a loaded checkpoint, in eval mode, with the EMA (or the raw) weights."""
    tokenizer = Tokenizer(config_from_dict(TokenizerConfig, content["config"]["model"]))
    load_weights(tokenizer, content["ema" if ema else "model"], path)
    return tokenizer.eval().requires_grad_(False)


def load_tokenizer(path: Path | str, device: str | torch.device = "cpu",
                   ema: bool = True) -> Tokenizer:
    """A trained tokenizer from its checkpoint file, ready to encode and decode.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    return tokenizer_from_dict(load(path, "tokenizer"), path, ema).to(device)
