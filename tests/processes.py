"""A few training steps as one of several processes, for tests/test_distributed.py.

    torchrun --nproc-per-node=2 tests/processes.py OUT

For both scripts, in one piece and in two, the main process saves OUT/SCRIPT-PIECES.pt: what each
step logged, and the gradients as the optimizers got them.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from equimini import distributed, keyed
from equimini.autoencoder import Tokenizer
from equimini.cli import run
from equimini.data import Batches, to_float
from equimini.discriminator import PatchGAN
from equimini.experiments.common import script
from equimini.presets import (GeneratorConfig, GeneratorTraining, TokenizerConfig,
                              TokenizerTraining)
from equimini.training import Setup

STEPS, BATCH = 3, 8
TOKENIZER = TokenizerConfig(image_size=32, base_channels=8, multipliers=(1, 2, 4), blocks=1,
                            norm_groups=4, attention_rows=(8,), z_channels=8, token_channels=8,
                            noise=0.5)


def make_generator(accumulate):
    torch.manual_seed(0)
    module, tokenizer = script("train_generator"), Tokenizer(TOKENIZER).eval()
    tokenizer.set_statistics(0.0, 1.0)
    setup = Setup("tiny", GeneratorConfig(layers=2, embed_dim=32, heads=2, head_width=32,
                                          head_depth=2, dropout=0.0),
                  GeneratorTraining(steps=STEPS, batch_size=BATCH, lr=1e-3, warmup_steps=0),
                  module.GeneratorRun(accumulate=accumulate), torch.device("cpu"), Path(), None)
    trainer = module.Trainer(setup, tokenizer, ["a", "b", "c"])
    torch.manual_seed(0)
    for p in trainer.model.parameters():  # also the layers that begin at zero
        nn.init.normal_(p, std=0.1)
    return trainer


def make_tokenizer(accumulate):
    module = script("train_tokenizer")
    setup = Setup("tiny", TOKENIZER, TokenizerTraining(
        steps=STEPS, batch_size=BATCH, lr=1e-3, warmup_steps=0, discriminator="patchgan",
        disc_channels=8, disc_layers=2, adv_start=1), module.TokenizerRun(accumulate=accumulate),
        torch.device("cpu"), Path(), None)
    trainer = module.Trainer(setup, torch.zeros(2, 3, 32, 32))
    for name, layer in trainer.adversary.critic.named_children():  # its batches are what differs
        if isinstance(layer, nn.BatchNorm2d):
            setattr(trainer.adversary.critic, name, nn.Identity())
    return trainer


def steps(trainer, steppers):
    """The steps' logs, and their gradients, clipped, of all that the optimizers have."""
    images = torch.from_numpy(keyed.rng("images").integers(0, 256, (24, 3, 32, 32), "uint8"))
    gradients, logged = [], []
    for stepper in steppers:
        stepper.optimizer.register_step_pre_hook(lambda optimizer, *_: gradients.append(torch.cat(
            [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]
             if p.grad is not None])))
    for step, keys in enumerate(Batches(len(images), BATCH, 0, 0, STEPS)):
        index = torch.tensor([i for _, i in keys])
        logged.append(trainer.step(step, images[index], index % 3))
    return {"logged": logged, "gradients": gradients}


def main():
    out = Path(sys.argv[1])
    with distributed.processes(torch.device("cpu")):
        for accumulate in (1, 2):
            generator, tokenizer = make_generator(accumulate), make_tokenizer(accumulate)
            found = {"generator": steps(generator, [generator.stepper]), "tokenizer": steps(
                tokenizer, [tokenizer.stepper, tokenizer.adversary.stepper])}
            for kind, content in found.items() if distributed.is_main() else ():
                torch.save(content, out / f"{kind}-{accumulate}.pt")


if __name__ == "__main__":
    run(main)
