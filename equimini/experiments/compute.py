"""Parameters, FLOPs and attention FLOPs of the paper's models (Tables 2, 3, 4, 7).  No training.

    python -m equimini.experiments compute
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from equimini.attention import window_attention
from equimini.config import Checked, flag
from equimini.experiments.report import Report
from equimini.generator import Generator, GeneratorConfig
from equimini.presets import PRESETS, parameters
from equimini.utils.command_line import output_folder, parse
from equimini.utils.plot import curves

PRINTED = {"small": ("151", "5.41"), "base": ("294", "9.78"), "large": ("644", "19.66"),
           "huge": ("1200", "34.91")}  # parameters in millions, GFLOPs
PAPER = ("parameters and GFLOPs of Tables 2 and 7; attention of the small model 4.2 M FLOPs full "
         "causal, 0.26 M real equivariant, 1.8 M windowed (Table 4); a grid of 256 tokens 130.46 "
         "GFLOPs against 9.79 for 16 (Table 3).")
RULES = [
    "GFLOPs: one forward pass over the tokens and the 16 class tokens, the head once per token, "
    "conditional branch, 2 FLOPs per multiply-add, counted by torch's FlopCounterMode.",
    "By the paper's rule: the multiply-adds of one training forward, the transformer once and the "
    "head 4 times (the batch multiplier). The paper does not say so, but this gives its figures; "
    "what it prints for 256 tokens does not follow from it.",
    "The paper's attention figures: 4.2 M is all 16×16 pairs, 0.26 M all 4×4 pairs of one crop, "
    "1.8 M the windowed share of causal pairs, 58 of 136, of 4.2 M."]


@dataclass(frozen=True)
class ComputeConfig(Checked):
    out: str = flag("runs/experiments", "folder to write to")


def attention_products(config: GeneratorConfig, n: int, window: int, crops: int = 1) -> int:
    """Multiply-adds of q·k and p·v in self-attention over all layers, counted by torch."""
    shape = (crops, n, config.heads, config.embed_dim // config.heads)
    with FlopCounterMode(display=False) as counter:
        qkv = (torch.empty(shape, device="meta") for _ in range(3))
        window_attention(*qkv, window)
    return config.layers * counter.get_total_flops() // 2


def cost(config: GeneratorConfig, tokens: int = 16, channels: int = 256
         ) -> tuple[float, float, float]:
    """Millions of parameters, GFLOPs of one forward pass, and billions by the paper's rule."""
    with torch.device("meta"):
        generator = Generator(config, 1000, channels).eval()
        x, label = torch.empty(1, tokens, channels), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as body, torch.no_grad():
            z = generator(x, generator.encode_classes(label))
        with FlopCounterMode(display=False) as head, torch.no_grad():
            generator.head(x, torch.empty(1, tokens), z)
    once, four_times = (body.get_total_flops() + k * head.get_total_flops() for k in (1, 4))
    return parameters(generator) / 1e6, once / 1e9, four_times / 2e9


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments compute", __doc__, ComputeConfig(), argv)
    folder = output_folder(f"{cfg.out}/compute")
    rows = [("model", "parameters, M", "paper", "GFLOPs", "by the paper's rule", "paper")]
    costs = {name: cost(PRESETS[name].generator) for name in PRINTED}
    for name, (millions, gflops) in PRINTED.items():
        rows.append((name, f"{costs[name][0]:.2f}", millions,
                     *(f"{value:.2f}" for value in costs[name][1:]), gflops))
    off = max(abs(costs[name][2] / float(gflops) - 1) for name, (_, gflops) in PRINTED.items())
    base = replace(PRESETS["base"].generator, window=256)
    few, many = cost(base, 16, 256), cost(base, 256, 16)
    for name, found, gflops in (("16 tokens of 256", few, "9.79"),
                                ("256 tokens of 16", many, "130.46")):
        rows.append((f"base, full causal, {name}", "", "",
                     *(f"{value:.2f}" for value in found[1:]), gflops))

    small = PRESETS["small"].generator
    causal, windowed, crops = (attention_products(small, 16, 16), attention_products(small, 16, 4),
                               attention_products(small, 4, 4, crops=4))
    square = 2 * 16 * 16 * small.embed_dim * small.layers
    for name, count, theirs, printed in (
            ("all 16×16 pairs", square, square, "4.2 (full causal)"),
            ("causal pairs", causal, 0, ""),
            ("windowed, W = 4", windowed, square * windowed / causal, "1.8"),
            ("real equivariant, 4 crops of 4", crops, 0, ""),
            ("all 4×4 pairs of one crop", square // 16, square // 16, "0.26 (real equ.)")):
        rows.append((f"attention of small, {name}", "", "", f"{count / 1e6:.2f} M multiply-adds",
                     f"{theirs / 1e6:.2f} M" if theirs else "", printed))
    reading = (f"Counted by the paper's rule, the four models differ from its figures by at most "
               f"{100 * off:.2f} %. Windowed attention takes "
               f"{100 * windowed / causal:.1f} % of causal attention over "
               f"16 columns (the paper's 42.9 % is 1.8 of 4.2), and 16 tokens in place of 256 take "
               f"{many[1] / few[1]:.1f} times less in all (the paper: {130.46 / 9.79:.1f}).")
    lengths = [4, 16, 32, 64, 128, 256]
    per_column = {w: [(n, attention_products(small, n, min(w, n)) / n / 1e6) for n in lengths]
                  for w in (4, 256)}
    left_out = curves(
        folder / "attention.png", {"full causal": per_column[256], "windowed": per_column[4]},
        "columns of the picture", "multiply-adds per column, M",
        "Attention of the small model per column")
    products = {"all pairs": square, "causal": causal, "windowed": windowed, "crops": crops}
    Report("Parameters and compute (Tables 2, 3, 4, 7)", PAPER, rows, reading, [*RULES, left_out],
           {"attention": products, "gflops": {"16": few[1], "256": many[1]}}).save(
               "compute", cfg, folder)
