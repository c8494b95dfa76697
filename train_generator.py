"""Train the column generator on the tokens of a trained tokenizer (equimini/generator.py).

    python train_generator.py                          # after train_tokenizer.py, same data
    python train_generator.py --data my/pictures --tokenizer runs/mine/last.pt --out runs/gen

Writes last.pt, best.pt (lowest validation loss), log.jsonl and previews/ into --out.
"""

from dataclasses import replace

import torch

from equimini.attention import implementation
from equimini.autoencoder import Tokenizer
from equimini.presets import PRESETS
from equimini.training.cache_latents import CachedLatents, read_meta
from equimini.training.data import count_images, load_data
from equimini.training.dry_run import dry_run
from equimini.training.generator_trainer import TOKENIZER, GeneratorRun, GeneratorTrainer
from equimini.training.loop import fit
from equimini.training.setup import PATIENCE, Setup, set_up
from equimini.utils import checkpoint, distributed
from equimini.utils.checkpoint import tokenizer_inside
from equimini.utils.command_line import run
from equimini.utils.errors import UserError


def find_tokenizer(setup: Setup) -> Tokenizer:
    """The tokenizer of --tokenizer, or the one inside the checkpoint that training goes on from."""
    source, asked = setup.resumed or setup.initial, setup.run.tokenizer
    if setup.resumed and asked == setup.resumed["config"]["run"]["tokenizer"]:
        asked = ""  # not a wish, but what the run began with
    if source and not asked:
        return tokenizer_inside(source, setup.run.init_from if setup.initial else
                                setup.out / "last.pt")
    tokenizer = checkpoint.load_tokenizer(asked or TOKENIZER)
    checkpoint.check_statistics(tokenizer, asked or TOKENIZER)
    return tokenizer


def count_training(opts: GeneratorRun) -> int:
    """How many pictures a run trains on."""
    return read_meta(opts.latents)["images"]["train"] if opts.latents else count_images(opts)


def rehearsal(setup: Setup) -> tuple[GeneratorTrainer, torch.Tensor]:
    """GeneratorTrainer and example for --dry-run; without --tokenizer, the preset's tokenizer, untrained."""
    if setup.run.tokenizer:
        tokenizer = find_tokenizer(setup)
    else:
        tokenizer = Tokenizer(PRESETS[setup.preset].tokenizer).eval().requires_grad_(False)
        tokenizer.set_statistics(0.0, 1.0)
    shape = tokenizer.config
    width = setup.run.width or shape.image_size
    example = (torch.randn(1, width // shape.f, shape.token_channels) if setup.run.latents else
               torch.randint(0, 256, (1, 3, shape.image_size, width), dtype=torch.uint8))
    classes = (read_meta(setup.run.latents)["classes"] if setup.run.latents else
               load_data(setup.run, shape)[2])
    return GeneratorTrainer(setup, tokenizer, classes), example


def main(argv: list[str] | None = None) -> None:
    setup = set_up("generator", __doc__.split("\n")[0], GeneratorRun(out="runs/generator"), argv,
                   count_training)
    with distributed.processes(setup.device, PATIENCE):
        train_generator(setup)


def train_generator(setup: Setup) -> None:
    """A whole training, from the first step or the resumed one."""
    if setup.dry_run:
        dry_run(setup, count_training(setup.run), lambda: rehearsal(setup))
        return
    tokenizer = find_tokenizer(setup)
    if setup.run.latents:
        if (setup.run.data, setup.run.val_data, setup.run.width) != ("synthetic", "", 0):
            raise UserError("--latents holds the data already; leave out --data, --val-data and "
                            "--width")
        train, val = (CachedLatents(setup.run.latents, split, tokenizer, setup.run.seed)
                      for split in ("train", "val"))
        classes = train.classes
        meta = {"split": "order", **read_meta(setup.run.latents)}  # for who asks the checkpoint
        setup.run = replace(setup.run, **{k: meta[k] for k in ("split", "val_fraction")
                                          if k in meta})
    else:
        train, val, classes = load_data(setup.run, tokenizer.config)
    columns = (setup.run.width or tokenizer.config.image_size) // tokenizer.config.f
    if setup.run.latents:
        columns = len(train[0, 0][0])
    if max(setup.training.subtasks, default=0) >= columns:
        raise UserError(f"--subtasks must be columns 0 to {columns - 1}, got "
                        f"{','.join(map(str, setup.training.subtasks))}")
    trainer = GeneratorTrainer(setup, tokenizer, classes)
    millions = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"generator {setup.preset}: {millions:.2f} M parameters, tokens of "
          f"{tokenizer.config.token_channels} channels, {len(train)} training and {len(val)} "
          f"held-out images of {len(classes)} classes, on {setup.device}, attention by "
          f"{implementation(setup.device)}")
    fit("generator", setup, trainer, train, val, classes)
    print(f"done: {setup.out}/last.pt; pictures in {setup.out}/previews")


if __name__ == "__main__":
    run(main)
