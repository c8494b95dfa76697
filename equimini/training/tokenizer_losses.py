"""The parts of the tokenizer's loss that the settings ask for: distance, teacher, critic."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from equimini.autoencoder import TokenizerConfig
from equimini.discriminator import FeatureCritic, PatchGAN
from equimini.presets import PRESETS, TokenizerTraining
from equimini.pretrained.published_weights import chosen, load_dino, load_dinov2, load_lpips, unused
from equimini.pretrained.torchscript import (FeatureDistance, ScriptFeatures, ScriptTeacher,
                                             script_maps)
from equimini.pretrained.vision_transformer import DinoFeatures, DinoV2Teacher
from equimini.training.setup import Setup
from equimini.utils.errors import UserError, first_line


def make_distance(cfg: TokenizerTraining, images: Tensor) -> nn.Module | None:
    """The perceptual distance that the settings ask for, on the device of `images`, or None.

    images: an example batch.
    """
    source = chosen(cfg.perceptual, "perceptual", cfg.lpips_weights, "lpips-weights",
                    cfg.perceptual_net, "perceptual-net")
    if not source or not cfg.perceptual_weight:
        return None
    distance = (load_lpips(cfg.lpips_weights) if source == "published"
                else FeatureDistance(cfg.perceptual_net)).to(images.device)
    try:
        with torch.no_grad():
            distance(images[:1], images[:1])
    except RuntimeError as error:
        raise UserError(f"the perceptual network does not take pictures of {images.shape[2]}x"
                        f"{images.shape[3]} pixels: {first_line(error)}") from None
    return distance


def make_teacher(cfg: TokenizerTraining, images: Tensor) -> nn.Module | None:
    """The teacher of the semantic alignment that the settings ask for, or None; see above."""
    source = chosen(cfg.align, "align", cfg.dinov2_weights, "dinov2-weights", cfg.align_net,
                    "align-net")
    if not source or not cfg.align_weight:
        return None
    if source == "published":
        return DinoV2Teacher(load_dinov2(cfg.dinov2_weights)).to(images.device)
    return ScriptTeacher(script_maps(cfg.align_net).to(images.device), cfg.align_map, images)


def make_critic(cfg: TokenizerTraining, images: Tensor) -> PatchGAN | FeatureCritic | None:
    """The discriminator that the settings ask for, on the device of `images`; None for none.

    images: an example batch.
    """
    if cfg.discriminator == "none" or not cfg.adv_weight:
        unused(f"--discriminator {cfg.discriminator}", cfg, "dino_weights", "disc_net")
        return None
    if cfg.discriminator == "dino":
        source = chosen("required", "discriminator", cfg.dino_weights, "dino-weights",
                        cfg.disc_net, "disc-net")
        frozen = (DinoFeatures(load_dino(cfg.dino_weights).to(images.device)) if source == "published"
                  else ScriptFeatures(script_maps(cfg.disc_net).to(images.device), images))
        return FeatureCritic(frozen, cfg.disc_head_channels).to(images.device)
    unused("--discriminator patchgan", cfg, "dino_weights", "disc_net")
    critic = PatchGAN(cfg.disc_channels, cfg.disc_layers).to(images.device)
    try:
        with torch.no_grad():
            critic.eval()(images[:1])
    except RuntimeError:
        raise UserError(f"pictures of {images.shape[2]}x{images.shape[3]} pixels are too small for "
                        f"--disc-layers {cfg.disc_layers}; give fewer") from None
    return critic.train()


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
