"""Make a trained generator small enough to ship: EMA weights and tokenizer in half precision.

    python -m equimini.convert.pack runs/generator/last.pt --out equimini/assets/scenes.pt

Writes scenes.pt and, beside it, scenes-tokenizer.pt.  They draw what the checkpoint draws, to the
rounding of float16 (about 3 digits), which the command measures; training can start from them
(--init-from), but not be resumed.  Of the run's settings only what belongs to the recipe is kept:
no path of the machine that trained it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from equimini import load_generator
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_content
from equimini.utils.command_line import output_folder, run
from equimini.utils.errors import UserError

LARGEST = 65504.0  # float16
RECIPE = ("seed", "precision", "width", "val_fraction", "split")  # of the run's settings


def half(weights: dict[str, Tensor], path: Any) -> dict[str, Tensor]:
    """The weights in float16; raises UserError for one that float16 does not hold."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all() or tensor.abs().max() > LARGEST:
            raise UserError(f"{path}: {name} holds values that float16 does not")
    return {name: tensor.half() for name, tensor in weights.items()}


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """A generator's configuration with the sizes and how it was trained, but not where."""
    run = {key: value for key, value in config.get("run", {}).items() if key in RECIPE}
    kept = {key: config[key] for key in ("preset", "model", "training") if key in config}
    return {**kept, "run": run}


def check_sizes(files: dict[Path, dict[str, Tensor]], each: float, together: float) -> None:
    """Raise UserError where weights exceed the limits, in MB; before anything is written."""
    sizes = {path: sum(2 * t.numel() for t in weights.values()) / 1e6
             for path, weights in files.items()}
    for path, size in sizes.items():
        if size > each:
            raise UserError(f"{path} would be {size:.1f} MB; the limit is {each:g} "
                            "(--file-mb)")
    if sum(sizes.values()) > together:
        raise UserError(f"the files would be {sum(sizes.values()):.1f} MB together; at most "
                        f"{together:g} are allowed (--total-mb)")


def pack(source: Path, out: Path, file_mb: float = 15, total_mb: float = 30,
         tokenizer: str = "") -> list[Path]:
    """Write the packed generator to `out` and its tokenizer beside it; returns both paths.

    tokenizer: checkpoint of one with a fine-tuned decoder, in place of the generator's own.
    """
    content = checkpoint.load(source, "generator")
    inside = tokenizer_content(load_generator(source, tokenizer_path=tokenizer).tokenizer)
    beside = out.with_name(f"{out.stem}-tokenizer{out.suffix}")
    weights = {out: half(content["ema"], source), beside: half(inside["weights"], source)}
    check_sizes(weights, file_mb, total_mb)
    kept = {key: content[key] for key in ("classes", "step", "columns", "mirrored")
            if key in content}
    checkpoint.save(beside, "tokenizer", {"config": {"preset": content["config"]["preset"],
                                                     "model": inside["config"]},
                                          "ema": weights[beside]})
    checkpoint.save(out, "generator", {**kept, "config": recipe(content["config"]),
                                       "ema": weights[out], "tokenizer": {"file": beside.name}})
    return [out, beside]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m equimini.convert.pack", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a trained generator")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .pt")
    parser.add_argument("--tokenizer", default="", metavar="TEXT", help="checkpoint of a tokenizer "
                        "with a fine-tuned decoder, to pack in place of the generator's own")
    parser.add_argument("--file-mb", type=float, default=15, metavar="X",
                        help="largest size of a file, in MB [15]")
    parser.add_argument("--total-mb", type=float, default=30, metavar="X",
                        help="largest size of both files together, in MB [30]")
    args = parser.parse_args()
    output_folder(str(args.out.parent))
    paths = pack(args.checkpoint, args.out, args.file_mb, args.total_mb, args.tokenizer)
    images = [load_generator(path, tokenizer_path=tokenizer).sample([0], steps=25)
              for path, tokenizer in ((args.checkpoint, args.tokenizer), (args.out, ""))]
    difference = (images[0] - images[1]).square().mean().sqrt().item()
    print(f"{', '.join(f'{p} {p.stat().st_size / 1e6:.1f} MB' for p in paths)}; one picture drawn "
          f"with both differs by {difference:.4f} (RMS, in [-1, 1])")


if __name__ == "__main__":
    run(main)
