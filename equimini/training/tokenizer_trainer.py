"""One step of the tokenizer's training (Eq. 5), and what surrounds it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from equimini.autoencoder import Tokenizer, TokenizerConfig, add_noise, noise_variance
from equimini.config import flag
from equimini.losses import (Pulls, adaptive_weight, adversarial_ramp, alignment_loss, kl_loss,
                             psnr, pulls, reconstruction_loss)
from equimini.noise import normal, seed_torch
from equimini.presets import PRESETS
from equimini.training.options import RunConfig
from equimini.training.precision import PRECISIONS, set_float32
from equimini.training.setup import Setup
from equimini.training.step import Ema, Piece, Stepper, add, pieces, warmup_decay_lr
from equimini.training.tokenizer_losses import Adversary, make_critic, make_distance, make_teacher
from equimini.utils import checkpoint, distributed
from equimini.utils.errors import UserError
from equimini.utils.images import grid, save_png, to_float


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """The run's options, and those of the tokenizer alone."""

    finetune_decoder: str = flag("", "stage 2: checkpoint of a trained tokenizer, whose EMA "
                                 "weights are taken; its encoder stays as it is, its decoder is "
                                 "trained on, without alignment")
    precision: str = flag("float32", "arithmetic of convolutions and matrix products; bf16 "
                          "(autocast) is faster where the processor has it; losses, norms and the "
                          "adaptive weight stay in float32; tf32 (CUDA) rounds to 10 bits of "
                          "mantissa everywhere", choices=PRECISIONS)
    channels_last: bool = flag(False, "keep feature maps in the channels-last layout")
    compile: bool = flag(False, "compile encoder and decoder with torch.compile")


class Decoded(NamedTuple):
    """Images x in [−1, 1], their means μ (B, N, D), decoded x̂, and the semantic head's map."""

    x: torch.Tensor
    mean: torch.Tensor
    x_hat: torch.Tensor
    semantics: torch.Tensor | None


class TokenizerTrainer:
    """The tokenizer, its critic and their optimizers; one call of `step` is one training step."""

    def __init__(self, setup: Setup, shown: torch.Tensor) -> None:
        """shown: held-out images (n, 3, H, W) in [−1, 1], for the previews."""
        cfg, self.device, self.seed = setup.training, setup.device, setup.run.seed
        self.cfg, self.opts = cfg, setup.run
        set_float32(self.opts.precision, self.device)
        self.shown = shown.to(self.device)
        self.finetuning = bool(setup.run.finetune_decoder)
        self.distance = make_distance(cfg, self.shown)
        self.teacher = None if self.finetuning else make_teacher(cfg, self.shown)
        seed_torch(self.seed, 0)  # initial weights
        self.model = Tokenizer(match_semantics(setup, self.teacher)).to(self.device)
        if self.finetuning:
            self.model.freeze_latents()
        if self.opts.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.ema = Ema(self.model, cfg.ema_decay, warmup=True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=cfg.lr, betas=(0.5, 0.9))
        self.stepper = Stepper(self.optimizer)
        critic = make_critic(cfg, self.shown)
        self.adversary = Adversary(critic, cfg, self.seed) if critic else None
        compiled = torch.compile if self.opts.compile else lambda function: function
        self.encode = compiled(self.model.encode)
        self.decode = compiled(self.model.decode)
        self.decode_with_semantics = compiled(self.model.decode_with_semantics)

    def autocast(self) -> torch.autocast:
        """Convolutions and matrix products in bfloat16 where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, self.opts.precision == "bf16")

    def reconstruction(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        """L1 plus perceptual distance, summed over pixels, averaged over the batch."""
        distance = self.cfg.perceptual_weight * self.distance(x, x_hat) if self.distance else 0.0
        return reconstruction_loss(x, x_hat, distance)

    def step(self, step: int, images: torch.Tensor, _labels: torch.Tensor) -> dict:
        """One step of the autoencoder, and one of the critic (Eq. 5).

        images: (B, 3, H, W) uint8, this process's share; labels are not used.  Returns the
        scalars to log.
        """
        cfg, sums, found = self.cfg, {}, {}
        lr = warmup_decay_lr(step, cfg.lr, cfg.warmup_steps, cfg.lr_decay, cfg.lr_decay_every)
        ramp = adversarial_ramp(step, cfg.adv_start, cfg.adv_ramp) if self.adversary else 0.0
        share = list(pieces(len(images), self.opts.accumulate))
        # a single piece is decoded once; of several, each again, instead of keeping all graphs
        kept = self.decoded(step, images, share[0]) if len(share) == 1 else None
        pulled = [None] * len(share)
        if ramp:
            pulled = [self.pulled(step, piece, kept or self.decoded(step, images, piece), sums)
                      for piece in share]
            found = self.balance(pulled)
        factor = ramp * cfg.adv_weight * found.get("adaptive_weight", 0.0)
        for piece, pull in zip(share, pulled):
            seen = kept or self.decoded(step, images, piece)
            self.stepper.backward(self.loss(seen, piece.weight, pull, factor, sums))
        scalars = {"lr": lr, **distributed.total(sums), **found}
        scalars["grad_norm"] = self.stepper(lr, cfg.grad_clip)
        self.ema.update(self.model)
        if ramp:
            scalars["disc_grad_norm"] = self.adversary.step()
        loss = (scalars["rec"] + cfg.kl_weight * scalars["kl"] + factor * scalars.get("adv", 0.0)
                + cfg.align_weight * scalars.get("align", 0.0))
        return {"loss": loss, **scalars}

    def decoded(self, step: int, images: torch.Tensor, piece: Piece) -> Decoded:
        """A piece of the batch through the autoencoder, with noise on its tokens."""
        seed_torch(self.seed, 1, step, piece.first)  # dropout
        x = to_float(images[piece.rows].to(self.device))
        rngs = piece.rngs("posterior", self.seed, step)
        with self.autocast():
            with torch.set_grad_enabled(not self.finetuning):
                mean = self.encode(x).float()  # (B, N, D)
            sigma, eps = normal((), rngs), normal(tuple(mean.shape[1:]), rngs)
            z = add_noise(mean, self.model.config.noise, sigma.to(x.device), eps.to(x.device))
            if self.teacher is not None and step >= self.cfg.align_start:
                return Decoded(x, mean, *self.decode_with_semantics(z))
            return Decoded(x, mean, self.decode(z), None)

    def pulled(self, step: int, piece: Piece, seen: Decoded, sums: dict) -> Pulls:
        """Where reconstruction and critic pull x̂; adds to the critic's gradient and to `sums`."""
        image = seen.x_hat.detach().requires_grad_()
        with self.autocast():
            rec = piece.weight * self.reconstruction(seen.x, image)
            fake, real = (self.adversary.look(pixels, step, pixels is seen.x, piece.first)
                          for pixels in (image, seen.x))
        adv = piece.weight * self.adversary.judge(fake)
        add(sums, {"rec": rec, "adv": adv})
        pull = pulls(rec, adv, image, seen.x_hat, self.model.decoder.conv_out.weight)
        add(sums, self.adversary.learn(real, fake, piece.weight))
        return pull

    def balance(self, pulled: list[Pulls]) -> dict[str, float]:
        """The adaptive weight, from the gradients of all pieces and processes, and what it is of."""
        gradients = [torch.stack(parts).sum(0) for parts in zip(*(p.at_weight for p in pulled))]
        distributed.sum_tensors(gradients)
        norms = [gradient.norm() for gradient in gradients]
        return {"adaptive_weight": adaptive_weight(*norms).item(), "rec_grad": norms[0].item(),
                "adv_grad": norms[1].item()}

    def loss(self, seen: Decoded, weight: float, pull: Pulls | None, factor: float,
             sums: dict) -> torch.Tensor:
        """A piece's part of the loss, `weight` being its part of the batch.

        With `pull`, reconstruction and critic are in it by their gradients (`factor` being that
        of the critic's), without, by the reconstruction loss itself.
        """
        with self.autocast():
            kl = weight * kl_loss(seen.mean)
            add(sums, {"kl": kl})
            if pull is None:
                first = weight * self.reconstruction(seen.x, seen.x_hat)
                add(sums, {"rec": first})
            else:
                pull_rec, pull_adv = pull.at_image
                first = (seen.x_hat * (pull_rec + factor * pull_adv)).sum()
            loss = first + self.cfg.kl_weight * kl
            if seen.semantics is not None:
                target = self.teacher(seen.x, *seen.semantics.shape[2:])
                align = weight * alignment_loss(seen.semantics, target)
                add(sums, {"align": align})
                loss = loss + self.cfg.align_weight * align
        return loss

    def state(self) -> dict:
        """Everything a resumed run needs, as a dict of plain values and tensors."""
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(),
                "ema_updates": self.ema.updates, "optimizer": self.optimizer.state_dict(),
                "skipped": self.stepper.skipped,
                **(self.adversary.state() if self.adversary else {})}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        checkpoint.load_weights(self.model, state["model"], "last.pt")
        checkpoint.load_weights(self.ema.model, state["ema"], "last.pt")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.updates, self.stepper.skipped = state["ema_updates"], state["skipped"]
        if self.adversary:
            self.adversary.load_state(state)

    def start_from(self, state: dict) -> None:
        """Take the EMA weights of another tokenizer's checkpoint as the initial ones."""
        for model in (self.model, self.ema.model):
            checkpoint.load_weights(model, state["ema"], "--init-from")
            if not self.finetuning:  # the encoder is about to change
                model.set_statistics(math.nan, math.nan)

    @torch.no_grad()
    def validate(self, loader) -> dict[str, float]:
        """Loss and PSNR of the EMA tokenizer's reconstructions (from the mode μ)."""
        sums = dict.fromkeys(("loss", "psnr", "count"), torch.zeros((), dtype=torch.float64))
        for images, _, _ in loader:
            x = to_float(images.to(self.device))
            mean = self.ema.model.encode(x)
            x_hat = self.ema.model.decode(mean)
            loss = self.reconstruction(x, x_hat) + self.cfg.kl_weight * kl_loss(mean)
            add(sums, {"loss": len(x) * loss.cpu().double(), "count": torch.tensor(len(x)),
                       "psnr": psnr(x, x_hat).cpu().double().sum()})
        found = distributed.total(sums)
        return {f"val_{name}": found[name] / found["count"] for name in ("loss", "psnr")}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Held-out originals above their reconstructions."""
        x_hat = self.ema.model.decode(self.ema.model.encode(self.shown))
        save_png(grid([self.shown, x_hat], ["original", "decoded"]), path)


def match_semantics(setup: Setup, teacher: torch.nn.Module | None) -> TokenizerConfig:
    """The model's configuration with a semantic head as wide as the teacher, none without one.

    A model that is already there (resumed, or to start from) keeps its head.  Raises
    UserError where its width, or one asked for, is not the teacher's.
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
        raise UserError(f"the teacher's map does not serve: {error}; choose another "
                        "--align-map") from None
    return setup.model


@torch.no_grad()
def measure_statistics(tokenizer: Tokenizer, loader, device: torch.device) -> None:
    """Store mean and std, per channel, of the noisy latents z = μ + σ·ε over the images.

    The noise's share of the variance is known in closed form, so only μ is measured.  Each of
    several processes looks at the images of its own loader.
    """
    zeros = torch.zeros(tokenizer.config.token_channels, dtype=torch.float64)
    sums = {"mean": zeros, "squares": zeros, "count": torch.zeros((), dtype=torch.float64)}
    for images, _, _ in loader:
        mean = tokenizer.encode(to_float(images.to(device))).flatten(0, 1).cpu().double()
        add(sums, {"mean": mean.sum(0), "squares": mean.square().sum(0),
                   "count": torch.tensor(len(mean))})
    found = distributed.total(sums)
    mean, squares = (torch.tensor(found[name], dtype=torch.float64) / found["count"]
                     for name in ("mean", "squares"))
    variance = (squares - mean.square()).clamp_min(0)
    variance = variance + noise_variance(tokenizer.config.noise)
    tokenizer.set_statistics(mean.float(), variance.clamp_min(1e-12).sqrt().float())


def store_statistics(path: Path, loader, device: torch.device) -> None:
    """Measure the latents' statistics of a checkpoint's EMA tokenizer and write them into it."""
    content = checkpoint.load(path, "tokenizer")
    tokenizer = checkpoint.tokenizer_from_dict(content, path).to(device)
    measure_statistics(tokenizer, tqdm(loader, desc=f"latent statistics of {path.name}",
                                       disable=not distributed.is_main()), device)
    if distributed.is_main():
        content["ema"] = tokenizer.cpu().state_dict()
        checkpoint.save(path, "tokenizer", content)
    distributed.barrier()
