"""Train the column tokenizer: images to column tokens and back (equimini/autoencoder.py).

    python train_tokenizer.py                          # landscapes drawn by code, a few minutes
    python train_tokenizer.py --data my/pictures       # a folder of class sub-folders
    python train_tokenizer.py --finetune-decoder runs/tokenizer/last.pt --out runs/finetuned

Writes last.pt, best.pt (lowest validation loss), log.jsonl and previews/ into --out.  All losses
and what they need: docs/tokenizer.md.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from equimini import checkpoint, keyed
from equimini.autoencoder import Tokenizer, add_noise, noise_variance
from equimini.cli import RunConfig, UserError, config_from_dict, run
from equimini.data import fixed_loader, load_data, to_float
from equimini.discriminator import Adversary, make_critic
from equimini.images import grid, save_png
from equimini.losses import (adversarial_ramp, alignment_loss, balance, kl_loss, make_distance,
                             make_teacher, psnr, reconstruction_loss)
from equimini.presets import PRESETS, TokenizerConfig, flag
from equimini.training import Ema, Setup, Stepper, fit, set_up, warmup_decay_lr


@dataclass(frozen=True)
class TokenizerRun(RunConfig):
    """The run's options, and those of the tokenizer alone."""

    finetune_decoder: str = flag("", "stage 2: checkpoint of a trained tokenizer, whose EMA "
                                 "weights are taken; its encoder stays as it is, its decoder is "
                                 "trained on, without alignment")
    precision: str = flag("float32", "arithmetic of convolutions and matrix products; bf16 "
                          "(autocast) is faster where the processor has it; losses, norms and the "
                          "adaptive weight stay in float32", choices=("float32", "bf16"))
    channels_last: bool = flag(False, "keep feature maps in the channels-last layout")
    compile: bool = flag(False, "compile encoder and decoder with torch.compile")


class Trainer:
    """The tokenizer, its critic and their optimizers; one call of `step` is one training step."""

    def __init__(self, setup: Setup, shown: torch.Tensor) -> None:
        """shown: held-out images (n, 3, H, W) in [−1, 1], for the previews."""
        cfg, self.device, self.seed = setup.training, setup.device, setup.run.seed
        self.cfg, self.opts, self.stepper = cfg, setup.run, Stepper()
        self.shown = shown.to(self.device)
        self.finetuning = bool(setup.run.finetune_decoder)
        self.distance = make_distance(cfg, self.shown)
        self.teacher = None if self.finetuning else make_teacher(cfg, self.shown)
        keyed.seed_torch(self.seed, 0)  # initial weights
        self.model = Tokenizer(match_semantics(setup, self.teacher)).to(self.device)
        if self.finetuning:
            self.model.freeze_latents()
        if self.opts.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.ema = Ema(self.model, cfg.ema_decay, warmup=True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=cfg.lr, betas=(0.5, 0.9))
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

    def sample(self, mean: torch.Tensor, step: int) -> torch.Tensor:
        """z = μ + σ·ε; mean: (B, N, D), draws keyed by the step and the place in the batch."""
        rngs = [keyed.rng("posterior", self.seed, step, i) for i in range(len(mean))]
        sigma, eps = keyed.normal((), rngs), keyed.normal(tuple(mean.shape[1:]), rngs)
        return add_noise(mean, self.model.config.noise, sigma.to(mean.device), eps.to(mean.device))

    def step(self, step: int, images: torch.Tensor, _labels: torch.Tensor) -> dict[str, float]:
        """One step of the autoencoder, and one of the critic (Eq. 5).

        images: (B, 3, H, W) uint8; labels are not used.  Returns the scalars to log.
        """
        cfg, x = self.cfg, to_float(images.to(self.device))
        keyed.seed_torch(self.seed, 1, step)  # dropout
        lr = warmup_decay_lr(step, cfg.lr, cfg.warmup_steps, cfg.lr_decay, cfg.lr_decay_every)
        ramp = adversarial_ramp(step, cfg.adv_start, cfg.adv_ramp) if self.adversary else 0.0
        aligned = self.teacher is not None and step >= cfg.align_start

        with self.autocast():
            with torch.set_grad_enabled(not self.finetuning):
                mean = self.encode(x).float()  # (B, N, D)
            z = self.sample(mean, step)
            x_hat, semantics = self.decode_with_semantics(z) if aligned else (self.decode(z), None)
            image = x_hat.detach().requires_grad_() if ramp else x_hat  # see `balance`
            rec, kl = self.reconstruction(x, image), kl_loss(mean)
            loss, scalars = rec, {"rec": rec.item(), "kl": kl.item(), "lr": lr}
            if ramp:
                fake, real = (self.adversary.look(pixels, step, real=pixels is x)
                              for pixels in (image, x))
        if ramp:
            loss, found = balance(rec, self.adversary.judge(fake), image, x_hat,
                                  self.model.decoder.conv_out.weight, ramp * cfg.adv_weight)
            scalars |= found
        loss = loss + cfg.kl_weight * kl
        if aligned:
            with self.autocast():
                target = self.teacher(x, *semantics.shape[2:])
            align = alignment_loss(semantics, target)
            loss, scalars["align"] = loss + cfg.align_weight * align, align.item()
        scalars["grad_norm"] = self.stepper(loss, self.optimizer, lr, cfg.grad_clip)
        self.ema.update(self.model)
        if ramp:
            scalars |= self.adversary.learn(real, fake)
        return {"loss": loss.item(), **scalars}

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
    """The checkpoint of --finetune-decoder, whose sizes the model takes.

    Raises UserError if it has no latent statistics, or other sizes than the model's flags say.
    """
    path = setup.run.finetune_decoder
    if setup.run.init_from:
        raise UserError("give --finetune-decoder or --init-from, not both")
    content = checkpoint.load(path, "tokenizer")
    checkpoint.check_statistics(checkpoint.tokenizer_from_dict(content, path), path)
    saved = config_from_dict(TokenizerConfig, content["config"]["model"])
    asked, there = (asdict(m) | {"semantic_channels": 0} for m in (setup.model, saved))
    if setup.model != PRESETS[setup.preset].tokenizer and asked != there:
        raise UserError(f"--finetune-decoder {path} holds a model of other sizes than asked for; "
                        "leave the model's flags out")
    setup.model = saved
    return content


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


def main(argv: list[str] | None = None) -> None:
    setup = set_up("tokenizer", __doc__.split("\n")[0], TokenizerRun(out="runs/tokenizer"),
                   argv)
    check_starts(setup)
    finetuning = setup.run.finetune_decoder
    if setup.resumed and setup.resumed["config"]["run"].get("finetune_decoder", "") != finetuning:
        raise UserError("--finetune-decoder starts a run of its own; leave out --resume, and "
                        "choose another --out")
    if finetuning and not setup.resumed:
        setup.initial = stage_one(setup)
    train, val, classes = load_data(setup.run, setup.model)
    trainer = Trainer(setup, to_float(next(iter(fixed_loader(val, 8, 8)))[0]))
    trained = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    print(f"tokenizer {setup.preset}: {trained / 1e6:.2f} M parameters to train, "
          f"{setup.model.columns} columns per {setup.model.image_size}x{setup.model.image_size} "
          f"image, {len(train)} training and {len(val)} held-out images of {len(classes)} classes, "
          f"on {setup.device}")
    fit("tokenizer", setup, trainer, train, val, classes)
    cfg = setup.training
    stats = fixed_loader(train, cfg.batch_size, cfg.stats_images, setup.run.workers)
    for path in filter(Path.exists, (setup.out / "best.pt", setup.out / "last.pt")):
        if not finetuning:  # stage 2 keeps those of stage 1, whose encoder it has
            store_statistics(path, stats, setup.device)
    print(f"done: {setup.out}/last.pt; pictures in {setup.out}/previews")


if __name__ == "__main__":
    run(main)
