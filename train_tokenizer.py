"""Train the column tokenizer: images to column tokens and back (equimini/autoencoder.py).

    python train_tokenizer.py                          # landscapes drawn by code, a few minutes
    python train_tokenizer.py --data my/pictures       # a folder of class sub-folders
    python train_tokenizer.py --finetune-decoder runs/tokenizer/last.pt --out runs/finetuned

Writes last.pt, best.pt (lowest validation loss since all losses are on), log.jsonl and previews/
into --out.  One step is that of equimini/training/tokenizer_trainer.py; all losses and what they
need: docs/tokenizer.md.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.noise import seed_torch
from equimini.presets import PRESETS
from equimini.training.data import count_images, fixed_loader, load_data
from equimini.training.dry_run import dry_run
from equimini.training.loop import fit
from equimini.training.setup import PATIENCE, Setup, set_up
from equimini.training.tokenizer_losses import (make_critic, make_distance, make_teacher,
                                                match_semantics)
from equimini.training.tokenizer_trainer import (Adversary, TokenizerRun, TokenizerTrainer,
                                                 store_statistics)
from equimini.utils import checkpoint, distributed
from equimini.utils.command_line import config_from_dict, run
from equimini.utils.errors import UserError
from equimini.utils.images import to_float


def make_trainer(setup: Setup, shown: Tensor) -> TokenizerTrainer:
    """The parts of Eq. 5 that the settings ask for; shown: images (n, 3, H, W) in [−1, 1]."""
    cfg, shown = setup.training, shown.to(setup.device)
    distance = make_distance(cfg, shown)  # L_perceptual
    teacher = None if setup.run.finetune_decoder else make_teacher(cfg, shown)  # L_align
    config = match_semantics(setup, teacher)
    seed_torch(setup.run.seed, 0)  # initial weights
    model = Tokenizer(config).to(setup.device)
    if setup.run.finetune_decoder:
        model.freeze_latents()
    critic = make_critic(cfg, shown)  # L_adv
    adversary = Adversary(critic, cfg, setup.run.seed) if critic else None
    return TokenizerTrainer(model, distance, teacher, adversary, cfg, setup.run, shown)


def main(argv: list[str] | None = None) -> None:
    setup = set_up("tokenizer", __doc__.split("\n")[0], TokenizerRun(out="runs/tokenizer"),
                   argv)
    with distributed.processes(setup.device, PATIENCE), setup.folder():
        rehearse(setup) if setup.dry_run else train_tokenizer(setup)


def rehearse(setup: Setup) -> None:
    """--dry-run: a few steps with all losses on, on noise."""
    cfg, size = setup.training, setup.model.image_size
    example = torch.randint(0, 256, (1, 3, size, setup.run.width or size), dtype=torch.uint8)
    dry_run(setup, count_images(setup.run),
            lambda: (make_trainer(setup, to_float(example)), example),
            step=max(cfg.adv_start + cfg.adv_ramp, cfg.align_start))


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


def train_tokenizer(setup: Setup) -> None:
    """A whole training, from the first step or the resumed one, and the latents' statistics."""
    check_starts(setup)
    finetuning = setup.run.finetune_decoder
    if setup.resumed and setup.resumed["config"]["run"].get("finetune_decoder", "") != finetuning:
        raise UserError("--finetune-decoder starts a run of its own; leave out --resume, and "
                        "choose another --out")
    if finetuning and not setup.resumed:
        setup.initial = stage_one(setup)
    train, val, classes = load_data(setup.run, setup.model)
    trainer = make_trainer(setup, to_float(next(iter(fixed_loader(val, 8, 8)))[0]))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(f"tokenizer {setup.preset}: {trained / 1e6:.2f} M parameters to train, "
          f"{setup.model.columns} columns per {setup.model.image_size}x{setup.model.image_size} "
          f"image, {len(train)} training and {len(val)} held-out images of {len(classes)} classes, "
          f"on {setup.device}")
    fit("tokenizer", setup, trainer, train, val, classes)
    cfg = setup.training
    distributed.barrier()  # the main process has written the last checkpoint
    stats = fixed_loader(train, distributed.local_batch(cfg.batch_size), cfg.stats_images,
                         setup.run.workers, shared=True)
    for path in filter(Path.exists, (setup.out / "best.pt", setup.out / "last.pt")):
        if not finetuning:  # stage 2 keeps those of stage 1, whose encoder it has
            store_statistics(path, stats, setup.device)
    print(f"done: {setup.out}/last.pt; pictures in {setup.out}/previews")


if __name__ == "__main__":
    run(main)
