"""A few training steps as one of several processes, for tests/training/test_distributed.py.

    torchrun --nproc-per-node=2 tests/helpers/processes.py OUT

For both scripts, in one piece and in two, the main process saves OUT/SCRIPT-PIECES.pt: what each
step logged, and the gradients as the optimizers got them.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.discriminator import PatchGAN
from equimini.generator import Generator, GeneratorConfig
from equimini.noise import rng
from equimini.presets import GeneratorTraining, TokenizerTraining
from equimini.training.data import Batches
from equimini.training.generator_trainer import GeneratorRun, GeneratorTrainer
from equimini.training.mean_flow_trainer import MeanFlowTrainer
from equimini.training.tokenizer_trainer import Adversary, TokenizerRun, TokenizerTrainer
from equimini.utils import distributed
from equimini.utils.command_line import run

STEPS, BATCH = 3, 8
TOKENIZER = TokenizerConfig(image_size=32, base_channels=8, multipliers=(1, 2, 4), blocks=1,
                            norm_groups=4, attention_rows=(8,), z_channels=8, token_channels=8,
                            noise=0.5)


def make_generator(accumulate, objective="flow-matching"):
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOKENIZER).eval()
    tokenizer.set_statistics(0.0, 1.0)
    models = [Generator(GeneratorConfig(layers=2, embed_dim=32, heads=2, head_width=32,
                                        head_depth=2, dropout=0.0, objective=name),
                        3, TOKENIZER.token_channels)
              for name in dict.fromkeys(("flow-matching", objective))]
    for p in (p for model in models for p in model.parameters()):
        nn.init.normal_(p, std=0.1)  # also the layers that begin at zero
    parts = models.pop(), tokenizer, ["a", "b", "c"], GeneratorTraining(
        steps=STEPS, batch_size=BATCH, lr=1e-3, warmup_steps=0, shift_group=3), GeneratorRun(
        accumulate=accumulate)
    return MeanFlowTrainer(*models, None, *parts) if models else GeneratorTrainer(*parts)


def make_tokenizer(accumulate):
    cfg = TokenizerTraining(steps=STEPS, batch_size=BATCH, lr=1e-3, warmup_steps=0, adv_start=1)
    torch.manual_seed(0)
    critic = PatchGAN(8, 2)
    for name, layer in critic.named_children():  # its batches are what differs
        if isinstance(layer, nn.BatchNorm2d):
            setattr(critic, name, nn.Identity())
    return TokenizerTrainer(Tokenizer(TOKENIZER), None, None, Adversary(critic, cfg, 0), cfg,
                            TokenizerRun(accumulate=accumulate), torch.zeros(2, 3, 32, 32))


def steps(trainer, steppers):
    """The steps' logs, and their gradients, clipped, of all that the optimizers have."""
    images = torch.from_numpy(rng("images").integers(0, 256, (24, 3, 32, 32), "uint8"))
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
            mean_flow = make_generator(accumulate, "mean-flow")
            found = {"generator": steps(generator, [generator.stepper]), "tokenizer": steps(
                tokenizer, [tokenizer.stepper, tokenizer.adversary.stepper]),
                "mean-flow": steps(mean_flow, [mean_flow.stepper])}
            for kind, content in found.items() if distributed.is_main() else ():
                torch.save(content, out / f"{kind}-{accumulate}.pt")


if __name__ == "__main__":
    run(main)
