"""Training steps of the tokenizer with each precision, memory layout, and compiled or not.

    python -m equimini.bench tokenizer --preset tiny --batch-size 16

A step is encoder, decoder, L1 (and the perceptual distance of --perceptual-net), backward, Adam,
on random pictures.  The gradient's difference is from that of float32, contiguous, not compiled,
at the same weights: ‖g − g₀‖ / ‖g₀‖.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from equimini.autoencoder import Tokenizer
from equimini.bench.timing import median_seconds
from equimini.config import Checked, flag
from equimini.losses import reconstruction_loss
from equimini.presets import PRESETS
from equimini.pretrained.torchscript import FeatureDistance
from equimini.utils.command_line import parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.machine import machine


@dataclass(frozen=True)
class TokenizerBench(Checked):
    preset: str = flag("tiny", "tokenizer to train", choices=tuple(PRESETS))
    batch_size: int = flag(16, "images per step", min=1)
    perceptual_net: str = flag("", "TorchScript network, as for train_tokenizer.py")
    compile: bool = flag(True, "also measure compiled steps")
    seconds: float = flag(10.0, "time to repeat each kind of step for, at least 5 times", min=0)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


class Steps:
    """Training steps of one tokenizer, as the options say."""

    def __init__(self, cfg: TokenizerBench, device: torch.device, bf16: bool, channels_last: bool,
                 compiled: bool) -> None:
        torch.manual_seed(0)
        shape = PRESETS[cfg.preset].tokenizer
        self.bf16, self.device = bf16, device
        self.model = Tokenizer(shape).to(device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        size = cfg.batch_size, 3, shape.image_size, shape.image_size
        self.images = torch.rand(size, device=device) * 2 - 1
        net = cfg.perceptual_net
        self.distance = FeatureDistance(net).to(device) if net else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        wrap = torch.compile if compiled else lambda function: function
        self.encode, self.decode = wrap(self.model.encode), wrap(self.model.decode)

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            x_hat = self.decode(self.encode(self.images).float())
            distance = self.distance(self.images, x_hat) if self.distance else 0.0
        reconstruction_loss(self.images, x_hat, distance).backward()

    def gradient(self) -> Tensor:
        self.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


def main(argv: list[str] | None = None) -> None:
    cfg = parse("equimini.bench tokenizer", __doc__, TokenizerBench(), argv)
    device = pick_device(cfg.device)
    if device.type == "mps":
        raise UserError("--device: this benchmark has a clock for cpu and cuda")
    print(f"{machine(device.type)}; preset {cfg.preset}, batch {cfg.batch_size}"
          + (", with perceptual distance" if cfg.perceptual_net else ""))
    print("precision  layout         compiled  images/s  ratio  gradient's difference")
    plain: tuple[float, Tensor] | None = None
    for compiled, channels_last, bf16 in itertools.product(
            (False, True) if cfg.compile else (False,), (False, True), (False, True)):
        steps = Steps(cfg, device, bf16, channels_last, compiled)
        gradient = steps.gradient()
        rate = cfg.batch_size / median_seconds(steps.step, device.type, cfg.seconds)
        plain = plain or (rate, gradient)
        change = ((gradient - plain[1]).norm() / plain[1].norm()).item()
        print(f"{'bf16' if bf16 else 'float32':9}  "
              f"{'channels_last' if channels_last else 'contiguous':13}  "
              f"{'yes' if compiled else 'no':8}  {rate:8.2f}  {rate / plain[0]:5.2f}  {change:.2g}",
              flush=True)
