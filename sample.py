"""Draw pictures with a trained generator: a labelled sheet, a scroll, or changes to a picture.

Without --checkpoint it is the model in the box (equimini/assets), without any argument a first
look at it: samples.png and panorama.png.

    python sample.py                                        # squares and panoramas
    python sample.py --classes sea,forest --columns 128     # panoramas, 8 times wider
    python sample.py --classes forest:48,sea:48 --count 4   # that turn from forest into sea
    python sample.py --classes forest:200,sea:200 --scroll 10000 --out walk  # walk/index.html
    python sample.py --edit photo.jpg --resample 5,6 --classes sea --out edited.png
    python sample.py --edit photo.jpg --resample 5,6 --fit 16 --classes sea   # fit on both sides
    python sample.py --continue-from photo.jpg --columns 64 --classes sea --out wider.png
    python sample.py --continue-left-from photo.jpg --columns 64 --classes sea --out wider.png
    python sample.py --classes sea --columns 64 --ring --out ring.png         # its ends meet
    python sample.py --count 8000 --npz samples.npz         # for ADM's evaluator, or ours
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Iterator

from equimini import load_generator  # isort: skip  (before torch: says how its threads wait)

import torch
from torch import Tensor

from equimini.sampling.class_schedule import has_lengths, schedule_labels, schedule_length
from equimini.sampling.commands import (RING_FIT, SampleConfig, asks_nothing, bar, check_device,
                                        check_options, class_schedule, command_line, decoded,
                                        draw_scroll, edit_picture, evaluations, first_look,
                                        for_length, guidance_text, join_ends, length_in_columns,
                                        recorded, save_extras)
from equimini.sampling.edit import Tokens
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.utils.command_line import add_flags, output_folder, override, pick_device, run
from equimini.utils.images import grid, save_png, to_uint8
from equimini.utils.npz import write_samples


def load(cfg: SampleConfig, options: SamplingOptions) -> ImageGenerator:
    device = pick_device(cfg.device)
    check_device(options, device)
    return load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)


def asked_for(cfg: SampleConfig, model: ImageGenerator) -> tuple[list[str], Tensor, list[int]]:
    """What every row of a sheet is called; the classes (pictures, columns) and seeds."""
    shape, schedule = model.tokenizer.config, class_schedule(cfg, model)
    columns = length_in_columns(cfg, shape, schedule_length(schedule) or shape.columns)
    rows = [schedule] if has_lengths(schedule) else [[one] for one in schedule]
    names = [" to ".join(model.classes[c] for c, _ in row) for row in rows]
    labels = torch.stack([schedule_labels(row, columns) for row in rows])
    labels = labels.repeat_interleave(cfg.count or 8, 0)
    return names, labels, [cfg.seed + i for i in range(len(labels))]  # of one seed: look alike


def draw_batches(cfg: SampleConfig, options: SamplingOptions, model: ImageGenerator,
                 labels: Tensor, seeds: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """--batch-size pictures at a time: tokens (B, N, C) and pixels (B, 3, H, N·f)."""
    labels = torch.cat((labels[:, :1].expand(-1, cfg.lead_in), labels), 1)
    n = labels.shape[1]
    if cfg.ring:
        model.needs_columns("--ring")
    print(guidance_text(model.guidance(n, options), n))
    for k in range(0, len(seeds), cfg.batch_size):
        part = slice(k, k + cfg.batch_size)
        label = f"pictures {k + 1}-{k + len(seeds[part])} of {len(seeds)}, columns"
        drawn = bar(label, n)(model.draw(labels[part], seeds[part], options))
        tokens = torch.stack(list(drawn)[cfg.lead_in:], 1)
        if cfg.ring:
            tokens = join_ends(cfg, options, model, tokens, labels[part, cfg.lead_in:], seeds[part])
        yield tokens, decoded(cfg, model, tokens)


def draw_npz(cfg: SampleConfig, options: SamplingOptions, args: argparse.Namespace,
             model: ImageGenerator) -> None:
    """--npz: the pictures of a sheet, written as they are drawn; none stays in memory."""
    shape, (_, labels, seeds) = model.tokenizer.config, asked_for(cfg, model)
    options = for_length(cfg, options, args, labels.shape[1], model)
    width = shape.image_size * labels.shape[1] // shape.columns
    first = iter(labels[:, 0].split(cfg.batch_size))
    with write_samples(cfg.npz, len(seeds), shape.image_size, width) as add:
        for _, pictures in draw_batches(cfg, options, model, labels, seeds):
            add(to_uint8(pictures), next(first).tolist())
    print(f"{len(seeds)} picture{'s' * (len(seeds) > 1)} of {width}x{shape.image_size} pixels, "
          f"{evaluations(options, model)}: {cfg.npz}")


def draw_sheet(cfg: SampleConfig, options: SamplingOptions, args: argparse.Namespace,
               model: ImageGenerator) -> None:
    """--count pictures of every class, or of one sequence of classes, on one labelled sheet."""
    shape, (names, labels, seeds) = model.tokenizer.config, asked_for(cfg, model)
    options = for_length(cfg, options, args, labels.shape[1], model)
    count, columns = len(labels) // len(names), labels.shape[1]
    tokens, pictures = zip(*draw_batches(cfg, options, model, labels, seeds))
    images = torch.cat(pictures)

    across = max(1, 8 * shape.columns // columns)  # pictures side by side on the sheet
    lines = [(line, name) for name, of_row in zip(names, images.split(count))
             for line in of_row.split(across)]
    out = Path(cfg.out or "samples.png")
    save_png(grid([line for line, _ in lines], [name for _, name in lines]), out)
    print(f"{len(images)} picture{'s' * (len(images) > 1)} of {images.shape[3]}x{shape.image_size} "
          f"pixels, {evaluations(options, model)}: {out}")
    all_tokens = Tokens(torch.cat(tokens).cpu(), labels,
                        torch.tensor(seeds)[:, None].repeat(1, columns), recorded(options))
    save_extras(cfg, model, all_tokens, images, seeds, range(columns),
                [name for name in names for _ in range(count)],
                [f"class{row[0]:04d}_seed{seed:06d}.png" for row, seed in zip(labels, seeds)])


def draw_first_look(cfg: SampleConfig, options: SamplingOptions, args: argparse.Namespace) -> None:
    """Without arguments: what the model in the box draws, and the commands that draw it."""
    model = load(cfg, options)
    print(f"the model in the box, {cfg.checkpoint}, draws {', '.join(model.classes)}\n")
    for sheet, how in first_look(cfg, options, args, model):
        print(command_line(sheet, how))
        draw_sheet(sheet, how, args, model)
        print()
    print("open samples.png and panorama.png; python sample.py --help lists all options")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SampleConfig(), "what to draw, and where to")
    add_flags(parser, SamplingOptions(), "how columns are drawn")
    parser.add_argument("--redraw-later", action="store_true",
                        help="with --edit: draw all columns after the first one of --resample "
                        "again as well")
    parser.add_argument("--resume", action="store_true",
                        help="with --scroll: continue the scroll in --out, with its own options")
    args = parser.parse_args(argv)
    cfg, options = override(SampleConfig(), args), override(SamplingOptions(), args)
    if cfg.ring and "fit" not in args:
        cfg = replace(cfg, fit=RING_FIT)
    check_options(cfg, args)
    output_folder(str(Path(cfg.out).parent))
    if cfg.mode == "scroll":
        draw_scroll(cfg, options, args, load)
    elif asks_nothing(args):
        draw_first_look(cfg, options, args)
    elif cfg.mode == "sheet":
        draw_sheet(cfg, options, args, load(cfg, options))
    elif cfg.mode == "npz":
        draw_npz(cfg, options, args, load(cfg, options))
    else:
        edit_picture(cfg, options, args, load(cfg, options))


if __name__ == "__main__":
    run(main)
