"""Train the column generator on the tokens of a trained tokenizer (equimini/generator.py).

    python train_generator.py                          # after train_tokenizer.py, same data
    python train_generator.py --data my/pictures --tokenizer runs/mine/last.pt --out runs/gen

Writes last.pt, best.pt (lowest validation loss), log.jsonl and previews/ into --out.  One step is
that of equimini/training/generator_trainer.py.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equimini.attention import implementation
from equimini.autoencoder import Tokenizer
from equimini.generator import Generator, make_generator
from equimini.noise import seed_torch
from equimini.presets import PRESETS, parameters
from equimini.sampling.image_generator import ImageGenerator, load_guide
from equimini.training.cache_latents import CachedLatents, read_meta
from equimini.training.data import count_images, load_data
from equimini.training.dry_run import dry_run
from equimini.training.generator_trainer import TOKENIZER, GeneratorRun, GeneratorTrainer
from equimini.training.loop import fit
from equimini.training.mean_flow_trainer import MeanFlowTrainer
from equimini.training.setup import PATIENCE, Setup, set_up
from equimini.utils import checkpoint, distributed
from equimini.utils.checkpoint import tokenizer_inside
from equimini.utils.command_line import run
from equimini.utils.errors import UserError


def find_tokenizer(setup: Setup) -> Tokenizer:
    """The tokenizer of --tokenizer, or the one in the checkpoint that training continues from."""
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


def make_trainer(setup: Setup, tokenizer: Tokenizer, classes: list[str]) -> GeneratorTrainer:
    """The generator and what trains it."""
    opts, tokenizer = setup.run, tokenizer.to(setup.device)
    seed_torch(opts.seed, 0)  # initial weights
    sizes = len(classes), tokenizer.config.token_channels
    model = make_generator(setup.model, *sizes).to(setup.device)

    def sample(generator: Generator, names: list[str]) -> Tensor:  # for the previews
        return ImageGenerator(generator, tokenizer, classes).sample(
            names, seed=opts.seed, cfg=opts.preview_cfg,
            steps=opts.preview_steps if setup.model.objective == "flow-matching" else 1)

    parts = model, tokenizer, classes, setup.training, opts, sample
    if setup.model.objective == "flow-matching":
        if opts.guide:
            raise UserError("--guide is for --objective mean-flow; sample.py has its own")
        return GeneratorTrainer(*parts)
    teacher = make_generator(replace(setup.model, objective="flow-matching"), *sizes)
    guide = (load_guide(opts.guide, tokenizer, setup.device).generator if opts.guide else None)
    return MeanFlowTrainer(teacher.to(setup.device), guide, *parts)


def read_data(setup: Setup, tokenizer: Tokenizer) -> tuple[Dataset, Dataset, list[str]]:
    """Training set, validation set and class names: pictures, or what --latents holds of them."""
    opts, shape = setup.run, tokenizer.config
    if not opts.latents:
        columns = shape.tokens(opts.width or shape.image_size)
        train, val, classes = load_data(opts, shape)
    elif (opts.data, opts.val_data, opts.width) != ("synthetic", "", 0):
        raise UserError("--latents holds the data already; leave out --data, --val-data and "
                        "--width")
    else:
        train, val = (CachedLatents(opts.latents, split, tokenizer, opts.seed)
                      for split in ("train", "val"))
        columns, classes = len(train[0, 0][0]), train.classes
        meta = {"split": "order", **read_meta(opts.latents)}  # for who asks the checkpoint
        setup.run = replace(opts, **{k: meta[k] for k in ("split", "val_fraction") if k in meta})
    if max(setup.training.subtasks, default=0) >= columns:
        raise UserError(f"--subtasks must be columns 0 to {columns - 1}, got "
                        f"{','.join(map(str, setup.training.subtasks))}")
    return train, val, classes


def main(argv: list[str] | None = None) -> None:
    setup = set_up("generator", __doc__.split("\n")[0], GeneratorRun(out="runs/generator"), argv,
                   count_training)
    with distributed.processes(setup.device, PATIENCE), setup.folder():
        if setup.dry_run:
            dry_run(setup, count_training(setup.run), lambda: rehearsal(setup))
        else:
            train_generator(setup)


def rehearsal(setup: Setup) -> tuple[GeneratorTrainer, Tensor]:
    """For --dry-run: a trainer and an example; without a tokenizer, the preset's, untrained."""
    opts = setup.run
    if opts.tokenizer or setup.initial or setup.resumed:
        tokenizer = find_tokenizer(setup)
    else:
        tokenizer = Tokenizer(PRESETS[setup.preset].tokenizer).eval().requires_grad_(False)
        tokenizer.set_statistics(0.0, 1.0)
    shape = tokenizer.config
    width = opts.width or shape.image_size
    example = (torch.randn(1, shape.tokens(width), shape.token_channels) if opts.latents else
               torch.randint(0, 256, (1, 3, shape.image_size, width), dtype=torch.uint8))
    classes = (read_meta(opts.latents)["classes"] if opts.latents else load_data(opts, shape)[2])
    return make_trainer(setup, tokenizer, classes), example


def train_generator(setup: Setup) -> None:
    """A whole training, from the first step or the resumed one."""
    if setup.model.objective == "mean-flow" and not (setup.initial or setup.resumed):
        raise UserError("--objective mean-flow learns from the flow of a trained generator; give "
                        "its checkpoint with --init-from")
    tokenizer = find_tokenizer(setup)
    train, val, classes = read_data(setup, tokenizer)
    trainer = make_trainer(setup, tokenizer, classes)
    trainer.mirrored = train.mirrors > 1
    print(f"generator {setup.preset}: {parameters(trainer.model) / 1e6:.2f} M parameters, tokens of "
          f"{tokenizer.config.token_channels} channels, {len(train)} training and {len(val)} "
          f"held-out images of {len(classes)} classes, on {setup.device}, attention by "
          f"{implementation(setup.device)}")
    fit("generator", setup, trainer, train, val, classes)
    print(f"done: {setup.out}/last.pt; pictures in {setup.out}/previews")


if __name__ == "__main__":
    run(main)
