"""What sample.py does: its options, scrolls, edited and continued pictures."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from equimini.autoencoder import TokenizerConfig
from equimini.config import Checked, flag
from equimini.sampler import Guidance, column_noise
from equimini.sampling.class_schedule import ClassSchedule, parse_schedule, schedule_labels
from equimini.sampling.edit import (Tokens, decode_ring, extend, mirror, next_seed, open_picture,
                                    parse_columns, paste, resample, save_tokens)
from equimini.sampling.fit import FITTED
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.scroll import check_new, load_state, scroll
from equimini.utils.checkpoint import DRAWN_WITH
from equimini.utils.command_line import config_from_dict, output_folder, override
from equimini.utils.errors import UserError, reading
from equimini.utils.images import grid, save_png, to_uint8
from equimini.utils.signals import StopRequest


@dataclass(frozen=True)
class SampleConfig(Checked):
    """What to draw, and where to."""

    checkpoint: str = flag(DRAWN_WITH, "checkpoint of a trained generator, or the name of a model in "
                           "the box: scenes-mean-flow, whose head takes one evaluation a column, or "
                           "scenes, whose flow it was trained on")
    tokenizer: str = flag("", "checkpoint of the generator's tokenizer with a fine-tuned decoder; "
                          "empty: the tokenizer inside the generator's checkpoint")
    classes: str = flag("all", "names or numbers of classes, with commas; all: every class once. "
                        "With lengths in columns (forest:32,sea:64) one picture turns from class "
                        "to class, again and again if it is longer than their sum")
    count: int = flag(0, "pictures per class, or versions of an edited picture; 0: 8, or 1 for "
                      "--edit and the options that continue one", min=0)
    columns: int = flag(0, "length of the pictures, in columns of f pixels; 0: square, or the sum "
                        "of the lengths in --classes. With --continue-from and "
                        "--continue-left-from: columns added", min=0)
    width: int = flag(0, "the same in pixels, a multiple of f", min=0)
    lead_in: int = flag(0, "columns drawn before the picture and cut off: its first column then "
                        "follows others, and does not stand out", min=0)
    scroll: int = flag(0, "draw one picture of so many columns, in constant memory, into the "
                       "folder --out: tiles, an overview, a page to scroll along", min=0)
    tile_columns: int = flag(256, "columns per tile of a scroll", min=1)
    edit: str = flag("", "picture or token file of which --resample draws columns again")
    resample: str = flag("", "columns to draw again, counted from 0, such as 5,6 or 9-12. The "
                         "columns after them are kept as they are: the drawn ones are chosen to "
                         "fit them with --fit, or they are drawn again with --redraw-later")
    fit: int = flag(1, "candidates for a column between kept ones, or for the end of a ring (there "
                    "16, if not given): one is chosen by how well what is kept on its right "
                    "follows. 1: the first one drawn", min=1)
    continue_from: str = flag("", "picture or token file to continue on its right")
    continue_left_from: str = flag("", "picture or token file to continue on its left; --classes "
                                   "begin at the picture")
    ring: bool = flag(False, "join the right end of the pictures, or of the one continued by "
                      "--continue-from, to their beginning; with --edit: the picture is a ring")
    pick: int = flag(-1, "which picture of a token file that holds several, from 0", min=-1)
    decoding: str = flag("windows", "long pictures are decoded in windows of columns, in constant "
                         "memory, or whole, as the paper's are", choices=("windows", "whole"))
    kept_pixels: str = flag("original", "where columns are kept: the given picture's own pixels, "
                            "mixed in next to drawn columns, or the tokenizer's version of them",
                            choices=("original", "decoded"))
    seed: int = flag(0, "seed of the first picture; it counts up over all pictures of all classes. "
                     "For a given picture, if not given: one that it was not drawn with",
                     min=0, max=2**62)
    weights: str = flag("ema", "moving average of the weights, or the raw ones",
                        choices=("ema", "raw"))
    batch_size: int = flag(64, "pictures drawn at a time", min=1)
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")
    out: str = flag("", "what to write: a PNG (samples.png), or a scroll's folder (scroll)")
    npz: str = flag("", "write the pictures here, not on a sheet, in constant memory: an .npz that "
                    "ADM's evaluator reads, and python -m equimini.evaluate images")
    singles: str = flag("", "folder for every picture as a file of its own")
    save_tokens: str = flag("", "file for the pictures' tokens, for --edit and the options that "
                            "continue one")
    show_steps: str = flag("", "PNG that shows the pictures grow column by column (the paper's "
                           "Fig. 9), from noise on")

    @property
    def mode(self) -> str:
        """One of WITHOUT; raises UserError for two at once."""
        asked = [name for name in WITHOUT if name != "sheet" and
                  getattr(self, name.replace("-", "_"))]
        if len(asked) > 1:
            raise UserError(f"give --{asked[0]} or --{asked[1]}, not both")
        return asked[0] if asked else "sheet"


DRAWING = tuple(f.name for f in fields(SamplingOptions) if f.name != "cuda_graphs")  # recorded
LONG = {"cfg": 1.5, "temperature": 0.96}  # of DRAWN_WITH beyond a training picture: see for_length
FIRST_LOOK = {  # what is drawn without arguments, chosen by looking and by `show drift`
    "samples.png": ({"count": 8}, {"cfg": 2.5, "cfg_schedule": "constant"}),
    "panorama.png": ({"count": 1, "lead_in": 16}, LONG)}
RING_FIT = 16  # candidates for the end of a ring, if --fit does not say
QUICK = {"solver": "midpoint", "steps": 10}
PANORAMA = 8  # lengths of a training picture
EDITING = {"resample", "redraw_later", "pick", "kept_pixels"}
SCROLLING = {"tile_columns", "resume"}
CONTINUING = SCROLLING | {"resample", "redraw_later", "lead_in", "batch_size"}
WITHOUT = {  # options that have no effect
    "sheet": EDITING | SCROLLING,
    "scroll": EDITING | {"count", "columns", "width", "lead_in", "batch_size", "singles",
                         "decoding", "save_tokens", "show_steps", "ring", "fit"},
    "edit": SCROLLING | {"columns", "width", "lead_in", "batch_size"},
    "continue-from": CONTINUING,
    "continue-left-from": CONTINUING | {"ring", "fit", "show_steps"},
    "npz": EDITING | SCROLLING | {"out", "singles", "save_tokens", "show_steps", "ring", "fit"}}


def check_options(cfg: SampleConfig, args: Namespace) -> None:
    """Raise UserError for an option that the rest of the command line leaves without effect."""
    given = {name for name, value in vars(args).items() if value is not False}
    idle = sorted(given & WITHOUT[cfg.mode])
    if idle:
        goes = [mode for mode in WITHOUT if mode != "sheet" and idle[0] not in WITHOUT[mode]]
        beside = f"goes with --{' or --'.join(goes)}" if cfg.mode == "sheet" else \
            f"does not go with --{cfg.mode}"
        raise UserError(f"--{idle[0].replace('_', '-')} {beside}")
    for name in () if cfg.mode == "scroll" else ("out", "show_steps"):
        value = getattr(cfg, name)
        if value and Path(value).suffix.lower() != ".png":
            raise UserError(f"--{name.replace('_', '-')} must end in .png, got {value}")
    if cfg.npz and Path(cfg.npz).suffix != ".npz":
        raise UserError(f"--npz must end in .npz, got {cfg.npz}")
    if cfg.mode == "edit" and not cfg.resample:
        raise UserError("--edit needs --resample: which columns to draw again, such as 5,6")
    if cfg.mode == "edit" and cfg.ring and args.redraw_later:
        raise UserError("--redraw-later draws to the right end, and a ring has none; name all columns "
                        "in --resample")
    if "fit" in given and not cfg.ring and (cfg.mode != "edit" or args.redraw_later):
        raise UserError("--fit chooses what fits columns kept on the right; it goes with --edit "
                        "without --redraw-later, and with --ring")
    if cfg.show_steps and (cfg.ring or cfg.fit > 1):
        raise UserError("--show-steps shows columns as they are drawn from their noise; it does "
                        f"not go with {'--ring' if cfg.ring else '--fit'}, which chooses among "
                        "several")
    for path in (cfg.out, cfg.save_tokens, cfg.show_steps, cfg.npz):
        if path and cfg.mode != "scroll":
            output_folder(str(Path(path).parent))


def asks_nothing(args: Namespace) -> bool:
    """Whether the command line names no model, picture or file, but at most how to draw."""
    how = {*DRAWING, "seed", "cuda_graphs", "batch_size", "device"}
    return {name for name, value in vars(args).items() if value is not False} <= how


def first_look(cfg: SampleConfig, options: SamplingOptions, args: Namespace,
               model: ImageGenerator) -> list[tuple[SampleConfig, SamplingOptions]]:
    """Two sheets, of squares and of panoramas, for a command line that asks for none."""
    quick = {} if model.generator.head.scales else QUICK
    (squares, how), (panoramas, how_long) = (
        (override(replace(cfg, **what, out=out), args),
         override(replace(options, **quick, **drawing), args))
        for out, (what, drawing) in FIRST_LOOK.items())
    return [(squares, how), (replace(panoramas, columns=PANORAMA * model.columns), how_long)]


def command_line(cfg: SampleConfig, options: SamplingOptions) -> str:
    """The command that draws a sheet of these settings."""
    default = asdict(SampleConfig()) | asdict(SamplingOptions())
    words = ["python sample.py"]
    for name, value in (asdict(cfg) | asdict(options)).items():
        if value != default[name] or name == "cfg":  # which `for_length` else chooses
            shown = f"{value:g}" if isinstance(value, float) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)


def recorded(options: SamplingOptions) -> dict[str, Any]:
    """The options as a token file and a scroll keep them."""
    return {name: getattr(options, name) for name in DRAWING}


def class_schedule(cfg: SampleConfig, model: ImageGenerator) -> ClassSchedule:
    """--classes, read."""
    if cfg.classes == "all":
        return [(i, 0) for i in range(len(model.classes))]
    return parse_schedule(cfg.classes, model.class_numbers, model.classes)


def length_in_columns(cfg: SampleConfig, shape: TokenizerConfig, default: int, least: int = 2
                      ) -> int:
    """The pictures' length; raises UserError where --columns and --width do not make sense."""
    f = shape.f
    if cfg.columns and cfg.width:
        raise UserError("give --columns or --width, not both")
    if cfg.width % f:
        raise UserError(f"--width must be a multiple of f = {f} pixels, got {cfg.width}; nearest: "
                        f"{max(least, round(cfg.width / f)) * f}")
    columns = cfg.columns or shape.tokens(cfg.width) or default
    if columns < least:
        raise UserError(f"a picture has at least {least} columns ({least * f} pixels), got "
                        f"{columns}")
    return columns


def for_length(cfg: SampleConfig, options: SamplingOptions, args: Namespace, columns: int,
               model: ImageGenerator) -> SamplingOptions:
    """The options for pictures of so many columns: where --cfg is not given, the box's default
    model draws longer ones than its training's at a smaller scale, by which they do not drift."""
    if "cfg" in args or cfg.checkpoint != DRAWN_WITH or columns <= model.columns:
        return options
    return override(replace(options, **LONG), args)


def guidance_text(guidance: Guidance, columns: int) -> str:
    """The guidance scales of a picture of so many columns, in words."""
    s, last = guidance.s, min(guidance.columns, columns) - 1
    if s == 1 or guidance.schedule == "constant":
        return "guidance: none" if s == 1 else f"guidance: {s:g} throughout"
    return (f"guidance: {guidance.scale(0):.3g} at column 0 to {guidance.scale(last):.3g} at column "
            f"{last}" + (", then the same" if last + 1 < columns else ""))


def check_device(options: SamplingOptions, device: torch.device) -> None:
    """Raise UserError for an option that this device does not have."""
    if options.cuda_graphs == "on" and device.type != "cuda":
        raise UserError(f"--cuda-graphs on needs a CUDA device, got {device}")


def evaluations(options: SamplingOptions, model: ImageGenerator) -> str:
    """How often the head is asked per column, in words."""
    n = options.resolved(model.generator.head).evaluations
    return f"{n} evaluation{'s' * (n > 1)} of the head per column"


def bar(label: str, total: int | None = None, done: int = 0) -> Callable[[Iterable], Iterable]:
    """A progress bar around a loop over columns."""
    return lambda drawn: tqdm(drawn, desc=label, total=total, initial=done, dynamic_ncols=True)


def growth(model: ImageGenerator, tokens: Tensor, seeds: Sequence[int], order: Sequence[int],
           frames: int = 17, lead_in: int = 0) -> list[Tensor]:
    """How each picture came about: (frames, 3, H, W) of every one of the B (the paper's Fig. 9).

    Columns that are not drawn yet are the noise that they start from.  order: the columns that
    were drawn, in order, behind `lead_in` that are cut off; at most `frames` moments are shown, the
    first and the last among them.
    """
    n = min(frames, len(order) + 1)
    moments = [round(k * len(order) / (n - 1)) for k in range(n)]
    noise = torch.stack([column_noise(seeds, lead_in + i, tokens.shape[2]) for i in order], 1)
    noise = noise.to(tokens)
    pictures = []
    for b in range(len(tokens)):
        stages = tokens[b].repeat(n, 1, 1)
        for stage, k in zip(stages, moments):
            stage[list(order[k:])] = noise[b, k:]
        pictures.append(model.decode(stages).cpu())
    return pictures


def save_growth(path: str, grown: list[Tensor], labels: list[str]) -> None:
    """Squares: one row of moments per picture; longer ones: one above the other."""
    if grown[0].shape[3] > 2 * grown[0].shape[2]:
        labels = [label for label, g in zip(labels, grown) for _ in g]
        grown = [moment[None] for g in grown for moment in g]
    save_png(grid(grown, labels), path)
    print(f"column by column: {path}")


def resumed_scroll(folder: Path, args: Namespace) -> tuple[SampleConfig, SamplingOptions, dict]:
    """Options and state of the scroll in `folder`; raises UserError where `args` differ."""
    state = load_state(folder)
    names = {f.name for f in fields(SamplingOptions)}
    with reading(folder / "state.pt"):
        begun, drawn = (config_from_dict(kind, {k: v for k, v in state["settings"].items()
                                                if (k in names) == (kind is SamplingOptions)})
                        for kind in (SampleConfig, SamplingOptions))
        column = state["sampler"]["column"]
        if type(column) is not int or not 0 <= column < 2**62:
            raise ValueError(f"its column is {column!r}")
    cfg, options = override(begun, args), override(drawn, args)
    before, after = asdict(begun) | asdict(drawn), asdict(cfg) | asdict(options)
    free = ("scroll", "checkpoint", "guide", "device", "out")  # `scroll` compares weights
    if other := [name for name in after if after[name] != before[name] and name not in free]:
        raise UserError(f"the scroll in {folder} was begun with --{other[0].replace('_', '-')} "
                        f"{before[other[0]]}, not {after[other[0]]}; leave it out, or start "
                        "another scroll with --out")
    return cfg, options, state


def draw_scroll(cfg: SampleConfig, options: SamplingOptions, args: Namespace,
                load: Callable[..., ImageGenerator]) -> None:
    """--scroll: into a folder, from its beginning or from where it was interrupted."""
    folder, state = output_folder(cfg.out or "scroll"), None
    if args.resume:
        cfg, options, state = resumed_scroll(folder, args)
    else:
        check_new(folder)
    if cfg.scroll < 2:
        raise UserError(f"--scroll must be at least 2 columns, got {cfg.scroll}")
    model = load(cfg, options)
    labels, longer = schedule_labels(class_schedule(cfg, model), cfg.scroll), model.columns + 1
    if not state:
        options = for_length(cfg, options, args, longer, model)  # whatever --scroll is
    guidance = model.guidance(max(cfg.scroll, longer), options)
    print(guidance_text(guidance, cfg.scroll))
    done = state["sampler"]["column"] if state else 0
    what = f"{cfg.scroll} columns, {cfg.classes}, seed {cfg.seed}, {Path(cfg.checkpoint).name}"
    with StopRequest("stopping after this column") as stop:
        drawn = scroll(model, labels, cfg.seed, folder, options, tile=cfg.tile_columns,
                       caption=what, settings=asdict(cfg) | asdict(options), resumed=state,
                       stop=lambda: bool(stop.asked), progress=bar("columns", cfg.scroll, done))
    print(f"{drawn} columns ({drawn * model.tokenizer.config.f} pixels), "
          f"{evaluations(options, model)}: {folder}/index.html")
    if stop.asked:
        print(f"stopped; continue with --scroll {cfg.scroll} --out {folder} --resume")
        sys.exit(128 + stop.asked)


def edit_picture(cfg: SampleConfig, options: SamplingOptions, args: Namespace,
                 model: ImageGenerator) -> None:
    """--edit and both ways to continue: versions of one picture, some of its columns kept."""
    path = cfg.edit or cfg.continue_from or cfg.continue_left_from
    source, before = open_picture(path, model, None if cfg.pick < 0 else cfg.pick,
                                  keep="right" if cfg.continue_from else "left")
    known = {k: v for k, v in source.options.items() if k in DRAWING}
    shape, given = model.tokenizer.config, source.tokens.shape[1]
    added = 0 if cfg.edit else length_in_columns(cfg, shape, shape.columns, least=1)
    options = for_length(cfg, options, args, given + added, model)
    # a token file's own options are the defaults
    options = override(config_from_dict(SamplingOptions, asdict(options) | known), args)
    first = cfg.seed if "seed" in args else next_seed(source)
    seeds = [first + i for i in range(cfg.count or 1)]
    plan = class_schedule(cfg, model) if "classes" in args else None
    order, drawn = draw_edit(cfg, options, args, model, source, before, seeds, plan, added)
    drawn.options = recorded(options)
    columns = drawn.tokens.shape[1]
    print(guidance_text(model.guidance(columns, options), columns))
    after = decoded(cfg, model, drawn.tokens)
    if cfg.continue_left_from:
        after, order = after.flip(3), range(columns - given)
    if cfg.kept_pixels == "original":
        room = before.new_zeros(*before.shape[:3], (columns - given) * shape.f)
        kept = torch.cat((room, before) if cfg.continue_left_from else (before, room), -1)
        changed = torch.zeros(columns, dtype=torch.bool)
        changed[list(order)] = True
        after = paste(kept.expand(len(seeds), -1, -1, -1), after, changed, shape.f,
                      ring=cfg.ring)
    if cfg.continue_left_from:
        drawn = mirror(model, drawn, after.flip(3))  # what is drawn, from left to right
        drawn.tokens[:, -given:] = source.tokens
    out = Path(cfg.out or "samples.png")
    if len(seeds) == 1:
        save_png(to_uint8(after)[0], out)
    else:
        rows = after.split(max(1, 8 * shape.columns // columns))
        firsts = torch.tensor(seeds).split([len(row) for row in rows])
        save_png(grid([before, *rows], ["before", *(f"from seed {s[0]}" for s in firsts)]), out)
    print(f"{len(seeds)} version{'s' if len(seeds) > 1 else ''} of {columns} columns, "
          f"{len(order)} of them drawn with {evaluations(options, model)}: {out}")
    save_extras(cfg, model, drawn, after, seeds, order, [f"seed {seed}" for seed in seeds],
                [f"seed{seed:06d}.png" for seed in seeds])


def draw_edit(cfg: SampleConfig, options: SamplingOptions, args: Namespace, model: ImageGenerator,
              source: Tokens, before: Tensor, seeds: list[int], plan: ClassSchedule | None,
              added: int) -> tuple[Sequence[int], Tokens]:
    """Which columns are drawn, and the versions; on the left, all of it as seen in a mirror.

    added: columns to continue it by.
    """
    given = source.tokens.shape[1]
    if cfg.edit:
        order = parse_columns(cfg.resample, given)
        order = list(range(order[0], given)) if args.redraw_later else order
        return order, resample(model, source, order, seeds, options, plan, bar("columns"), cfg.fit,
                               cfg.ring)
    order = range(given, given + added)
    if cfg.continue_left_from:
        source = mirror(model, source, before)
    return order, extend(model, source, added, seeds, options, plan, bar("columns"), cfg.fit,
                         cfg.ring)


def join_ends(cfg: SampleConfig, options: SamplingOptions, model: ImageGenerator, tokens: Tensor,
              labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """--ring for new pictures (B, N, C): their last columns drawn again to fit the first."""
    n = tokens.shape[1]
    end, closed = range(max(1, n - FITTED), n), []
    for x, label, seed in zip(tokens.cpu(), labels, seeds):
        one = Tokens(x[None], label[None], torch.full((1, n), seed))
        closed.append(resample(model, one, end, [seed], options, fit=cfg.fit, ring=True))
    return torch.cat([one.tokens for one in closed]).to(tokens)


def decoded(cfg: SampleConfig, model: ImageGenerator, tokens: Tensor) -> Tensor:
    """Pixels (B, 3, H, N·f) of tokens, on the CPU."""
    decode = model.decode_whole if cfg.decoding == "whole" else model.decode
    tokens = tokens.to(model.device)
    return (decode_ring(model, tokens, decode) if cfg.ring else decode(tokens)).cpu()


def save_extras(cfg: SampleConfig, model: ImageGenerator, drawn: Tokens, images: Tensor,
                seeds: Sequence[int], order: Sequence[int], labels: list[str],
                names: list[str]) -> None:
    """What --singles, --save-tokens and --show-steps ask for."""
    if cfg.singles:
        folder = output_folder(cfg.singles)
        for name, picture in zip(names, to_uint8(images)):
            save_png(picture, folder / name)
        print(f"single pictures: {folder}")
    if cfg.save_tokens:
        save_tokens(cfg.save_tokens, model, drawn)
        print(f"tokens: {cfg.save_tokens}")
    if cfg.show_steps:
        grown = growth(model, drawn.tokens.to(model.device), seeds, order, lead_in=cfg.lead_in)
        save_growth(cfg.show_steps, grown, labels)
