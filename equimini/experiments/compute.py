"""Parameters, FLOPs and attention FLOPs of the paper's models (Tables 2, 3, 4, 7).  No training.

    python -m equimini.experiments compute
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from equimini.attention import window_attention
from equimini.config import Checked, flag
from equimini.experiments.report import Report
from equimini.generator import Generator, GeneratorConfig
from equimini.presets import PRESETS, measure
from equimini.utils.command_line import add_flags, output_folder, override
from equimini.utils.plot import curves

PARAMETERS = {"small": "151", "base": "294", "large": "644", "huge": "1200"}  # in millions
GFLOPS = {"small": 5.41, "base": 9.78, "large": 19.66, "huge": 34.91}
PAPER = ("parameters and GFLOPs of Tables 2 and 7; attention of the small model 4.2 M FLOPs full "
         "causal, 0.26 M real equivariant, 1.8 M windowed (Table 4); a grid of 256 tokens 130.46 "
         "GFLOPs against 9.79 for 16 (Table 3). How they were counted is not said.")


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """Where the report goes."""

    out: str = flag("runs/experiments", "folder to write to")


def attention_products(config: GeneratorConfig, n: int, window: int, crops: int = 1) -> int:
    """Multiply-adds of q·k and p·v in self-attention over all layers, counted by torch."""
    shape = (crops, n, config.heads, config.embed_dim // config.heads)
    with FlopCounterMode(display=False) as counter:
        qkv = (torch.empty(shape, device="meta") for _ in range(3))
        window_attention(*qkv, window)
    return config.layers * counter.get_total_flops() // 2


def gflops(config: GeneratorConfig, tokens: int, channels: int) -> float:
    """One forward pass over so many tokens, head once per token, conditional branch."""
    with torch.device("meta"):
        generator = Generator(config, 1000, channels).eval()
        x, label = torch.empty(1, tokens, channels), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            z = generator(x, generator.encode_classes(label))
            generator.head(x, torch.empty(1, tokens), z)
    return counter.get_total_flops() / 1e9


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m equimini.experiments compute",
                                     description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser, ComputeConfig(), "options")
    cfg = override(ComputeConfig(), parser.parse_args(argv))
    folder = output_folder(f"{cfg.out}/compute")
    rows = [("model", "parameters, M", "paper", "GFLOPs", "paper")]
    for name, printed in PARAMETERS.items():
        found = measure(PRESETS[name])
        rows.append((name, f"{found['generator']:.2f}", printed, f"{found['gflops']:.2f}",
                     f"{GFLOPS[name]:.2f}"))
    base = replace(PRESETS["base"].generator, window=256)
    few, many = gflops(base, 16, 256), gflops(base, 256, 16)
    rows += [("base, full causal, 16 tokens of 256", "", "", f"{few:.2f}", "9.79"),
             ("base, full causal, 256 tokens of 16", "", "", f"{many:.2f}", "130.46")]

    small = PRESETS["small"].generator
    causal, windowed, crops = (attention_products(small, 16, 16), attention_products(small, 16, 4),
                               attention_products(small, 4, 4, crops=4))
    square = 2 * 16 * 16 * small.embed_dim * small.layers
    for name, count, printed in (("all 16×16 pairs", square, "4.2 (full causal)"),
                                 ("causal pairs", causal, ""), ("windowed, W = 4", windowed, "1.8"),
                                 ("real equivariant, 4 crops of 4", crops, ""),
                                 ("all 4×4 pairs of one crop", square // 16, "0.26 (real equ.)")):
        rows.append((f"attention of small, {name}", "", "", f"{count / 1e6:.2f} M multiply-adds",
                     printed))
    reading = (f"Windowed attention takes {100 * (1 - windowed / causal):.1f} % less than causal "
               f"attention over 16 columns (the paper: 42.9 %), and 16 tokens in place of 256 take "
               f"{many / few:.1f} times less in all (the paper: {130.46 / 9.79:.1f}).")
    lengths = [4, 16, 32, 64, 128, 256]
    per_column = {w: [(n, attention_products(small, n, min(w, n)) / n / 1e6) for n in lengths]
                  for w in (4, 256)}
    curves(folder / "attention.png", {"full causal": per_column[256], "windowed": per_column[4]},
           "columns of the picture", "multiply-adds per column, M",
           "Attention of the small model per column")
    Report("compute", "Parameters and compute (Tables 2, 3, 4, 7)", PAPER, rows, reading, [
        "GFLOPs: one forward pass over the tokens and the 16 class tokens, head once per token, "
        "conditional branch, 2 FLOPs per multiply-add, counted by torch's FlopCounterMode."],
        {"attention": {"all pairs": square, "causal": causal, "windowed": windowed,
                       "crops": crops}, "gflops": {"16": few, "256": many}}).write(
                           cfg, None, folder)
