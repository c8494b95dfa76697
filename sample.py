"""Draw pictures with a trained generator: a labelled sheet, a scroll, or changes to a picture.

Without --checkpoint it is the model in the box (equimini/assets), without any argument a first
look at it: samples.png and panorama.png.

    python sample.py                                        # squares and panoramas
    python sample.py --classes sea,forest --columns 128     # panoramas, 8 times wider
    python sample.py --classes forest:48,sea:48 --count 4   # that turn from forest into sea
    python sample.py --classes forest:200,sea:200 --scroll 10000 --out walk  # walk/index.html
    python sample.py --edit photo.jpg --resample 5,6 --classes sea --out edited.png
    python sample.py --continue-from photo.jpg --columns 64 --classes sea --out wider.png
"""

import argparse
from pathlib import Path

import torch

from equimini import load_generator
from equimini.sampling.class_schedule import has_lengths, plan_labels, plan_length
from equimini.sampling.commands import (DRAWING, SampleConfig, asks_nothing, bar, check_device,
                                        check_options, class_plan, command_line, draw_scroll,
                                        drawing_options, edit_picture, evaluations, first_look,
                                        guidance_text, length_in_columns, save_extras)
from equimini.sampling.edit import Tokens
from equimini.sampling.image_generator import ImageGenerator
from equimini.utils.command_line import add_flags, output_folder, override, pick_device, run
from equimini.utils.images import grid, save_png


def load(cfg: SampleConfig) -> ImageGenerator:
    device = pick_device(cfg.device)
    check_device(cfg.cuda_graphs, device)
    return load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)


def draw_sheet(cfg: SampleConfig, model: ImageGenerator) -> None:
    """--count pictures of every class, or of one sequence of classes, on one labelled sheet."""
    shape, count, plan = model.tokenizer.config, cfg.count or 8, class_plan(cfg, model)
    columns = length_in_columns(cfg, shape.f, plan_length(plan) or shape.columns)
    rows = [plan] if has_lengths(plan) else [[one] for one in plan]
    names = [" to ".join(model.classes[c] for c, _ in row) for row in rows]
    labels = torch.stack([plan_labels(row, columns) for row in rows]).repeat_interleave(count, 0)
    n, with_lead = cfg.lead_in + columns, labels[:, :1].expand(-1, cfg.lead_in)
    with_lead = torch.cat((with_lead, labels), 1)  # the class of every column that is drawn
    seeds = torch.arange(cfg.seed, cfg.seed + len(labels))  # pictures of one seed look alike
    print(guidance_text(cfg, model, n))

    tokens, pictures = [], []
    for k in range(0, len(seeds), cfg.batch_size):
        part = slice(k, k + cfg.batch_size)
        label = f"pictures {k + 1}-{k + len(seeds[part])} of {len(seeds)}, columns"
        drawn = model.draw(with_lead[part], n, seeds[part].tolist(), **drawing_options(cfg))
        tokens.append(torch.stack(list(bar(label, n)(drawn))[cfg.lead_in:], 1))
        pictures.append(model.decode(tokens[-1]).cpu())
    images = torch.cat(pictures)

    across = max(1, 8 * shape.columns // columns)  # pictures side by side on the sheet
    lines = [(line, name) for name, of_row in zip(names, images.split(count))
             for line in of_row.split(across)]
    out = Path(cfg.out or "samples.png")
    save_png(grid([line for line, _ in lines], [name for _, name in lines]), out)
    print(f"{len(images)} pictures of {columns * shape.f}x{shape.image_size} pixels, "
          f"{evaluations(cfg)}: {out}")
    all_tokens = Tokens(torch.cat(tokens).cpu(), labels, seeds[:, None].repeat(1, columns),
                        {name: getattr(cfg, name) for name in DRAWING})
    save_extras(cfg, model, all_tokens, images, seeds.tolist(), range(columns),
                [name for name in names for _ in range(count)],
                [f"class{row[0]:04d}_seed{seed:06d}.png" for row, seed in zip(labels, seeds)])


def draw_first_look(cfg: SampleConfig, args: argparse.Namespace) -> None:
    """Without arguments: what the model in the box draws, and the commands that draw it."""
    model = load(cfg)
    print(f"the model in the box, {cfg.checkpoint}, draws {', '.join(model.classes)}\n")
    for sheet in first_look(cfg, args, model):
        print(command_line(sheet))
        draw_sheet(sheet, model)
        print()
    print("open samples.png and panorama.png; python sample.py --help lists all options")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, SampleConfig(), "options")
    parser.add_argument("--redraw-later", action="store_true",
                        help="with --edit: draw all columns after the first one of --resample "
                        "again, too")
    parser.add_argument("--resume", action="store_true",
                        help="with --scroll: go on with the scroll in --out, with its own options")
    args = parser.parse_args()
    cfg = override(SampleConfig(), args)
    check_options(cfg, args)
    output_folder(str(Path(cfg.out).parent))
    if cfg.mode == "scroll":
        draw_scroll(cfg, args, load)
    elif asks_nothing(args):
        draw_first_look(cfg, args)
    elif cfg.mode == "sheet":
        draw_sheet(cfg, load(cfg))
    else:
        edit_picture(cfg, args, load(cfg))


if __name__ == "__main__":
    run(main)
