"""Make a trained generator small enough to ship: EMA weights and tokenizer in half precision.

    python -m equimini.pack runs/generator/last.pt --out equimini/assets/scenes.pt

Writes scenes.pt and, beside it, scenes-tokenizer.pt.  They draw what the checkpoint draws, to the
rounding of float16 (about 3 digits), which the command measures; training can start from them
(--init-from), but not be resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equimini import checkpoint, load_generator
from equimini.cli import UserError, output_folder, run
from equimini.pipeline import tokenizer_content, tokenizer_inside

LARGEST = 65504.0  # float16


def half(weights: dict[str, Tensor], path: Any) -> dict[str, Tensor]:
    """The weights in float16; raises UserError for one that float16 does not hold."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all() or tensor.abs().max() > LARGEST:
            raise UserError(f"{path}: {name} holds values that float16 does not")
    return {name: tensor.half() for name, tensor in weights.items()}


def pack(source: Path, out: Path) -> list[Path]:
    """Write the packed generator to `out` and its tokenizer beside it; returns both paths."""
    content = checkpoint.load(source, "generator")
    inside = tokenizer_content(tokenizer_inside(content, source))
    beside = out.with_name(f"{out.stem}-tokenizer{out.suffix}")
    kept = {key: content[key] for key in ("config", "classes", "step", "columns")
            if key in content}
    checkpoint.save(beside, "tokenizer", {"config": {"preset": content["config"]["preset"],
                                                     "model": inside["config"]},
                                          "ema": half(inside["weights"], source)})
    checkpoint.save(out, "generator", {**kept, "ema": half(content["ema"], source),
                                       "tokenizer": {"file": beside.name}})
    return [out, beside]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m equimini.pack", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a trained generator")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .pt")
    args = parser.parse_args()
    output_folder(str(args.out.parent))
    paths = pack(args.checkpoint, args.out)
    images = [load_generator(path).sample([0], steps=25) for path in (args.checkpoint, args.out)]
    difference = (images[0] - images[1]).square().mean().sqrt().item()
    print(f"{', '.join(f'{p} {p.stat().st_size / 1e6:.1f} MB' for p in paths)}; one picture drawn "
          f"with both differs by {difference:.4f} (RMS, in [-1, 1])")


if __name__ == "__main__":
    run(main)
