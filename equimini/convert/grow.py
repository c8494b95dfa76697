"""Make a generator's tokenizer draw pictures twice as high, from the same tokens.

    python -m equimini.convert.grow scenes --data photos/train --out runs/grown.pt
    python train_tokenizer.py --finetune-decoder runs/grown-tokenizer.pt --data photos/train ...
    python -m equimini.convert.pack runs/grown.pt --tokenizer runs/tokenizer/last.pt --out my.pt

The first command adds one stage at full resolution to encoder and decoder, and trains the encoder
to give for a picture the tokens that the old one gives for the same picture at half the size.  So
the generator, which knows tokens only, needs no training.  It writes the generator, and beside it
the tokenizer, whose decoder doubles the pixels at first: the detail is what the second command, the
tokenizer's stage 2 with all its losses, teaches it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini.autoencoder import Tokenizer
from equimini.config import flag
from equimini.convert.pack import kept
from equimini.noise import seed_torch
from equimini.training.data import fixed_loader, load_data, training_loader
from equimini.training.loop import Stepper, cooldown
from equimini.training.options import DataConfig
from equimini.utils import checkpoint
from equimini.utils.command_line import command, output_folder, override, pick_device, run
from equimini.utils.errors import UserError
from equimini.utils.images import to_float

NEXT_STAGE = re.compile(r"(?<=^encoder\.)(stages|downs)\.(\d+)")  # the new one comes first


@dataclass(frozen=True)
class GrowConfig(DataConfig):
    """How the new encoder learns the old one's tokens."""

    out: str = flag("runs/grown.pt", "file to write: the generator; its tokenizer lies beside it")
    steps: int = flag(220, "training steps of the encoder", min=1)
    batch_size: int = flag(24, "images per step", min=1)
    lr: float = flag(2e-3, "learning rate of Adam, which falls to 0", min=1e-9)


def grow(old: Tokenizer) -> Tokenizer:
    """A tokenizer for images of twice the height, begun with the weights and statistics of `old`.

    Its encoder averages 2×2 pixels before the old layers, its decoder repeats what comes after
    them: both only nearly the old ones', as convolutions now see smaller neighbourhoods.
    """
    new = Tokenizer(replace(old.config, image_size=2 * old.config.image_size,
                            multipliers=(1, *old.config.multipliers)))
    weights = new.state_dict()
    for name, tensor in old.state_dict().items():
        name = NEXT_STAGE.sub(lambda m: f"{m[1]}.{int(m[2]) + 1}", name)
        if weights[name].shape == tensor.shape:  # but for the last layers where multipliers[0] > 1
            weights[name] = tensor
    new.load_state_dict(weights)
    encoder, decoder = new.encoder, new.decoder
    silent = [encoder.downs[0].conv, decoder.ups[-1].conv,
              *(b.conv2 for stage in (encoder.stages[0], decoder.stages[-1]) for b in stage.blocks)]
    for conv in silent:  # what lies around them remains: average, repetition, skip
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    return new


def half_size(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] at half the size, as Pillow's bicubic filter shrinks them."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)


def token_error(new: Tokenizer, old: Tokenizer, images: Tensor) -> Tensor:
    """Mean squared distance of both tokenizers' tokens, in variances of the latents."""
    with torch.no_grad():
        wanted = old.encode(half_size(images))
    return ((new.encode(images) - wanted) / old.latent_std).square().mean()


def imitate(new: Tokenizer, old: Tokenizer, batches: DataLoader, lr: float) -> None:
    """Train the encoder of `new` to give the tokens of `old`, one step for each of the batches."""
    trained = [*new.encoder.parameters(), *new.to_tokens.parameters()]
    stepper = Stepper(torch.optim.Adam(trained, betas=(0.9, 0.99)))
    for step, (images, *_) in enumerate(bar := tqdm(batches, desc="encoder")):
        loss = token_error(new, old, to_float(images.to(old.latent_std.device)))
        loss.backward()
        stepper(lr * min(1, (step + 1) / 30) * cooldown(step, len(batches), 1), 1.0)
        bar.set_postfix(error=f"{loss.item():.4f}")


def main() -> None:
    parser = command("equimini.convert.grow", __doc__, GrowConfig())
    parser.add_argument("checkpoint", help="checkpoint of a generator, or 'scenes'")
    args = parser.parse_args()
    cfg = override(GrowConfig(), args)
    source, out = checkpoint.find(args.checkpoint), Path(cfg.out)
    content, device = checkpoint.load(source, "generator"), pick_device(cfg.device)
    old = checkpoint.tokenizer_inside(content, source).to(device)
    seed_torch(cfg.seed, 0)  # initial weights of the new stages
    new = grow(old).to(device)
    output_folder(out.parent)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file to write, .pt")
    train, val, _ = load_data(cfg, new.config)
    imitate(new, old, training_loader(train, cfg.batch_size, cfg, 0, cfg.steps), cfg.lr)
    with torch.no_grad():
        held_out = [token_error(new, old, to_float(images.to(device))).item()
                    for images, *_ in fixed_loader(val, cfg.batch_size, 256)]
    beside = out.with_name(f"{out.stem}-tokenizer{out.suffix}")
    checkpoint.save(beside, "tokenizer", {"config": {"preset": content["config"]["preset"],
                                                     "model": asdict(new.config)},
                                          "ema": new.state_dict()})
    checkpoint.save(out, "generator", {**kept(content), "ema": content["ema"],
                                       "tokenizer": {"file": beside.name}})
    print(f"{out} and {beside}: images of {new.config.image_size} pixels from the same tokens; "
          f"held-out tokens differ by {sum(held_out) / len(held_out):.4f} of their variance")


if __name__ == "__main__":
    run(main)
