"""Make a trained generator small enough to ship: EMA weights and tokenizer in half precision.

    python -m equimini.convert.pack runs/generator/last.pt --out equimini/assets/scenes.pt

Writes scenes.pt and, beside it, scenes-tokenizer.pt.  They draw what the checkpoint draws, to the
rounding of float16 (about 3 digits), which the command measures; training can start from them
(--init-from), but not be resumed.  Of the run's settings only what belongs to the recipe is kept:
no path of the machine that trained it.

    python -m equimini.convert.pack runs/mean-flow/last.pt --base equimini/assets/scenes.pt \\
        --out equimini/assets/scenes-mean-flow.pt

writes only the weights that the packed generator of --base, which must stay beside it, does not
have: those of a head, say, that was trained alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equimini import load_generator
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_content, tokenizer_inside, weights_hash
from equimini.utils.command_line import command, output_folder, run
from equimini.utils.errors import UserError

LARGEST = 65504.0  # float16
RECIPE = ("seed", "precision", "width", "val_fraction", "split")  # of the run's settings


def half(weights: dict[str, Tensor], path: Any) -> dict[str, Tensor]:
    """The weights in float16; raises UserError for one that float16 does not hold."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all() or tensor.abs().max() > LARGEST:
            raise UserError(f"{path}: {name} holds values that float16 does not")
    return {name: tensor.half() for name, tensor in weights.items()}


def kept(content: dict[str, Any]) -> dict[str, Any]:
    """What a packed generator keeps of a checkpoint beside its weights."""
    names = ("classes", "step", "columns", "mirrored")
    return {**{key: content[key] for key in names if key in content},
            "config": recipe(content["config"])}


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """A generator's configuration with the sizes and how it was trained, but not where."""
    run = {key: value for key, value in config.get("run", {}).items() if key in RECIPE}
    kept = {key: config[key] for key in ("preset", "model", "training") if key in config}
    return {**kept, "run": run}


def check_sizes(files: dict[Path, dict[str, Tensor]], each: float, together: float) -> None:
    """Raise UserError where weights exceed the limits, in MB; before anything is written."""
    total = 0.0
    for path, weights in files.items():
        size = sum(2 * t.numel() for t in weights.values()) / 1e6
        total += size
        if size > each:
            raise UserError(f"{path} would be {size:.1f} MB; the limit is {each:g} (--file-mb)")
    if total > together:
        raise UserError(f"the files would be {total:.1f} MB together; at most {together:g} are "
                        "allowed (--total-mb)")


def pack(source: Path, out: Path, file_mb: float = 15, total_mb: float = 30,
         tokenizer: str = "", base: str = "") -> list[Path]:
    """Write the packed generator to `out` and its tokenizer beside it; returns both paths.

    tokenizer: checkpoint of one with a fine-tuned decoder, in place of the generator's own.
    base: a packed generator in the folder of `out`: only weights that it has not are written.
    """
    content = checkpoint.load(source, "generator")
    if base:
        if tokenizer:
            raise UserError("--base has a tokenizer already; leave out --tokenizer")
        return [pack_onto(Path(base), content, source, out, file_mb)]
    inside = tokenizer_content(load_generator(source, tokenizer_path=tokenizer).tokenizer)
    beside = out.with_name(f"{out.stem}-tokenizer{out.suffix}")
    weights = {out: half(content["ema"], source), beside: half(inside["weights"], source)}
    check_sizes(weights, file_mb, total_mb)
    checkpoint.save(beside, "tokenizer", {"config": {"preset": content["config"]["preset"],
                                                     "model": inside["config"]},
                                          "ema": weights[beside]})
    checkpoint.save(out, "generator", {**kept(content), "ema": weights[out],
                                       "tokenizer": {"file": beside.name}})
    return [out, beside]


def pack_onto(base: Path, content: dict[str, Any], source: Path, out: Path,
              file_mb: float) -> Path:
    """Write the weights of `source` that the packed generator `base` has not; returns `out`."""
    below = checkpoint.load(base, "generator")
    if base.resolve().parent != out.resolve().parent or base.name == out.name or "base" in below:
        raise UserError(f"--base {base} and --out {out} must be two files of one folder, and "
                        "--base a whole one")
    theirs, mine = (half(tokenizer_inside(c, path).state_dict(), path)
                    for c, path in ((below, base), (content, source)))
    if below["classes"] != content["classes"] or not all(
            torch.equal(mine[name], tensor) for name, tensor in theirs.items()):
        raise UserError(f"{source} was not trained from {base}: it has other classes or another "
                        "tokenizer")
    new = {name: tensor for name, tensor in half(content["ema"], source).items()
           if name not in below["ema"] or not torch.equal(tensor, below["ema"][name])}
    check_sizes({out: new}, file_mb, file_mb)
    checkpoint.save(out, "generator", {
        **kept(content), "ema": new, "tokenizer": below["tokenizer"],
        "base": {"file": base.name, "weights": weights_hash(below["ema"])}})
    return out


def main() -> None:
    parser = command("equimini.convert.pack", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint of a trained generator")
    add("--out", type=Path, required=True, help="file to write, .pt")
    add("--tokenizer", default="", metavar="TEXT", help="checkpoint of a tokenizer with a "
        "fine-tuned decoder, to pack in place of the generator's own")
    add("--base", default="", metavar="TEXT",
        help="packed generator beside --out; weights that it has are left out")
    add("--file-mb", type=float, default=15, metavar="X", help="largest size of a file, in MB [15]")
    add("--total-mb", type=float, default=30, metavar="X",
        help="largest size of both files together, in MB [30]")
    args = parser.parse_args()
    output_folder(args.out.parent)
    paths = pack(args.checkpoint, args.out, args.file_mb, args.total_mb, args.tokenizer,
                 args.base)
    images = [load_generator(path, tokenizer_path=tokenizer).sample([0], steps=25)
              for path, tokenizer in ((args.checkpoint, args.tokenizer), (args.out, ""))]
    difference = (images[0] - images[1]).square().mean().sqrt().item()
    print(f"{', '.join(f'{p} {p.stat().st_size / 1e6:.1f} MB' for p in paths)}; one picture drawn "
          f"with both differs by {difference:.4f} (RMS, in [-1, 1])")


if __name__ == "__main__":
    run(main)
