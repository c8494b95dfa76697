"""Token files, and pictures that are changed or continued column by column (Fig. 6).

A column is a place in the picture, so it can be drawn again by itself, or the picture can go on
at its right end, at its left end (in a mirror), or until it meets its own beginning.  What is kept
is fed to the model exactly as if it had been drawn.  A given photograph is encoded by the
tokenizer; since decoding does not give back the same pixels, the columns that stay take theirs
from the photograph.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

from equimini.sampling.class_schedule import ClassSchedule, schedule_labels
from equimini.sampling.fit import fill_gap, gaps_of
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.tiled_decoder import Windows
from equimini.utils import checkpoint
from equimini.utils.checkpoint import latents_hash
from equimini.utils.errors import UserError
from equimini.utils.images import load_columns

UNKNOWN = -1  # class or seed of a column that was encoded from a picture
FADE = 2  # columns over which kept pixels go over into drawn ones


@dataclass
class Tokens:
    """Columns of B pictures, and how they came about; the content of a token file."""

    tokens: Tensor  # (B, N, C), normalised, float32
    labels: Tensor  # (B, N) int64 class numbers, or UNKNOWN
    seeds: Tensor  # (B, N) int64 seeds, or UNKNOWN
    options: dict[str, Any] = field(default_factory=dict)  # with which they were drawn
    mirror: Tensor | None = None  # (B, M, C): the first M columns, drawn as seen in a mirror

    def __getitem__(self, i: int) -> Tokens:
        """Picture i alone."""
        return Tokens(self.tokens[i:i + 1], self.labels[i:i + 1], self.seeds[i:i + 1],
                      self.options, self.mirror if self.mirror is None else self.mirror[i:i + 1])

    def __len__(self) -> int:
        return len(self.tokens)

    def turned(self, columns: int) -> Tokens:
        """Rings, of which the last `columns` come to lie before the first."""
        return Tokens(*(x.roll(columns, 1) for x in (self.tokens, self.labels, self.seeds)),
                      self.options)


def save_tokens(path: Path | str, model: ImageGenerator, drawn: Tokens) -> None:
    """Write a token file; raises UserError if it cannot be written.

    It holds plain tensors, numbers and strings: the normalised tokens, class numbers and seeds of
    every column, class names, options, and the SHA-256 of the tokenizer but for its decoder; of a
    strip drawn to the left, its first columns in the mirror.
    """
    checkpoint.save(path, "tokens", {
        "tokens": drawn.tokens.cpu().float().clone(), "labels": drawn.labels.cpu().clone(),
        "seeds": drawn.seeds.cpu().clone(), "classes": list(model.classes),
        "tokenizer": latents_hash(model.tokenizer), "options": drawn.options,
        **({} if drawn.mirror is None else {"mirror": drawn.mirror.cpu().clone()})})


def load_tokens(path: Path | str, model: ImageGenerator) -> Tokens:
    """Read a token file; its classes are found by name, others become UNKNOWN.

    Raises UserError if it is missing, damaged, of another kind, or made by another tokenizer.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no token file {path}; sample.py --save-tokens writes one")
    content = checkpoint.load(path, "tokens")
    try:
        tokens, labels, seeds = (content[k] for k in ("tokens", "labels", "seeds"))
        names, made_by, options = (content[k] for k in ("classes", "tokenizer", "options"))
        fits = (tokens.dim() == 3 and tokens.numel() > 0 and tokens.dtype == torch.float32
                and labels.shape == seeds.shape == tokens.shape[:2]
                and labels.dtype == seeds.dtype == torch.int64
                and bool((labels < len(names)).all()) and bool(tokens.isfinite().all()))
        fits = fits and isinstance(options, dict) and min(labels.min(), seeds.min()) >= UNKNOWN
        if (mirror := content.get("mirror")) is not None:
            fits = (fits and mirror.dtype == torch.float32 and bool(mirror.isfinite().all())
                    and tokens[:, :mirror.shape[1]].shape == mirror.shape != tokens[:, :0].shape)
    except Exception:  # other things than tensors raise many kinds
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged: its tokens, classes and seeds do not fit together")
    if made_by != latents_hash(model.tokenizer):
        raise UserError(f"the tokens in {path} belong to another tokenizer than that of the "
                        "generator; give the --checkpoint they were drawn with")
    known = torch.tensor([model.classes.index(name) if name in model.classes else UNKNOWN
                          for name in names] + [UNKNOWN])  # UNKNOWN is the last index
    return Tokens(tokens, known[labels.clamp(min=UNKNOWN)], seeds, options, mirror)


def open_picture(path: str, model: ImageGenerator, pick: int | None = None,
                 keep: str = "left") -> tuple[Tokens, Tensor]:
    """A token file's picture, or a picture file encoded: its tokens, pixels (1, 3, H, N·f).

    pick: which picture of a token file that holds several.  A picture file is scaled to the
    tokenizer's height, and what is left over of a column is cut off on the other side than `keep`.
    Raises UserError for a file that cannot be used, and for tokens that are no columns.
    """
    model.needs_columns("to edit or continue a picture")
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    with open(path, "rb") as file:  # zipfile.is_zipfile raises for some that are damaged
        packed = file.read(4) == b"PK\3\4"
    if packed or Path(path).suffix == ".pt":
        source = load_tokens(path, model)
        if pick is None and len(source) > 1:
            raise UserError(f"{path} holds {len(source)} pictures; choose one with --pick 0 to "
                            f"--pick {len(source) - 1}")
        if (pick or 0) >= len(source):
            raise UserError(f"--pick must be 0 to {len(source) - 1} for {path}, got {pick}")
        source = source[pick or 0]
        return source, model.decode(source.tokens.to(model.device)).cpu()
    if pick is not None:
        raise UserError(f"--pick chooses a picture of a token file; {path} is none")
    pixels = load_columns(path, model.tokenizer.config.image_size, model.tokenizer.config.f, keep)
    tokens = model.encode(pixels).cpu()
    unknown = torch.full(tokens.shape[:2], UNKNOWN)
    return Tokens(tokens, unknown, unknown), pixels


def parse_columns(text: str, n: int) -> list[int]:
    """'5,6,9-11' to [5, 6, 9, 10, 11]; raises UserError for what is not among columns 0 to n−1."""
    columns: set[int] = set()
    for part in text.split(","):
        first, dash, last = (end.strip() for end in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < n):
            raise UserError(f"--resample takes columns 0 to {n - 1} of this picture, such as 5,6 "
                            f"or 9-12, got {text!r}")
        columns.update(range(int(first), int(last) + 1))
    return sorted(columns)


def resample(model: ImageGenerator, source: Tokens, columns: Sequence[int], seeds: Sequence[int],
             options: SamplingOptions, plan: ClassSchedule | None = None,
             progress: Callable[[Iterable], Iterable] = iter, fit: int = 1,
             ring: bool = False) -> Tokens:
    """Draw columns of one picture (B = 1) again, once per seed; the others stay as they are.

    plan: classes of the drawn columns (their own, where None).  fit: candidates per version and
    gap, of which one is chosen by how well what is kept on the right follows it (fit.py); 1: the
    first that is drawn.  ring: the picture's beginning follows its end; it is turned until the
    columns, which must be neighbours, are its end.
    Raises UserError where a class is needed and not known, and for other columns of a ring.
    """
    n, columns, turn = source.tokens.shape[1], list(columns), 0
    if ring:
        firsts = [i for i in columns if (i - 1) % n not in columns]
        if len(firsts) != 1:
            raise UserError(f"--resample takes neighbouring columns of a ring, such as 5,6 or "
                            f"{n - 2}-{n - 1},0-1, and not all of them, got {columns}")
        turn = -(firsts[0] + len(columns)) % n
    source = replace(source, labels=_planned(source, columns, plan)[None]).turned(turn)
    columns = sorted((i + turn) % n for i in columns)
    return _draw(model, source, source.labels[0], columns, seeds, options, progress, fit,
                 ring).turned(-turn)


def _planned(source: Tokens, columns: Sequence[int], plan: ClassSchedule | None) -> Tensor:
    """The class of every column (N,) once `columns` are of those in `plan`."""
    labels = source.labels[0].clone()
    if plan is not None:
        planned = schedule_labels(plan, len(labels))
        labels[list(columns)] = planned[list(columns)]
        labels = torch.where(labels == UNKNOWN, planned, labels)
    return _known(labels)


def extend(model: ImageGenerator, source: Tokens, columns: int, seeds: Sequence[int],
           options: SamplingOptions, plan: ClassSchedule | None = None,
           progress: Callable[[Iterable], Iterable] = iter, fit: int = 1,
           ring: bool = False) -> Tokens:
    """Continue one picture (B = 1) by so many columns on the right, once per seed.

    plan: classes of the new columns (the last one's, where None).  ring: such that the picture's
    own beginning follows the last one; fit: candidates for that end, as for `resample`.
    Raises UserError where a class is needed and not known.
    """
    old = source.labels[0]
    new = old[-1:].expand(columns) if plan is None else schedule_labels(plan, columns)
    labels = _known(torch.cat((torch.where(old == UNKNOWN, new[0], old), new)))
    drawn = list(range(len(old), len(labels)))
    return _draw(model, source, labels, drawn, seeds, options, progress, fit, ring)


def _known(labels: Tensor) -> Tensor:
    if (labels == UNKNOWN).any():
        raise UserError("the picture does not say which class it shows; name it with --classes")
    return labels


def mirror(model: ImageGenerator, picture: Tokens, pixels: Tensor) -> Tokens:
    """The picture (B = 1) seen in a mirror: `pixels` (1, 3, H, N·f), mirrored and encoded anew.

    Continued to the right, it is the picture continued to the left; columns that were drawn in the
    mirror are not encoded, but as they were drawn (`Tokens.mirror`).  The way back is another call
    with the mirrored pixels.  Raises UserError for a generator that has not seen mirrored pictures.
    """
    if not model.mirrored:
        raise UserError("this generator was trained without mirrored pictures (the built-in data "
                        "has none), so it cannot continue pictures to the left")
    tokens = model.encode(pixels.flip(3)).cpu()
    if picture.mirror is not None:
        tokens[:, -picture.mirror.shape[1]:] = picture.mirror
    return Tokens(tokens, picture.labels.flip(1), picture.seeds.flip(1), picture.options)


def _draw(model: ImageGenerator, source: Tokens, labels: Tensor, drawn: list[int],
          seeds: Sequence[int], options: SamplingOptions,
          progress: Callable[[Iterable], Iterable], fit: int, ring: bool) -> Tokens:
    """One version of the picture per seed, the columns `drawn` new, of the classes `labels`."""
    b, n, given = len(seeds), len(labels), source.tokens.shape[1]
    tokens = torch.zeros(b, n, source.tokens.shape[2])
    all_seeds = source.seeds.new_zeros(b, n)
    tokens[:, :given], all_seeds[:, :given] = source.tokens, source.seeds
    tokens[:, drawn], all_seeds[:, drawn] = torch.nan, torch.tensor(seeds)[:, None]
    work = chain.from_iterable(fill_gap(model, tokens, labels, gap, seeds, options, fit, ring)
                               for gap in gaps_of(drawn))
    for _ in zip_longest(work, progress(drawn)):  # one step a column, but for ends that are fitted
        pass
    return Tokens(tokens, labels.expand(b, n).clone(), all_seeds, source.options)


def next_seed(source: Tokens) -> int:
    """A seed that no column of the picture was drawn with."""
    return int(source.seeds.max()) + 1


@torch.no_grad()
def decode_ring(model: ImageGenerator, tokens: Tensor,
                decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Tokens (B, N, C) to the pixels (B, 3, H, N·f) of a ring, whose ends meet without a seam.

    The picture is decoded with its own continuation on either side.  Over its first columns, what
    the decoder makes of them behind its end is faded into what it makes of them at the beginning.
    decode: as `model.decode`, the default.
    """
    n, f = tokens.shape[1], model.tokenizer.config.f
    p = min(n, model.columns)
    around = (decode or model.decode)(torch.cat((tokens[:, -p:], tokens, tokens[:, :p]), 1))
    begins, ends = around[..., p * f:(p + n) * f].clone(), around[..., (p + n) * f:]
    weight = Windows(2 * p, p, p // 4).fade(f).to(begins)  # the discarded ones: at `ends`' border
    begins[..., :len(weight)] = torch.lerp(ends[..., :len(weight)], begins[..., :len(weight)],
                                           weight)
    return begins


def paste(kept: Tensor, drawn: Tensor, changed: Tensor, f: int, fade: int = FADE,
          ring: bool = False) -> Tensor:
    """`kept`, with the columns that are `changed` (N,) replaced by those of `drawn`.

    kept, drawn: pixels (B, 3, H, N·f).  In the `fade` columns on either side of changed ones the
    two are mixed; all pixels further off are those of `kept`, to the last bit.  ring: the first
    column lies next to the last one.
    """
    if ring:
        half = len(changed) // 2
        kept, drawn = (x.roll(half * f, -1) for x in (kept, drawn))
        return paste(kept, drawn, changed.roll(half), f, fade).roll(-half * f, -1)
    places = torch.arange(len(changed) * f, dtype=torch.float32) + 0.5  # pixel centres
    weight = torch.zeros(len(places))
    for i in changed.nonzero()[:, 0].tolist():
        away = torch.maximum(i * f - places, places - (i + 1) * f).clamp(min=0)  # in pixels
        weight = torch.maximum(weight, (1 - away / (fade * f + 1e-9)).clamp(0, 1))
    weight = weight * weight * (3 - 2 * weight)  # no kinks at either end
    return torch.where(weight > 0, torch.lerp(kept, drawn, weight.to(kept)), kept)
