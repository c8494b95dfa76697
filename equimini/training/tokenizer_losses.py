"""The parts of the tokenizer's loss that the settings ask for: distance, teacher, critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from equimini.discriminator import FeatureCritic, PatchGAN
from equimini.losses import hinge_loss
from equimini.noise import rng
from equimini.presets import TokenizerTraining
from equimini.pretrained.published_weights import chosen, load_dino, load_dinov2, load_lpips, unused
from equimini.pretrained.torchscript import (FeatureDistance, ScriptFeatures, ScriptTeacher,
                                             script_maps)
from equimini.pretrained.vision_transformer import DinoFeatures, DinoV2Teacher
from equimini.training.precision import load_optimizer
from equimini.training.step import Stepper
from equimini.utils import checkpoint
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


class Adversary:
    """A critic with its optimizer."""

    def __init__(self, critic: PatchGAN | FeatureCritic, cfg: TokenizerTraining,
                 seed: int) -> None:
        self.critic, self.seed = critic, seed
        self.lr = cfg.disc_lr or cfg.lr  # constant, as in the release
        self.optimizer = torch.optim.Adam(critic.parameters(), lr=self.lr, betas=(0.5, 0.9))
        self.stepper = Stepper(self.optimizer)

    def features(self, images: Tensor, step: int, real: bool, first: int = 0) -> list[Tensor]:
        """The critic's features of images at a step; the draws of x and x̂ differ.

        first: the place of the first image in the global batch.
        """
        return self.critic.features(images, [rng("critic", self.seed, step, int(real), first + i)
                                             for i in range(len(images))])

    def backward(self, real: list[Tensor], fake: list[Tensor],
                 weight: float = 1.0) -> dict[str, Tensor]:
        """Add the gradient of the critic's loss on features of x and x̂; returns what to log.

        weight: these images' part of the global batch.
        """
        real_logits, fake_logits = (self.critic.logits([x.detach() for x in features])
                                    for features in (real, fake))
        loss = weight * hinge_loss(real_logits, fake_logits)
        loss.backward()
        return {"disc_loss": loss.detach(), "logit_real": weight * real_logits.detach().mean(),
                "logit_fake": weight * fake_logits.detach().mean()}

    def state(self) -> dict:
        """For the checkpoint: the critic's weights and its optimizer's state."""
        return {"disc": self.critic.state_dict(), "disc_optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`; a checkpoint from before the critic's start has none."""
        if "disc" in state:
            checkpoint.load_weights(self.critic, state["disc"], "last.pt")
            load_optimizer(self.optimizer, state["disc_optimizer"])

    def carry_over(self, state: dict, path: str) -> None:
        """Begin with the critic of stage 1's checkpoint; its optimizer starts afresh."""
        if "disc" not in state:
            print(f"{path} holds no discriminator; stage 2 begins with a new one")
            return
        try:
            self.critic.load_state_dict(state["disc"])
        except RuntimeError:
            raise UserError(f"the discriminator in {path} is of another layout than that of the "
                            "flags; give the same --discriminator and channels as in stage 1, or "
                            "--no-carry-disc") from None
