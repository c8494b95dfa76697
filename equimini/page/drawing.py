"""What the page's buttons do: an order in, pieces of the picture out while they are drawn."""

from __future__ import annotations

import io
import time
import typing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any, Iterator

import numpy as np
import torch
from PIL import Image

from equimini.config import Checked, flag
from equimini.page.history import History
from equimini.sampler import SOLVERS
from equimini.sampling.commands import QUICK, SampleConfig, command_line, recorded
from equimini.sampling.edit import FADE, UNKNOWN, Tokens
from equimini.sampling.fit import LOOK_AHEAD, reach
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.strip import (cut, draw_columns, encode, flat, image, painted, preview,
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
Piece = dict[str, Any]  # "at" and "pixels" (H, w, 3); "candidate", "done", "columns"


@dataclass(frozen=True)
class Order(Checked):
    """What to draw, and how; the page sends it as JSON."""

    do: str = flag("right", "", choices=("right", "left", "ring", "redraw"))
    columns: int = flag(16, "to add", min=1, max=4096)
    start: int = flag(0, "first column to draw again", min=0)
    end: int = flag(0, "behind the last one", min=0)
    later: str = flag("keep", "what lies behind them", choices=("keep", "draw"))
    classes: tuple = flag((), "class numbers of the drawn columns; none: as they are", min=0)
    candidates: int = flag(4, "for columns drawn again", min=1, max=8)
    fit: int = flag(4, "drawings of which one that fits is taken", min=1, max=64)
    seed: int = flag(-1, "-1: one that nothing was drawn with", min=-1, max=2**53)
    cfg: float = flag(2.5, "", min=0, max=100)
    solver: str = flag("auto", "", choices=("auto", *SOLVERS))
    steps: int = flag(0, "", min=0, max=1000)
    temperature: float = flag(1.0, "", min=0, max=10)

    @property
    def options(self) -> SamplingOptions:
        """Guidance does not depend on how long a strip is or becomes."""
        return SamplingOptions(cfg=self.cfg, cfg_schedule="constant", solver=self.solver,
                               steps=self.steps, temperature=self.temperature)


def read_order(values: dict[str, Any]) -> Order:
    """Raises UserError for a field that is unknown, of another kind or out of range."""
    kinds = typing.get_type_hints(Order) | {"classes": list}
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"unknown field {name[:50]!r}; an order has {', '.join(kinds)}")
        good = [type(value)] if type(value) is not int else [int, float]
        if kinds[name] not in good or name == "classes" and {*map(type, value)} - {int}:
            raise UserError(f"{name} must be {kinds[name].__name__}, got {str(value)[:50]}")
    try:
        return Order(**values | {"classes": tuple(values.get("classes", ()))})
    except ValueError as error:
        raise UserError(str(error)[:200]) from None


class Studio:
    """One strip and the model that draws it; public methods are what the page asks for."""

    def __init__(self, model: ImageGenerator, folder: Path, checkpoint: str = DRAWN_WITH) -> None:
        self.model, self.checkpoint, self.stop = model, checkpoint, Event()
        claim(folder, {"tokenizer": latents_hash(model.tokenizer)}, "a strip",
              "give the --checkpoint that it was drawn with, or choose another --out")
        self.strip = History(folder, row_type(model))
        self.reach = reach(model.generator.config)
        self.waiting: dict[str, Any] = {}  # candidates to choose from
        self.used = -1  # the highest seed of a candidate
        self.beat = 0.0  # when the next preview is due

    def state(self) -> dict[str, Any]:
        """The strip, and what may be asked for."""
        strip, shape = self.strip, self.model.tokenizer.config
        scales = self.model.generator.head.scales
        return {
            "version": strip.version, "f": shape.f, "height": shape.image_size,
            "classes": self.model.classes, "labels": strip.columns["label"].tolist(),
            "undo": strip.done > 0, "redo": strip.done < len(strip.edits), "ring": self.ring,
            "mirrored": self.model.mirrored, "scales": scales, "quick": {} if scales else QUICK,
            "command": self.command(), "seed": self.next_seed(),
            "checkpoint": Path(self.checkpoint).stem, "candidates": {
                k: self.waiting[k] for k in ("at", "span", "count")} if self.choosing else None}

    @property
    def choosing(self) -> bool:
        """Whether candidates for the present strip wait."""
        return self.waiting.get("version") == self.strip.version

    @property
    def ring(self) -> bool:
        """Whether the strip's end joins its beginning."""
        return bool(self.strip.last().get("ring"))

    def next_seed(self) -> int:
        """One that no column and no candidate was drawn with."""
        return max(self.used, int(self.strip.columns["seed"].max(initial=-1))) + 1

    def check(self, order: Order) -> None:
        """Raise UserError for an order that the present strip does not allow."""
        n, drawn, head = len(self.strip.columns), order.columns, self.model.generator.head
        if order.do == "redraw":
            if not order.start < order.end <= n:
                raise UserError(f"start and end must lie in the strip, which has {n} columns, got "
                                f"{order.start} and {order.end}")
            drawn = self.end(order) - order.start
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
        order.options.resolved(head)

    def end(self, order: Order) -> int:
        """Behind the last column that is drawn again."""
        return order.end if order.later == "keep" else len(self.strip.columns)

    def draw(self, order: Order) -> Iterator[Piece]:
        """Carry out an order; whole columns that were added stay, however it ends."""
        self.check(order)
        self.waiting, self.beat = {}, 0.0
        seed = self.next_seed() if order.seed < 0 else order.seed
        yield from (self.redraw if order.do == "redraw" else self.grow)(order, seed)

    def grow(self, order: Order, seed: int) -> Iterator[Piece]:
        """Columns at the end, or at the beginning: those that follow the strip seen in a mirror."""
        left = order.do == "left"
        for drawn in range(0, order.columns, CHUNK):
            upto = min(order.columns, drawn + CHUNK)
            mine = seed + drawn // CHUNK * left  # to the left, each chunk has the same places
            old = self.mirrored() if left else self.strip.columns
            given, ring = len(old), order.do == "ring" and upto == order.columns
            classes = (order.classes[::-1] if left else order.classes)[drawn:upto]
            rows = self.prepared(old, given, given + upto - drawn, classes, mine)
            fresh, shown, done = rows["token"][None, given:], 0, 0
            try:
                for _, done in draw_columns(self.model, rows, given, fresh, [mine], order.options,
                                            order.fit, ring):
                    if self.due():
                        pixels = self.shown(old, fresh[0, :done], shown)
                        yield {"at": -done if left else given + shown, "done": drawn + done,
                               "pixels": pixels[:, ::-1] if left else pixels}
                        shown = done
                    if self.stop.is_set():
                        break
            finally:  # also where nobody listens any more
                pieces, rows = [], rows[:given + done]
                if done:
                    ring &= done == upto - drawn
                    near = painted(self.model, rows, given, len(rows), ring)
                    span = (0, done) if left else (given - drawn, given + done)
                    pieces = self.save(self.turned(rows, near, done) if left else near, order, mine,
                                       span, drawn > 0, ring)
            yield from pieces
            if self.stop.is_set():
                break

    def mirrored(self) -> np.ndarray:
        """The strip's beginning, seen in a mirror: its pixels are encoded anew."""
        near = self.strip.columns[:CHUNK][::-1].copy()
        near["pixels"] = near["pixels"][:, :, ::-1]
        near["token"] = encode(self.model, image(near))
        return near

    def turned(self, rows: np.ndarray, near: tuple[np.ndarray, np.ndarray],
               done: int) -> tuple[np.ndarray, np.ndarray]:
        """New columns at the end of mirrored `rows`, painted `near`, as they stand in the strip."""
        rows[near[0]] = near[1]
        rows = rows[::-1].copy()
        rows["pixels"] = rows["pixels"][:, :, ::-1]
        rows["token"] = encode(self.model, image(rows))
        rows["token"][done:] = self.strip.columns["token"][:len(rows) - done]
        count = min(len(rows), done + FADE)
        return np.arange(-done, count - done), rows[:count]

    def redraw(self, order: Order, seed: int) -> Iterator[Piece]:
        """Candidates for columns of the strip, which wait to be chosen."""
        n, start, end = len(self.strip.columns), order.start, self.end(order)
        seeds = range(seed, seed + order.candidates)
        near = order.start < self.reach or end + LOOK_AHEAD > n
        turn = end if self.ring and near else 0  # a ring is turned until these columns are its end
        rows = self.prepared(self.strip.columns, start, end, order.classes, seed)
        rows, start, end = np.roll(rows, -turn), (start - turn) % n, end - turn or n
        fresh = np.empty((len(seeds), end - start, rows["token"].shape[1]), np.float32)
        self.used, shown, versions = max(self.used, seeds[-1]), 0, []
        for which, done in draw_columns(self.model, rows, start, fresh, seeds, order.options,
                                        order.fit, turn > 0):
            if self.stop.is_set():
                return
            if done < end - start and self.due():
                for k in which:
                    yield {"at": (start + turn + shown) % n, "candidate": k, "done": done,
                           "pixels": self.shown(rows[:start], fresh[k, :done], shown)}
                shown = done
            for k in which if done == end - start else ():
                rows["token"][start:end], rows["seed"][start:end] = fresh[k], seeds[k]
                places, near = painted(self.model, rows, start, end, turn > 0)
                versions.append(((places + turn) % n, near))
                yield {"at": int(versions[k][0][0]), "pixels": flat(near), "candidate": k,
                       "done": done}
        self.waiting = {"version": self.strip.version, "at": int(versions[0][0][0]), "order": order,
                        "span": (order.start, self.end(order)), "count": len(seeds), "seed": seed,
                        "versions": versions, "do": "turned" if turn else "redraw"}

    def prepared(self, rows: np.ndarray, start: int, end: int, classes: tuple,
                 seed: int) -> np.ndarray:
        """A copy that reaches to `end`, with class and seed of the columns from `start` on."""
        added = np.zeros(max(0, end - len(rows)), rows.dtype)
        added["label"] = rows["label"][-1] if len(rows) else UNKNOWN
        rows = np.concatenate((rows, added))
        if classes:
            rows["label"][start:end] = classes
        if (rows["label"][start:end] == UNKNOWN).any():
            raise UserError("the strip does not say which class this is; choose one")
        rows["seed"][start:end] = seed
        return rows

    def due(self) -> bool:
        """Whether to show what was drawn: the first column at once."""
        return time.monotonic() >= self.beat

    def shown(self, before: np.ndarray, fresh: np.ndarray, shown: int) -> np.ndarray:
        """`preview`, and the time of the next one."""
        pixels = preview(self.model, before, fresh, shown)
        self.beat = time.monotonic() + BEAT
        return pixels

    def save(self, near: tuple[np.ndarray, np.ndarray], order: Order, seed: int,
             span: tuple[int, int], joined: bool = False, ring: bool = False,
             do: str = "") -> list[Piece]:
        """Put columns in their places, as one step; returns what is to be shown of it."""
        pieces, cuts = [], np.flatnonzero(np.diff(near[0]) != 1) + 1  # a ring's lie at both ends
        for places, rows in zip(*(np.split(part, cuts) for part in near)):
            at = max(int(places[0]), 0)
            take = max(0, min(len(self.strip.columns), int(places[-1]) + 1) - at)
            self.strip.edit(at, take, rows, joined or bool(pieces), do=do or order.do, span=span,
                            seed=seed, ring=ring, fit=order.fit, options=recorded(order.options))
            pieces.append({"at": int(places[0]), "pixels": flat(rows),
                           "columns": len(self.strip.columns)})
        return pieces

    # what takes no time --------------------------------------------------------------------------

    def candidate(self, k: int) -> np.ndarray:
        """Pixels of a candidate and of what it fades into."""
        if not self.choosing or not 0 <= k < self.waiting["count"]:
            raise UserError("there is no such candidate; draw the columns again")
        return flat(self.waiting["versions"][k][1])

    def choose(self, candidate: int) -> None:
        """Put one of the candidates in its place."""
        self.candidate(candidate)
        w = self.waiting
        self.save(w["versions"][candidate], w["order"], w["seed"] + candidate, w["span"],
                  ring=self.ring, do=w["do"])

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
        rows["token"], rows["pixels"] = encode(self.model, pixels), cut(pixels, shape.f)
        rows["label"] = rows["seed"] = UNKNOWN
        self.strip.edit(0, len(self.strip.columns), rows)

    def tokens(self, rows: np.ndarray | None = None) -> Tokens:
        """A token file's content; columns of no class have the one that they were read with."""
        rows, last = self.strip.columns if rows is None else rows, self.strip.last()
        labels, seeds = torch.tensor(rows["label"])[None], torch.tensor(rows["seed"])[None]
        if "span" in last:
            labels[labels == UNKNOWN] = int(self.strip.columns["label"][last["span"][0]])
        return Tokens(torch.tensor(rows["token"])[None], labels, seeds, last.get("options", {}))

    def command(self) -> str:
        """The command that draws the last columns again; it begins with one of the page's files."""
        last, n = self.strip.last(), len(self.strip.columns)
        if "span" not in last:
            return ""
        first, end = last["span"]
        cfg = SampleConfig(checkpoint=self.checkpoint, save_tokens="again.pt", out="again.png")
        words = [command_line(cfg, SamplingOptions(**last["options"])), f"--seed {last['seed']}"]
        fit = f" --fit {last['fit']}"
        if last["do"] == "left":
            words += [f"--continue-left-from start.png --columns {end}", self.classes(end, 0)]
        elif last["ring"] and last["do"] == "ring":
            first = len(self.strip.before(step=True))
            words += [f"--continue-from start.pt --ring{fit} --columns {n - first}",
                      self.classes(first, n)]
        elif last["do"] == "turned":
            words += [f"--edit strip.pt --ring --resample {first}-{end - 1}{fit}"]
        else:
            fits = last["do"] == "redraw" and end < n and last["fit"] > 1
            words += [f"--edit strip.pt --resample {first}-{end - 1}" + fit * fits]
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
