"""One step of the tokenizer's training (Eq. 5), and what surrounds it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from equimini.autoencoder import Tokenizer, add_noise, noise_variance
from equimini.config import flag
from equimini.discriminator import FeatureCritic, PatchGAN
from equimini.losses import (ImageGradients, adaptive_weight, alignment_loss, hinge_loss,
                             image_gradients, kl_loss, psnr, reconstruction_loss)
from equimini.noise import normal, rng, seed_torch
from equimini.presets import TokenizerTraining
from equimini.training.loop import (MicroBatch, Stepper, Trainer, add, load_optimizer,
                                    micro_batches, total, warmup_decay_lr)
from equimini.training.options import PRECISIONS, RunConfig
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

    x: Tensor
    mean: Tensor
    x_hat: Tensor
    semantics: Tensor | None


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


class TokenizerTrainer(Trainer):
    """The tokenizer, its critic and their optimizers; one call of `step` is one training step."""

    def __init__(self, model: Tokenizer, distance: nn.Module | None, teacher: nn.Module | None,
                 adversary: Adversary | None, cfg: TokenizerTraining, opts: TokenizerRun,
                 shown: Tensor) -> None:
        """All parts on one device, frozen what is to stay; shown: held-out images (n, 3, H, W) in
        [−1, 1], for the previews."""
        if opts.channels_last:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad],
                                     lr=cfg.lr, betas=(0.5, 0.9))
        super().__init__(model, cfg, opts, shown.device, optimizer, ema_warmup=True)
        self.distance, self.teacher, self.adversary, self.shown = distance, teacher, adversary, shown
        self.finetuning = bool(opts.finetune_decoder)
        self.all_losses_from = max(cfg.adv_start + cfg.adv_ramp if adversary else 0,
                                   cfg.align_start if teacher else 0)
        compiled = torch.compile if opts.compile else lambda function: function
        self.encode, self.decode = compiled(model.encode), compiled(model.decode)
        self.decode_with_semantics = compiled(model.decode_with_semantics)

    def reconstruction(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """L1 plus perceptual distance, summed over pixels, averaged over the batch."""
        distance = self.cfg.perceptual_weight * self.distance(x, x_hat) if self.distance else 0.0
        return reconstruction_loss(x, x_hat, distance)

    def step(self, step: int, images: Tensor, _labels: Tensor) -> dict:
        """One step of the autoencoder, and one of the critic: Eq. 5, as losses.total_loss has it.

        images: (B, 3, H, W) uint8, this process's local batch; labels are not used.  Returns the
        scalars to log.
        """
        cfg, sums, found = self.cfg, {}, {}
        ramp = adversarial_ramp(step, cfg.adv_start, cfg.adv_ramp) if self.adversary else 0.0
        parts = list(micro_batches(len(images), self.opts.accumulate))
        # a single part is decoded once; of several, each again, instead of keeping all graphs
        kept = self.decoded(step, images, parts[0]) if len(parts) == 1 else None
        gradients = [None] * len(parts)
        if ramp:
            gradients = [self.image_gradients(step, part, kept or self.decoded(step, images, part),
                                              sums) for part in parts]
            found = self.balance(gradients)
        factor = ramp * cfg.adv_weight * found.get("adaptive_weight", 0.0)
        for part, at_image in zip(parts, gradients):
            out = kept or self.decoded(step, images, part)
            self.loss(out, part.weight, at_image, factor, sums).backward()
        lr = warmup_decay_lr(step, cfg.lr, cfg.warmup_steps, cfg.lr_decay, cfg.lr_decay_every)
        scalars = {"lr": lr, **total(sums), **found}
        scalars["grad_norm"] = self.stepper(lr, cfg.grad_clip)  # Adam
        self.ema.update(self.model)
        if ramp:
            scalars["disc_grad_norm"] = self.adversary.stepper(self.adversary.lr, cfg.grad_clip)
        loss = (scalars["rec"] + cfg.kl_weight * scalars["kl"] + factor * scalars.get("adv", 0.0)
                + cfg.align_weight * scalars.get("align", 0.0))
        return {"loss": loss, **scalars}

    def decoded(self, step: int, images: Tensor, part: MicroBatch) -> Decoded:
        """A micro-batch through the autoencoder, with noise on its tokens."""
        seed_torch(self.seed, 1, step, part.places[0])  # dropout
        x = to_float(images[part.rows].to(self.device))
        rngs = [rng("posterior", self.seed, step, place) for place in part.places]
        with self.autocast():
            with torch.set_grad_enabled(not self.finetuning):
                mean = self.encode(x).float()  # (B, N, D)
            sigma, eps = normal((), rngs), normal(tuple(mean.shape[1:]), rngs)
            z = add_noise(mean, self.model.config.noise, sigma.to(x.device), eps.to(x.device))
            if self.teacher is not None and step >= self.cfg.align_start:
                return Decoded(x, mean, *self.decode_with_semantics(z))
            return Decoded(x, mean, self.decode(z), None)

    def image_gradients(self, step: int, part: MicroBatch, out: Decoded,
                        sums: dict) -> ImageGradients:
        """Those of reconstruction and critic; adds to the critic's own gradient and to `sums`."""
        image = out.x_hat.detach().requires_grad_()
        with self.autocast():
            rec = part.weight * self.reconstruction(out.x, image)
            fake, real = (self.adversary.features(pixels, step, pixels is out.x, part.places[0])
                          for pixels in (image, out.x))
        adv = part.weight * -self.adversary.critic.logits(fake).mean()
        add(sums, {"rec": rec, "adv": adv})
        found = image_gradients(rec, adv, image, out.x_hat, self.model.decoder.conv_out.weight)
        add(sums, self.adversary.backward(real, fake, part.weight))
        return found

    def balance(self, gradients: list[ImageGradients]) -> dict[str, float]:
        """The adaptive weight λ, from the gradients of all micro-batches and processes."""
        at_weight = [torch.stack(parts).sum(0) for parts in zip(*(g.weight for g in gradients))]
        distributed.sum_tensors(at_weight)
        norms = [gradient.norm() for gradient in at_weight]
        return {"adaptive_weight": adaptive_weight(*norms).item(), "rec_grad": norms[0].item(),
                "adv_grad": norms[1].item()}

    def loss(self, out: Decoded, weight: float, gradients: ImageGradients | None, factor: float,
             sums: dict) -> Tensor:
        """A micro-batch's part of the loss, `weight` being its part of the batch.

        With `gradients`, reconstruction and critic are in it by these (`factor` being that of the
        critic's), without, by the reconstruction loss itself.
        """
        with self.autocast():
            terms = {"kl": weight * kl_loss(out.mean)}
            if gradients is None:
                first = terms["rec"] = weight * self.reconstruction(out.x, out.x_hat)
            else:
                grad_rec, grad_adv = gradients.image
                first = (out.x_hat * (grad_rec + factor * grad_adv)).sum()
            loss = first + self.cfg.kl_weight * terms["kl"]
            if out.semantics is not None:
                target = self.teacher(out.x, *out.semantics.shape[2:])
                terms["align"] = weight * alignment_loss(out.semantics, target)
                loss = loss + self.cfg.align_weight * terms["align"]
        add(sums, terms)
        return loss

    def more_state(self) -> dict:
        return {"ema_updates": self.ema.updates,
                **(self.adversary.state() if self.adversary else {})}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.ema.updates = state["ema_updates"]
        if self.adversary:
            self.adversary.load_state(state)

    def start_from(self, state: dict) -> None:
        """Take the EMA weights of another tokenizer's checkpoint as the initial ones.

        In stage 2, if the settings say so, the critic's weights as well.
        """
        for model in (self.model, self.ema.model):
            checkpoint.load_weights(model, state["ema"], "--init-from")
            if not self.finetuning:  # the encoder is about to change
                model.set_statistics(math.nan, math.nan)
        if self.finetuning and self.adversary and self.cfg.carry_disc:
            self.adversary.carry_over(state, self.opts.finetune_decoder)

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
        found = total(sums)
        return {f"val_{name}": found[name] / found["count"] for name in ("loss", "psnr")}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Held-out originals above their reconstructions."""
        x_hat = self.ema.model.decode(self.ema.model.encode(self.shown))
        save_png(grid([self.shown, x_hat], ["original", "decoded"]), path)


def adversarial_ramp(step: int, start: int, length: int) -> float:
    """Share of the adversarial weight at a step: 0 before `start`, then up to 1 in `length` steps
    (0: at once)."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / length) if length else 1.0


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
    found = total(sums)
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
