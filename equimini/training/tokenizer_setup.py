"""What train_tokenizer.py checks and settles before it starts: losses, stage 2, semantic head."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import nn

from equimini.autoencoder import TokenizerConfig
from equimini.presets import PRESETS
from equimini.training.setup import Setup
from equimini.utils import checkpoint
from equimini.utils.command_line import config_from_dict
from equimini.utils.errors import UserError


def check_starts(setup: Setup) -> None:
    """Raise UserError for a loss that would only start after the last step."""
    cfg = setup.training
    late = {"adv": ("critic", cfg.adv_start), "align": ("alignment", cfg.align_start)}
    asked = {"adv": cfg.discriminator != "none" and cfg.adv_weight,
             "align": (cfg.dinov2_weights or cfg.align_net) and cfg.align_weight
             and not setup.run.finetune_decoder}
    for name, (what, start) in late.items():
        if asked[name] and start >= cfg.steps and not setup.resumed:
            off = "--discriminator none" if name == "adv" else "--align none"
            raise UserError(f"the {what} would start at step {start}, after the last of "
                            f"{cfg.steps}; give a lower --{name}-start, or {off}")


def stage_one(setup: Setup) -> dict:
    """The checkpoint of --finetune-decoder, whose sizes the model takes."""
    path = setup.run.finetune_decoder
    if setup.run.init_from:
        raise UserError("give --finetune-decoder or --init-from, not both")
    content = checkpoint.load(path, "tokenizer")
    checkpoint.check_statistics(checkpoint.tokenizer_from_dict(content, path), path)
    saved = config_from_dict(TokenizerConfig, content["config"]["model"])
    asked, there = (asdict(m) | {"semantic_channels": 0} for m in (setup.model, saved))
    if setup.model != PRESETS[setup.preset].tokenizer and asked != there:
        raise UserError(f"--finetune-decoder {path} holds a model of other sizes than the flags; "
                        "leave the model's flags out")
    setup.model = saved
    return content


def match_semantics(setup: Setup, teacher: nn.Module | None) -> TokenizerConfig:
    """The model's configuration with a semantic head as wide as the teacher, none without one.

    A model that is already there (resumed, or to start from) keeps its head.  Raises
    UserError where its width, or that of the flags, is not the teacher's.
    """
    given, wanted = setup.model.semantic_channels, teacher.channels if teacher else 0
    fixed = setup.resumed or setup.initial
    if fixed and (given == wanted or not teacher):
        return setup.model
    if fixed or given not in (0, wanted, PRESETS[setup.preset].tokenizer.semantic_channels):
        raise UserError(f"--semantic-channels: the model's semantic head has {given} channels, "
                        + (f"the teacher {wanted}" if teacher else "and no teacher is given; "
                           "give --dinov2-weights or --align-net"))
    try:
        setup.model = replace(setup.model, semantic_channels=wanted)
    except ValueError as error:
        raise UserError(f"the teacher's map cannot be used: {error}; choose another "
                        "--align-map") from None
    return setup.model
