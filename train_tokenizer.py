"""Train the column tokenizer: images to column tokens and back (equimini/autoencoder.py).

    python train_tokenizer.py                          # landscapes drawn by code, a few minutes
    python train_tokenizer.py --data my/pictures       # a folder of class sub-folders

Writes last.pt, best.pt (lowest validation loss), log.jsonl and previews/ into --out.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from equimini import checkpoint, keyed
from equimini.autoencoder import Tokenizer, add_noise, noise_variance
from equimini.cli import RunConfig, UserError, run
from equimini.data import fixed_loader, load_data, to_float
from equimini.discriminator import PatchGAN
from equimini.images import grid, save_png
from equimini.losses import (FeatureDistance, adaptive_weight, hinge_loss, kl_loss, psnr,
                             reconstruction_loss)
from equimini.presets import TokenizerTraining
from equimini.training import Ema, Setup, Stepper, fit, set_up, warmup_decay_lr


class Trainer:
    """The tokenizer, its critic and their optimizers; one call of `step` is one training step."""

    def __init__(self, setup: Setup, shown: torch.Tensor) -> None:
        """shown: held-out images (n, 3, H, W) in [−1, 1], for the previews."""
        cfg, self.device, self.seed = setup.training, setup.device, setup.run.seed
        self.cfg, self.stepper, self.disc_stepper = cfg, Stepper(), Stepper()
        keyed.seed_torch(self.seed, 0)  # initial weights
        self.model = Tokenizer(setup.model).to(self.device)
        self.shown = shown.to(self.device)
        self.ema = Ema(self.model, cfg.ema_decay, warmup=True)
        adam = dict(lr=cfg.lr, betas=(0.5, 0.9))
        self.optimizer = torch.optim.Adam(self.model.parameters(), **adam)
        self.disc = self.disc_optimizer = self.distance = None
        if cfg.discriminator == "patchgan" and cfg.adv_weight:
            if cfg.adv_start >= cfg.steps and not setup.resumed:
                raise UserError(f"the discriminator would start at step {cfg.adv_start}, after the "
                                f"last of {cfg.steps}; give a lower --adv-start, or "
                                "--discriminator none")
            self.disc = make_critic(cfg, shown).to(self.device)
            self.disc_optimizer = torch.optim.Adam(self.disc.parameters(), **adam)
        if cfg.perceptual_net:
            self.distance = FeatureDistance(cfg.perceptual_net).to(self.device)

    def reconstruction(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        """L1 plus perceptual distance, summed over pixels, averaged over the batch."""
        distance = self.cfg.perceptual_weight * self.distance(x, x_hat) if self.distance else 0.0
        return reconstruction_loss(x, x_hat, distance)

    def step(self, step: int, images: torch.Tensor, _labels: torch.Tensor) -> dict[str, float]:
        """One step of the autoencoder, and one of the critic (Eq. 5).

        images: (B, 3, H, W) uint8; labels are not used.  Returns the scalars to log.
        """
        cfg, x = self.cfg, to_float(images.to(self.device))
        keyed.seed_torch(self.seed, 1, step)  # dropout
        lr = warmup_decay_lr(step, cfg.lr, cfg.warmup_steps, cfg.lr_decay, cfg.lr_decay_every)

        mean = self.model.encode(x)  # (B, N, D)
        rngs = [keyed.rng("posterior", self.seed, step, i) for i in range(len(x))]
        sigma, eps = keyed.normal((), rngs), keyed.normal(tuple(mean.shape[1:]), rngs)
        z = add_noise(mean, self.model.config.noise, sigma.to(x.device), eps.to(x.device))
        x_hat = self.model.decode(z)
        rec, kl = self.reconstruction(x, x_hat), kl_loss(mean)
        loss = rec + cfg.kl_weight * kl
        scalars = {"rec": rec.item(), "kl": kl.item(), "lr": lr}

        adversarial = self.disc is not None and step >= cfg.adv_start
        if adversarial:
            self.disc.requires_grad_(False)
            adv = -self.disc(x_hat).mean()
            weight = adaptive_weight(rec, adv, self.model.decoder.conv_out.weight)
            loss = loss + cfg.adv_weight * weight * adv
            scalars |= {"adv": adv.item(), "adaptive_weight": weight.item()}
        scalars["grad_norm"] = self.stepper(loss, self.optimizer, lr, cfg.grad_clip)
        self.ema.update(self.model)

        if adversarial:
            self.disc.requires_grad_(True)
            real, fake = self.disc(x), self.disc(x_hat.detach())
            disc_loss = hinge_loss(real, fake)
            norm = self.disc_stepper(disc_loss, self.disc_optimizer, cfg.lr, cfg.grad_clip)
            scalars |= {"disc_loss": disc_loss.item(), "disc_grad_norm": norm, "logit_real": real.mean().item(),
                        "logit_fake": fake.mean().item()}
        return {"loss": loss.item(), **scalars}

    def state(self) -> dict:
        """Everything a resumed run needs, as a dict of plain values and tensors."""
        state = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(),
                 "ema_updates": self.ema.updates, "optimizer": self.optimizer.state_dict(),
                 "skipped": self.stepper.skipped}
        if self.disc is not None:
            state |= {"disc": self.disc.state_dict(),
                      "disc_optimizer": self.disc_optimizer.state_dict()}
        return state

    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        checkpoint.load_weights(self.model, state["model"], "last.pt")
        checkpoint.load_weights(self.ema.model, state["ema"], "last.pt")
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.updates, self.stepper.skipped = state["ema_updates"], state["skipped"]
        if self.disc is not None and "disc" in state:
            self.disc.load_state_dict(state["disc"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])

    def start_from(self, state: dict) -> None:
        """Take the EMA weights of another tokenizer's checkpoint as the initial ones."""
        for model in (self.model, self.ema.model):
            checkpoint.load_weights(model, state["ema"], "--init-from")

    @torch.no_grad()
    def validate(self, loader) -> dict[str, float]:
        """Loss and PSNR of the EMA tokenizer's reconstructions (from the mode μ)."""
        losses, decibels = [], []
        for images, _, _ in loader:
            x = to_float(images.to(self.device))
            mean = self.ema.model.encode(x)
            x_hat = self.ema.model.decode(mean)
            loss = self.reconstruction(x, x_hat) + self.cfg.kl_weight * kl_loss(mean)
            losses += [loss.item()] * len(x)
            decibels += psnr(x, x_hat).tolist()
        return {"val_loss": sum(losses) / len(losses), "val_psnr": sum(decibels) / len(decibels)}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Held-out originals above their reconstructions."""
        x_hat = self.ema.model.decode(self.ema.model.encode(self.shown))
        save_png(grid([self.shown, x_hat], ["original", "decoded"]), path)


def make_critic(cfg: TokenizerTraining, images: torch.Tensor) -> PatchGAN:
    """The discriminator; raises UserError if the pictures are too small for its layers."""
    critic = PatchGAN(cfg.disc_channels, cfg.disc_layers)
    try:
        with torch.no_grad():
            critic.eval()(images[:1])
    except RuntimeError:
        raise UserError(f"pictures of {images.shape[2]}x{images.shape[3]} pixels are too small for "
                        f"--disc-layers {cfg.disc_layers}; give fewer") from None
    return critic.train()


@torch.no_grad()
def measure_statistics(tokenizer: Tokenizer, loader, device: torch.device) -> None:
    """Store mean and std, per channel, of the noisy latents z = μ + σ·ε over the images.

    The noise's share of the variance is known in closed form, so only μ is measured.
    """
    total, squares, count = 0.0, 0.0, 0
    for images, _, _ in loader:
        mean = tokenizer.encode(to_float(images.to(device))).flatten(0, 1).cpu().double()
        total, squares = total + mean.sum(0), squares + mean.square().sum(0)
        count += len(mean)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    variance = variance + noise_variance(tokenizer.config.noise)
    tokenizer.set_statistics(mean.float(), variance.clamp_min(1e-12).sqrt().float())


def store_statistics(path: Path, loader, device: torch.device) -> None:
    """Measure the latents' statistics of a checkpoint's EMA tokenizer and write them into it."""
    content = checkpoint.load(path, "tokenizer")
    tokenizer = checkpoint.tokenizer_from_dict(content, path).to(device)
    measure_statistics(tokenizer, tqdm(loader, desc=f"latent statistics of {path.name}"), device)
    content["ema"] = tokenizer.cpu().state_dict()
    checkpoint.save(path, "tokenizer", content)


def main() -> None:
    setup = set_up("tokenizer", __doc__.split("\n")[0], RunConfig(out="runs/tokenizer"))
    if setup.model.semantic_channels:
        raise UserError("--semantic-channels: no loss trains the semantic head yet; it is for "
                        "converted checkpoints")
    train, val, classes = load_data(setup.run, setup.model)
    trainer = Trainer(setup, to_float(next(iter(fixed_loader(val, 8, 8)))[0]))
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"tokenizer {setup.preset}: {millions:.2f} M parameters, {setup.model.columns} columns "
          f"per {setup.model.image_size}x{setup.model.image_size} image, {len(train)} training "
          f"and {len(val)} held-out images of {len(classes)} classes, on {setup.device}")
    fit("tokenizer", setup, trainer, train, val, classes)
    cfg = setup.training
    stats = fixed_loader(train, cfg.batch_size, cfg.stats_images, setup.run.workers)
    for path in filter(Path.exists, (setup.out / "best.pt", setup.out / "last.pt")):
        store_statistics(path, stats, setup.device)
    print(f"done: {setup.out}/last.pt; pictures in {setup.out}/previews")


if __name__ == "__main__":
    run(main)
