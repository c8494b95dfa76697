"""Every number of the model and of its training, as dataclasses, and the named presets.

    python -m equimini.presets      # prints the table of presets

A field is declared once, here: its default, its one line of help with the unit, and its range.
Command-line flags, `--help` and the checkpoints' configuration are made from these fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.config import Checked, flag
from equimini.generator import Generator, GeneratorConfig

WANTED = ("required", "if-given", "none")  # a frozen network whose weights the user gives


@dataclass(frozen=True)
class TokenizerTraining(Checked):
    """How a tokenizer is trained; the numbers are the paper's (ImageNet, batch 192)."""

    steps: int = flag(333_638, "training steps (the default: 50 epochs of ImageNet)", min=1)
    batch_size: int = flag(192, "images per step", min=1)
    lr: float = flag(1.92e-4, "learning rate of Adam after the warm-up", min=0)
    warmup_steps: int = flag(5000, "steps over which the learning rate rises from 0", min=0)
    lr_decay: float = flag(0.2, "factor on the learning rate at every decay", min=0, max=1)
    lr_decay_every: int = flag(30_000, "steps between decays, counted from the warm-up's end",
                               min=1)
    grad_clip: float = flag(1.0, "largest gradient norm", min=1e-9)
    ema_decay: float = flag(0.9999, "decay per step of the moving average of the weights (with "
                            "warm-up (1+n)/(10+n))", min=0, max=1)
    kl_weight: float = flag(0.01, "weight of the KL term", min=0)
    perceptual: str = flag("if-given", "perceptual distance, by --lpips-weights or "
                           "--perceptual-net: an error without either (required), left out "
                           "without either (if-given), or left out", choices=WANTED)
    lpips_weights: str = flag("", "LPIPS on VGG16: 'download', a folder with vgg16-397923af.pth "
                              "and LPIPS v0.1's vgg.pth, or the two files with a comma between")
    perceptual_net: str = flag("", "in place of VGG16, a TorchScript file that maps images in "
                               "[-1, 1] to a list of feature maps")
    perceptual_weight: float = flag(1.0, "weight of the perceptual distance, per pixel value",
                                    min=0)
    discriminator: str = flag("patchgan", "adversarial critic: PatchGAN, heads on a frozen DINO "
                              "ViT-S/16 (or --disc-net), or none",
                              choices=("patchgan", "dino", "none"))
    disc_channels: int = flag(64, "channels of PatchGAN's first layer", min=1)
    disc_layers: int = flag(3, "strided layers of PatchGAN", min=1)
    dino_weights: str = flag("", "DINO ViT-S/16: dino_deitsmall16_pretrain.pth, or 'download'")
    disc_net: str = flag("", "in place of DINO, a TorchScript file as for --perceptual-net")
    disc_head_channels: int = flag(384, "channels of each head on the frozen network", min=1)
    disc_lr: float = flag(0.0, "learning rate of the discriminator, constant; 0: that of --lr",
                          min=0)
    carry_disc: bool = flag(True, "stage 2 (--finetune-decoder) begins with the discriminator of "
                            "stage 1, as the release does; else with a new one", before=False)
    adv_weight: float = flag(0.5, "weight of the adversarial term, on top of the adaptive weight",
                             min=0)
    adv_start: int = flag(5000, "step from which both adversarial losses are on", min=0)
    adv_ramp: int = flag(0, "steps over which the autoencoder's adversarial weight then rises "
                         "from 0; 0: at once", min=0)
    align: str = flag("if-given", "semantic alignment with --dinov2-weights or --align-net: an "
                      "error without either (required), left out without either (if-given), or "
                      "left out", choices=WANTED)
    dinov2_weights: str = flag("", "DINOv2 ViT-B/14: dinov2_vitb14_pretrain.pth, or 'download'")
    align_net: str = flag("", "in place of DINOv2, a TorchScript file as for --perceptual-net")
    align_map: int = flag(-1, "which map of --align-net, counted from 0; -1: the last")
    align_weight: float = flag(5.0, "weight of the alignment loss, per value of the map", min=0)
    align_start: int = flag(20_000, "step from which the alignment loss is on", min=0)
    stats_images: int = flag(10_000, "training images over which the latents' mean and std are "
                             "measured when training ends", min=2)


@dataclass(frozen=True)
class GeneratorTraining(Checked):
    """How a generator is trained; the defaults are the paper's (ImageNet, batch 2048)."""

    steps: int = flag(750_684, "training steps (the default: 1200 epochs of ImageNet)", min=1)
    batch_size: int = flag(2048, "images per step", min=1)
    lr: float = flag(8e-4, "learning rate of AdamW after the warm-up", min=0)
    warmup_steps: int = flag(62_557, "steps over which the learning rate rises from 0 (the "
                             "default: 100 epochs of ImageNet)", min=0)
    lr_cooldown: float = flag(0.0, "share of the steps, the last ones, over which the learning "
                              "rate falls linearly to 0; 0: it stays constant", min=0, max=1)
    weight_decay: float = flag(0.02, "weight decay (not on biases, norms and the flow head)",
                               min=0)
    grad_clip: float = flag(3.0, "largest gradient norm", min=1e-9)
    ema_decay: float = flag(0.9999, "decay per step of the moving average of the weights", min=0,
                            max=1)
    label_dropout: float = flag(0.1, "probability that an image is trained without its class",
                                min=0, max=1)
    batch_multiplier: int = flag(4, "times that every token is used per step, each with its own "
                                 "t and noise", min=1)
    subtasks: tuple[int, ...] = flag((), "columns, counted from 0, whose loss is trained, such as "
                                     "0,2,4 (the others are context only); empty: all", min=0)
    position_shift: int = flag(16, "positions are shifted by a random number of columns below "
                               "this; 1: no augmentation", min=1)
    shift_group: int = flag(32, "images of a batch that share a shift, as those of one process of "
                            "the release; 0: all", min=0, before=0)


@dataclass(frozen=True)
class Preset:
    """A tokenizer, a generator, and how each is trained."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_training: TokenizerTraining = TokenizerTraining()
    generator: GeneratorConfig = GeneratorConfig()
    generator_training: GeneratorTraining = GeneratorTraining()


def _paper(layers: int, embed_dim: int, heads: int, head_width: int) -> Preset:
    return Preset(
        TokenizerConfig(semantic_channels=768),
        TokenizerTraining(perceptual="required", discriminator="dino", align="required"),
        GeneratorConfig(layers=layers, embed_dim=embed_dim, heads=heads, head_width=head_width))


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        TokenizerConfig(
            image_size=64, base_channels=16, multipliers=(1, 2, 4), blocks=1, norm_groups=8,
            attention_rows=(16,), z_channels=32, token_channels=64, noise=0.5),
        TokenizerTraining(
            steps=800, batch_size=16, lr=2e-3, warmup_steps=50, lr_decay=0.3, lr_decay_every=500,
            ema_decay=0.995, kl_weight=0.01, perceptual_weight=0.1, discriminator="none",
            disc_channels=32, disc_head_channels=64, disc_lr=1e-3, adv_start=350, adv_ramp=100,
            align_weight=0.05, align_start=100, align_map=-2, stats_images=1024),
        GeneratorConfig(layers=4, embed_dim=256, heads=4, head_width=256, head_depth=6,
                        dropout=0.0),
        GeneratorTraining(steps=800, batch_size=16, lr=1e-3, warmup_steps=50, ema_decay=0.99)),
    "small": _paper(16, 512, 8, 960),
    "base": _paper(24, 768, 12, 1024),
    "large": _paper(32, 1024, 16, 1280),
    "huge": _paper(40, 1280, 16, 1536),
}


def paper_training(kind: str, images: int, batch_size: int | None = None
                   ) -> TokenizerTraining | GeneratorTraining:
    """The paper's training of a 'tokenizer' or 'generator' for a data set of `images` pictures.

    Its schedules are given in epochs: 50 of the tokenizer, 1200 of the generator, of which 100 warm
    up.  The generator's learning rate is 1e-4 per 256 pictures of a batch.  batch_size: in place
    of the paper's (192, 2048); the epochs stay.
    """
    if kind == "tokenizer":
        cfg = PRESETS["small"].tokenizer_training
        batch = batch_size or cfg.batch_size
        return replace(cfg, batch_size=batch, steps=math.ceil(50 * images / batch))
    batch = batch_size or GeneratorTraining().batch_size
    return GeneratorTraining(batch_size=batch, lr=1e-4 * batch / 256,
                             steps=math.ceil(1200 * images / batch),
                             warmup_steps=math.ceil(100 * images / batch))


def parameters(module: nn.Module) -> int:
    """Number of weights of a module."""
    return sum(p.numel() for p in module.parameters())


LEGEND = """
generator, encoder, to tokens, from tokens, decoder: parameters in millions (1000 classes).
GFLOPs: one forward pass over the columns and the 16 class tokens, flow head once per column,
conditional branch, 2 FLOPs per multiply-add; linear: without the attention's products.
GMACs: multiply-adds of one training forward, flow head once per repeat of a column (4, the batch
multiplier): what the paper prints as GFLOPs, 5.41, 9.78, 19.66 and 34.91."""


def cost(config: GeneratorConfig, tokens: int = 16, channels: int = 256) -> dict[str, float]:
    """Size and compute of a generator, see LEGEND, counted on the meta device.

    Attention's products are q·k and p·v, with the columns in the window and with class tokens.
    """
    with torch.device("meta"):
        generator = Generator(config, 1000, channels).eval()
        x, t = torch.empty(1, tokens, channels), torch.empty(1, tokens)
        label = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            z = generator(x, generator.encode_classes(label))
            transformer = counter.get_total_flops()
            generator.head(x, t, z)
    head = counter.get_total_flops() - transformer
    by_operator, products = counter.get_flop_counts()["Global"], torch.ops.aten
    return {"generator": parameters(generator) / 1e6, "GFLOPs": (transformer + head) / 1e9,
            "linear": (by_operator[products.addmm] + by_operator.get(products.mm, 0)) / 1e9,
            "GMACs": (transformer + GeneratorTraining().batch_multiplier * head) / 2e9}


def sizes(preset: Preset) -> dict[str, float]:
    """`cost` of the preset's generator, and millions of parameters of the tokenizer's parts."""
    shape = preset.tokenizer
    with torch.device("meta"):
        tokenizer = Tokenizer(shape)
    parts = ("encoder", "to_tokens", "from_tokens", "decoder")
    return cost(preset.generator, shape.columns, shape.token_channels) | {
        part.replace("_", " "): parameters(getattr(tokenizer, part)) / 1e6 for part in parts}


def main() -> None:
    """Print the table of presets."""
    table = []
    for name, preset in PRESETS.items():
        t, g = preset.tokenizer, preset.generator
        table.append({
            "preset": name, "image": f"{t.image_size}x{t.image_size}", "columns": t.columns,
            "channels": t.token_channels, "layers": g.layers, "width": g.embed_dim,
            "heads": g.heads, "window": g.window, "head MLP": f"{g.head_width}x{g.head_depth}",
            **{key: f"{value:.2f}" for key, value in sizes(preset).items()}})
    rows = [[*table[0]], *(row.values() for row in table)]
    widths = [max(len(str(value)) for value in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(str(value).rjust(width) for value, width in zip(row, widths)))
    print(LEGEND)


if __name__ == "__main__":
    main()
