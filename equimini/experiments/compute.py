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
from equimini.generator import GeneratorConfig
from equimini.presets import PRESETS, cost
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


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments compute", __doc__, ComputeConfig(), argv)
    folder = output_folder(f"{cfg.out}/compute")
    rows = [("model", "parameters, M", "paper", "GFLOPs", "by the paper's rule", "paper")]
    costs = {name: cost(PRESETS[name].generator) for name in PRINTED}
    for name, (millions, gflops) in PRINTED.items():
        found = [f"{costs[name][key]:.2f}" for key in ("generator", "GFLOPs", "GMACs")]
        rows.append((name, found[0], millions, *found[1:], gflops))
    off = max(abs(costs[name]["GMACs"] / float(printed[1]) - 1)
              for name, printed in PRINTED.items())
    base = replace(PRESETS["base"].generator, window=256)
    full = {n: cost(base, n, 4096 // n) for n in (16, 256)}  # as many values in all
    for n, gflops in ((16, "9.79"), (256, "130.46")):
        rows.append((f"base, full causal, {n} tokens of {4096 // n}", "", "",
                     f"{full[n]['GFLOPs']:.2f}", f"{full[n]['GMACs']:.2f}", gflops))
    few, many = (full[n]["GFLOPs"] for n in (16, 256))

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
               f"{many / few:.1f} times less in all (the paper: {130.46 / 9.79:.1f}).")
    lengths = [4, 16, 32, 64, 128, 256]
    per_column = {w: [(n, attention_products(small, n, min(w, n)) / n / 1e6) for n in lengths]
                  for w in (4, 256)}
    left_out = curves(
        folder / "attention.png", {"full causal": per_column[256], "windowed": per_column[4]},
        "columns of the picture", "multiply-adds per column, M",
        "Attention of the small model per column")
    products = {"all pairs": square, "causal": causal, "windowed": windowed, "crops": crops}
    Report("Parameters and compute (Tables 2, 3, 4, 7)", PAPER, rows, reading, [*RULES, left_out],
           {"attention": products, "gflops": {"16": few, "256": many}}).save(
               "compute", cfg, folder)
