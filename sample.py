"""Draw pictures with a trained generator: a labelled sheet, as PNG.

    python sample.py                                        # a square of every class
    python sample.py --classes sea,forest --columns 128     # panoramas, 8 times wider
    python sample.py --checkpoint runs/mine/last.pt --cfg 3 --seed 7 --out mine.png
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from equimini import load_generator
from equimini.cli import UserError, add_flags, output_folder, override, pick_device, run
from equimini.images import grid, save_png, to_uint8
from equimini.inference import PRECISIONS
from equimini.presets import Checked, flag
from equimini.sampler import SCHEDULES
from equimini.solvers import SOLVERS, evaluation_times, time_grid


@dataclass(frozen=True)
class SampleConfig(Checked):
    """What to draw, and how."""

    checkpoint: str = flag("runs/generator/last.pt", "checkpoint of a trained generator")
    tokenizer: str = flag("", "checkpoint of the generator's tokenizer with a fine-tuned decoder; "
                          "empty: the tokenizer inside the generator's checkpoint")
    classes: str = flag("all", "names or numbers of classes, with commas; all: every class once")
    count: int = flag(8, "pictures per class", min=1)
    columns: int = flag(0, "length of the pictures, in columns of f pixels; 0: square", min=0)
    width: int = flag(0, "length of the pictures, in pixels, a multiple of f; 0: square", min=0)
    cfg: float = flag(2.0, "guidance scale; 1: none", min=0)
    cfg_schedule: str = flag("linear", "guidance from 1 up to --cfg over the columns, or --cfg "
                             "throughout", choices=SCHEDULES)
    steps: int = flag(100, "steps of the solver per column", min=1)
    solver: str = flag("euler", "how a column follows the head's flow: euler asks the head once "
                       "a step, midpoint and heun (second order) twice", choices=tuple(SOLVERS))
    time_shift: float = flag(1.0, "above 1: smaller steps near the noise, below 1: near the "
                             "token; 1: equal steps", min=1e-3)
    precision: str = flag("float32", "arithmetic of the generator's matrix products; bf16 is "
                          "faster and deviates slightly", choices=tuple(PRECISIONS))
    cuda_graphs: str = flag("off", "on: replay recorded kernels, which is faster for few "
                            "pictures at a time; needs CUDA", choices=("off", "on"))
    seed: int = flag(0, "seed of a class's first picture; the next ones count up", min=0)
    weights: str = flag("ema", "moving average of the weights, or the raw ones",
                        choices=("ema", "raw"))
    batch_size: int = flag(64, "pictures drawn at a time", min=1)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")
    out: str = flag("samples.png", "the sheet to write")
    singles: str = flag("", "folder for every picture as a file of its own, too")


def length_in_columns(cfg: SampleConfig, f: int, square: int) -> int:
    """The pictures' length; raises UserError where --columns and --width do not make sense."""
    if cfg.columns and cfg.width:
        raise UserError("give --columns or --width, not both")
    if cfg.width % f:
        raise UserError(f"--width must be a multiple of f = {f} pixels, got {cfg.width}; nearest: "
                        f"{max(2, round(cfg.width / f)) * f}")
    columns = cfg.columns or cfg.width // f or square
    if columns < 2:
        raise UserError(f"a picture has at least 2 columns ({2 * f} pixels), got {columns}")
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_flags(parser, SampleConfig(), "options")
    cfg = override(SampleConfig(), parser.parse_args())
    out, device = Path(cfg.out), pick_device(cfg.device)
    output_folder(str(out.parent))
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {cfg.out}")
    if cfg.cuda_graphs == "on" and device.type != "cuda":
        raise UserError(f"--cuda-graphs on needs a CUDA device, got {device}")
    model = load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)
    shape = model.tokenizer.config
    columns = length_in_columns(cfg, shape.f, shape.columns)
    wanted = range(len(model.classes)) if cfg.classes == "all" else \
        model.class_numbers([name.strip() for name in cfg.classes.split(",")])
    jobs = [(c, cfg.seed + i) for c in wanted for i in range(cfg.count)]

    pictures = []
    for k in range(0, len(jobs), cfg.batch_size):
        labels, seeds = zip(*jobs[k:k + cfg.batch_size])
        label = f"pictures {k + 1}-{k + len(labels)} of {len(jobs)}, columns"
        tokens = model.sample_tokens(
            labels, columns, seeds, cfg=cfg.cfg, schedule=cfg.cfg_schedule, steps=cfg.steps,
            solver=cfg.solver, time_shift=cfg.time_shift, precision=cfg.precision,
            cuda_graphs=cfg.cuda_graphs == "on",
            progress=lambda drawn: tqdm(drawn, desc=label, total=columns))
        pictures.append(model.decode(tokens).cpu())
    images = torch.cat(pictures)

    across = max(1, 8 * shape.columns // columns)  # pictures side by side on the sheet
    rows, labels = [], []
    for c, of_class in zip(wanted, images.split(cfg.count)):
        for row in of_class.split(across):
            rows.append(row)
            labels.append(model.classes[c])
    save_png(grid(rows, labels), out)
    evaluations = len(evaluation_times(cfg.solver, time_grid(cfg.steps, cfg.time_shift)))
    print(f"{len(images)} pictures of {columns * shape.f}x{shape.image_size} pixels, "
          f"{evaluations} evaluations of the head per column: {out}")
    if cfg.singles:
        folder = output_folder(cfg.singles)
        for (c, seed), picture in zip(jobs, to_uint8(images)):
            save_png(picture, folder / f"class{c:04d}_seed{seed:06d}.png")
        print(f"single pictures: {folder}")


if __name__ == "__main__":
    run(main)
