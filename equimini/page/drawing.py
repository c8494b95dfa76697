"""What the page's buttons do: an order in, pieces of the picture out while they are drawn."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from equimini.config import Checked, flag
from equimini.page.history import History
from equimini.sampler import SOLVERS
from equimini.sampling.commands import QUICK, SampleConfig, command_line
from equimini.sampling.edit import FADE, UNKNOWN, Tokens
from equimini.sampling.fit import LOOK_AHEAD, reach
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.strip import (CONTEXT, cut, encode, fill, flat, mirrored, painted, preview,
                                     row_type)
from equimini.utils.checkpoint import DRAWN_WITH, latents_hash
from equimini.utils.errors import UserError
from equimini.utils.files import claim
from equimini.utils.images import load_columns

LONGEST = 20_000  # columns of a strip
CHUNK = 64  # columns drawn between two saves; to the left, also those that are mirrored
BEAT = 0.05  # seconds between two previews
PIXELS, SHAPE = 40_000_000, 100  # of a photograph, at most; its longer side over the other
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"
DRAWN, AT_ONCE = ("right", "left", "ring", "redraw"), ("choose", "undo", "redo", "new", "photo")
Piece = dict[str, Any]  # "at" and "pixels" (H, w, 3); "candidate", "done", "columns"


@dataclass(frozen=True)
class Order(Checked):
    """What to do, and how; the page sends it as JSON."""

    do: str = flag("right", "", choices=DRAWN + AT_ONCE)
    version: int = flag(-1, "of the strip that it is meant for; -1: any", min=-1)
    columns: int = flag(16, "to add", min=1, max=4096)
    start: int = flag(0, "first column to draw again", min=0)
    end: int = flag(0, "behind the last one", min=0)
    later: str = flag("keep", "what lies behind them", choices=("keep", "draw"))
    classes: tuple[int, ...] = flag((), "of the drawn columns; none: as they are", min=0)
    candidates: int = flag(4, "for columns drawn again", min=1, max=8)
    candidate: int = flag(0, "to choose", min=0)
    fit: int = flag(4, "drawings of which one that fits is taken", min=1, max=64)
    seed: int = flag(-1, "-1: one that nothing was drawn with", min=-1, max=2**53)
    cfg: float = flag(1.5, "", min=0, max=100)
    solver: str = flag("auto", "", choices=("auto", *SOLVERS))
    steps: int = flag(0, "", min=0, max=1000)
    temperature: float = flag(1.0, "", min=0, max=10)

    @property
    def how(self) -> dict[str, Any]:
        """Its SamplingOptions; guidance does not depend on how long a strip is or becomes."""
        return {"cfg": self.cfg, "cfg_schedule": "constant", "solver": self.solver,
                "steps": self.steps, "temperature": self.temperature}


def read_order(values: dict[str, Any]) -> Order:
    """Raises UserError for a field that is unknown, of another kind or out of range."""
    names = [f.name for f in fields(Order)]
    if unknown := [name for name in values if name not in names]:
        raise UserError(f"unknown field {unknown[0][:50]!r}; an order has {', '.join(names)}")
    try:
        return Order(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as error:
        raise UserError(str(error)[:200]) from None


class Studio:
    """One strip and the model that draws it; public methods are what the page asks for."""

    def __init__(self, model: ImageGenerator, folder: Path, checkpoint: str = DRAWN_WITH) -> None:
        model.needs_columns("the page")
        self.model, self.checkpoint, self.stop = model, checkpoint, Event()
        claim(folder, {"tokenizer": latents_hash(model.tokenizer)}, "a strip",
              "give the --checkpoint that it was drawn with, or choose another --out")
        self.strip = History(folder, row_type(model))
        self.waiting: dict[str, Any] = {}  # candidates to choose from, of the present strip
        self.used = -1  # the highest seed of a candidate

    def state(self) -> dict[str, Any]:
        """The strip, and what may be asked for."""
        strip, shape, waiting = self.strip, self.model.tokenizer.config, self.waiting
        scales = self.model.generator.head.scales
        return {
            "version": strip.version, "f": shape.f, "height": shape.image_size,
            "classes": self.model.classes, "labels": strip.columns["label"].tolist(),
            "undo": strip.done > 0, "redo": strip.done < strip.edits, "ring": self.ring,
            "mirrored": self.model.mirrored, "scales": scales, "quick": {} if scales else QUICK,
            "command": self.command(), "seed": self.next_seed(),
            "checkpoint": Path(self.checkpoint).stem, "candidates": {
                "at": int(waiting["versions"][0][0][0]), "span": waiting["span"],
                "count": len(waiting["versions"])} if waiting else None}

    @property
    def ring(self) -> bool:
        """Whether the strip's end joins its beginning."""
        return bool(self.strip.last().get("ring"))

    def next_seed(self) -> int:
        """One that no column and no candidate was drawn with."""
        return max(self.used, int(self.strip.columns["seed"].max(initial=-1))) + 1

    def check(self, order: Order) -> None:
        """Raise UserError for an order that the present strip does not allow."""
        n, drawn = len(self.strip.columns), order.columns
        if order.version not in (-1, self.strip.version):
            raise UserError("the strip has changed, in another tab perhaps")
        if order.do in AT_ONCE:
            return
        if order.do == "redraw":
            if not order.start < order.end <= n:
                raise UserError(f"start and end must lie in the strip, which has {n} columns, got "
                                f"{order.start} and {order.end}")
            drawn = (order.end if order.later == "keep" else n) - order.start
        elif n + drawn > LONGEST:
            raise UserError(f"a strip has at most {LONGEST} columns")
        elif order.do != "right" and n < 2:
            raise UserError("draw two columns first, or drop a photograph")
        if order.do == "left" and not self.model.mirrored:
            raise UserError("this generator was trained without mirrored pictures, so it cannot "
                            "draw to the left")
        if order.classes and (len(order.classes) != drawn
                              or max(order.classes) >= len(self.model.classes)):
            raise UserError(f"classes must be {drawn} numbers below {len(self.model.classes)}, got "
                            f"{len(order.classes)}, the largest {max(order.classes)}")
        SamplingOptions(**order.how).resolved(self.model.generator.head)

    def draw(self, order: Order, data: bytes = b"") -> Iterator[Piece]:
        """Whole columns that were added stay, however it ends.  data: of a photograph."""
        self.check(order)
        if order.do in AT_ONCE:
            {"choose": lambda: self.choose(order.candidate), "undo": self.strip.undo,
             "redo": self.strip.redo, "new": self.new, "photo": lambda: self.photo(data)
             }[order.do]()
        self.waiting = {}
        if order.do in DRAWN:
            seed = self.next_seed() if order.seed < 0 else order.seed
            yield from (self.redraw if order.do == "redraw" else self.grow)(order, seed)

    def grow(self, order: Order, seed: int) -> Iterator[Piece]:
        """Columns at the end, or at the beginning: those that follow the strip seen in a mirror."""
        left, old, more = order.do == "left", self.strip.columns, {}
        if left:
            more["start"] = "start.pt" if "mirror" in self.strip.last() else "start.png"
            old = self.in_mirror()
        n, gap = len(old), range(len(old), len(old) + order.columns)
        rows = self.prepared(old, gap, order.classes[::-1 if left else 1], seed)
        tokens, work = fill(self.model, rows, gap, [seed], SamplingOptions(**order.how),
                            order.fit, order.do == "ring")
        shown = saved = done = due = 0

        def save() -> list[Piece]:
            """What was drawn since the last time."""
            ring = order.do == "ring" and done == order.columns
            rows["token"][n + saved:n + done] = tokens[0, n + saved:n + done]
            near = painted(self.model, rows[:n + done], n + saved, n + done, ring)
            if left:
                near = self.turned(rows[:n + done], n + saved, near)
                seen = rows["token"][:n + done][-max(CONTEXT, reach(self.model.generator.config)):]
                more["mirror"] = base64.b64encode(seen.tobytes()).decode()  # to draw on from
            span = (0, done) if left else (n, n + done)
            return self.save(near, order, seed, span, saved > 0, ring, **more)

        try:
            for _, done in work:
                if self.stop.is_set():
                    break
                if done - saved == CHUNK < order.columns - saved:
                    pieces, shown, saved = save(), done, done  # before a listener may be gone
                    yield from pieces
                elif time.monotonic() >= due:
                    pixels = preview(self.model, tokens, n + shown, n + done)[0]
                    yield {"at": saved - done if left else n + shown, "done": done,
                           "pixels": pixels[:, ::-1] if left else pixels}
                    shown, due = done, time.monotonic() + BEAT
        finally:  # also where nobody listens any more
            pieces = save() if done > saved else []
        yield from pieces

    def in_mirror(self) -> np.ndarray:
        """The first columns in a mirror, encoded anew, unless the last step drew them there."""
        strip = mirrored(self.strip.columns[:CHUNK])
        tokens = self.drawn_in_mirror(self.strip.last())
        if not len(tokens):
            tokens = encode(self.model, strip)
        tokens = tokens[-len(strip):]
        strip["token"][-len(tokens):] = tokens  # no others are looked at
        return strip

    def drawn_in_mirror(self, edit: dict[str, Any]) -> np.ndarray:
        """Tokens (M, C) of the first columns in a mirror, if this edit drew them there."""
        tokens = np.frombuffer(base64.b64decode(edit.get("mirror", "")), np.float32)
        return tokens.reshape(-1, self.model.generator.channels)

    def turned(self, rows: np.ndarray, first: int,
               near: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Columns of mirrored `rows`, new from `first` on, painted `near`, as the strip has them."""
        rows[near[0]] = near[1]
        new, seen = len(rows) - first, mirrored(rows[max(0, first - CHUNK):])
        seen["token"] = encode(self.model, seen)
        seen["token"][new:] = self.strip.columns["token"][:len(seen) - new]
        count = min(len(seen), new + FADE)
        return np.arange(-new, count - new), seen[:count]

    def redraw(self, order: Order, seed: int) -> Iterator[Piece]:
        """Candidates for columns of the strip, which wait to be chosen."""
        n = len(self.strip.columns)
        span = order.start, order.end if order.later == "keep" else n
        near = span[0] < reach(self.model.generator.config) or span[1] + LOOK_AHEAD > n
        turn = span[1] if self.ring and near else 0  # a ring is turned until they are its end
        rows = self.prepared(self.strip.columns, range(*span), order.classes, seed)
        rows, start, end = np.roll(rows, -turn), (span[0] - turn) % n, span[1] - turn or n
        seeds, versions = range(seed, seed + order.candidates), []
        shown = due = 0
        self.used = max(self.used, seeds[-1])
        tokens, work = fill(self.model, rows, range(start, end), seeds,
                            SamplingOptions(**order.how), order.fit, turn > 0)
        for which, done in work:
            if self.stop.is_set():
                return
            if done == end - start:
                for k in which:
                    rows["token"][start:end] = tokens[k, start:end]
                    rows["seed"][start:end] = seeds[k]
                    places, near = painted(self.model, rows, start, end, turn > 0)
                    versions.append(((places + turn) % n, near))
                    yield {"at": int(versions[k][0][0]), "pixels": flat(near), "candidate": k,
                           "done": done}
            elif time.monotonic() >= due:
                seen = preview(self.model, tokens, start + shown, start + done)
                for k, pixels in enumerate(seen):
                    yield {"at": (start + turn + shown) % n, "pixels": pixels, "candidate": k,
                           "done": done}
                shown, due = done, time.monotonic() + BEAT
        self.waiting = {"order": order, "seed": seed, "span": span, "versions": versions,
                        "do": "turned" if turn else "redraw"}

    def prepared(self, rows: np.ndarray, gap: range, classes: Sequence[int],
                 seed: int) -> np.ndarray:
        """A copy that reaches to the gap's end, with class and seed of the gap's columns."""
        added = np.zeros(max(0, gap.stop - len(rows)), rows.dtype)
        added["label"] = rows["label"][-1] if len(rows) else UNKNOWN
        rows = np.concatenate((rows, added))
        labels = rows["label"][gap.start:gap.stop]
        if classes:
            labels[:] = classes
        if (labels == UNKNOWN).any():
            raise UserError("the strip does not say which class this is; choose one")
        rows["seed"][gap.start:gap.stop] = seed
        return rows

    def save(self, near: tuple[np.ndarray, np.ndarray], order: Order, seed: int,
             span: tuple[int, int], joined: bool = False, ring: bool = False,
             **more: Any) -> list[Piece]:
        """Put columns in their places, as one step; returns what is to be shown of it."""
        pieces, cuts = [], np.flatnonzero(np.diff(near[0]) != 1) + 1  # a ring's lie at both ends
        for places, rows in zip(*(np.split(part, cuts) for part in near)):
            at = max(int(places[0]), 0)
            take = max(0, min(len(self.strip.columns), int(places[-1]) + 1) - at)
            self.strip.edit(at, take, rows, joined or bool(pieces), span=span, seed=seed, ring=ring,
                            fit=order.fit, options=order.how, **{"do": order.do, **more})
            pieces.append({"at": int(places[0]), "pixels": flat(rows),
                           "columns": len(self.strip.columns)})
        return pieces

    # what takes no time --------------------------------------------------------------------------

    def candidate(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and columns of a candidate and of what it fades into."""
        if not k < len(self.waiting.get("versions", ())):
            raise UserError("there is no such candidate; draw the columns again")
        return self.waiting["versions"][k]

    def choose(self, k: int) -> None:
        """Put one of the candidates in its place."""
        near, w = self.candidate(k), self.waiting
        self.save(near, w["order"], w["seed"] + k, w["span"], ring=self.ring, do=w["do"])

    def new(self) -> None:
        """Begin an empty strip; undo brings the old one back."""
        self.strip.edit(0, len(self.strip.columns), self.strip.columns[:0])

    def photo(self, data: bytes) -> None:
        """Begin with a picture file; raises UserError for one that cannot be used."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
        except Exception:  # Pillow raises many kinds
            raise UserError(f"this is no picture ({', '.join(FORMATS)}) that can be read") from None
        if width * height > PIXELS or max(width, height) > SHAPE * min(width, height):
            raise UserError(f"a picture has at most {PIXELS} pixels, and one side at most {SHAPE} "
                            f"times the other; this one has {width}x{height}")
        shape = self.model.tokenizer.config
        pixels = load_columns(Upload(data), shape.image_size, shape.f, "left")
        rows = np.zeros(pixels.shape[3] // shape.f, self.strip.row)
        rows["pixels"] = cut(pixels, shape.f)
        rows["token"] = encode(self.model, rows)
        rows["label"] = rows["seed"] = UNKNOWN
        self.strip.edit(0, len(self.strip.columns), rows)

    def tokens(self) -> Tokens:
        """A token file's content; columns of no class have the one that they were read with."""
        last = self.strip.last()
        tokens = self.token_file(self.strip.columns, last)
        if "span" in last:
            tokens.labels[tokens.labels == UNKNOWN] = tokens.labels[0, last["span"][0]]
        return tokens

    def token_file(self, rows: np.ndarray, edit: dict[str, Any]) -> Tokens:
        """The same of the columns after an edit."""
        mirror = torch.tensor(self.drawn_in_mirror(edit))[None]
        return Tokens(*(torch.tensor(rows[name])[None] for name in ("token", "label", "seed")),
                      self.strip.last().get("options", {}), mirror if mirror.numel() else None)

    def command(self) -> str:
        """The command that draws the last columns again; it begins with one of the page's files."""
        last, n = self.strip.last(), len(self.strip.columns)
        if "span" not in last:
            return ""
        cfg = SampleConfig(checkpoint=self.checkpoint, save_tokens="again.pt", out="again.png")
        words = [command_line(cfg, SamplingOptions(**last["options"])), f"--seed {last['seed']}"]
        (first, end), do, fit = last["span"], last["do"], f" --fit {last['fit']}"
        if do == "left":
            words += [f"--continue-left-from {last.get('start', 'start.png')} --columns {end}",
                      self.classes(end, 0)]
        elif do == "ring" and last["ring"]:
            first = len(self.strip.before()[0])
            words += [f"--continue-from start.pt --ring{fit} --columns {n - first}",
                      self.classes(first, n)]
        else:
            fits = do == "turned" or do == "redraw" and end < n and last["fit"] > 1
            words += [f"--edit strip.pt{' --ring' * (do == 'turned')} --resample {first}-{end - 1}"
                      + fit * fits]
        return " ".join(words)

    def classes(self, first: int, end: int) -> str:
        """--classes of the columns first to end, or, where end < first, backwards."""
        labels = self.strip.columns["label"][min(first, end):max(first, end)]
        runs = groupby(labels[::-1] if end < first else labels)
        return "--classes " + ",".join(f"{label}:{len([*run])}" for label, run in runs)


class Upload(io.BytesIO):
    """A file's bytes, with a name for messages."""

    def __str__(self) -> str:
        return "the picture"
