"""Scrolls: pictures of any length in constant memory, written to disk while they are drawn.

A PNG's rows lie in the file one after another, each over the full width, so that a file cannot
grow to the right.  A scroll is therefore a folder:

    tile-000000.png, …   the picture in pieces of the same width, to be laid side by side
    overview.png         all of it, reduced and wrapped like text
    index.html           the tiles as one strip to scroll along, in any browser
    state.pt             what drawing continues from (`--resume`)

Every file is replaced as a whole, so that an interrupted scroll is a shorter scroll.
"""

from __future__ import annotations

import html
import math
import time
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

from equimini.sampler import Stream
from equimini.sampling.image_generator import ImageGenerator
from equimini.sampling.options import SamplingOptions
from equimini.sampling.tiled_decoder import TiledDecoder
from equimini.utils import checkpoint
from equimini.utils.checkpoint import map_tensors, weights_hash
from equimini.utils.errors import UserError, reading
from equimini.utils.files import remove_leftovers, replacing
from equimini.utils.images import save_png, to_uint8

OVERVIEW_WIDTH, GAP = 1600, 6  # of the overview, in pixels; between its rows
SAVE_SECONDS = 60  # between two states on disk, at most (and one with every tile)


class ScrollFolder:
    """The pictures of one scroll: pixels in, from left to right; tiles, overview, index out.

    tile, height, length: in pixels; caption: for the index.  Tiles that are there already (when
    a scroll continues) are shown in the overview.
    """

    def __init__(self, folder: Path, tile: int, height: int, length: int, caption: str,
                 done: int = 0) -> None:
        self.folder, self.tile, self.height, self.caption = folder, tile, height, caption
        self.done = done  # full tiles on disk
        self.rest = torch.zeros(1, 3, height, 0)  # pixels of the next tile
        rows = max(1, round(math.sqrt(0.6 * length / height)))  # wrapped to about 5:3
        self.scale = min(1.0, OVERVIEW_WIDTH * rows / length)
        self.row = math.ceil(length * self.scale / rows), max(1, round(height * self.scale))
        size = self.row[0], rows * (self.row[1] + GAP) - GAP
        self.overview = Image.new("RGB", size, "white")
        for i in range(done):
            with Image.open(self._path(i)) as picture:
                self._show(picture, i)

    def add(self, pixels: Tensor) -> bool:
        """Append (1, 3, H, w); returns whether that filled a tile."""
        self.rest = torch.cat((self.rest, pixels.cpu()), -1)
        before = self.done
        while self.rest.shape[-1] >= self.tile:
            self._write(self.rest[..., :self.tile], self.done)
            self.rest = self.rest[..., self.tile:].clone()
            self.done += 1
        if self.done > before:
            self._write_index(self.done, self.tile)
        return self.done > before

    def show_end(self, pixels: Tensor) -> None:
        """Write what is there of the next tiles, `pixels` behind it; they can be replaced."""
        parts = torch.cat((self.rest, pixels.cpu()), -1).split(self.tile, -1)
        for i, part in enumerate(parts, self.done):
            self._write(part, i)
        self._write_index(self.done + len(parts), parts[-1].shape[-1])

    def _path(self, i: int) -> Path:
        return self.folder / f"tile-{i:06d}.png"

    def _write(self, pixels: Tensor, i: int) -> None:
        picture = Image.fromarray(to_uint8(pixels)[0])
        save_png(picture, self._path(i))
        self._show(picture, i)

    def _show(self, picture: Image.Image, i: int) -> None:
        """Put tile i into the overview, where it may cross the ends of rows."""
        (row, high), start = self.row, i * self.tile
        x, end = (round(self.scale * p) for p in (start, start + picture.width))
        small = picture.resize((max(1, end - x), high), Image.Resampling.LANCZOS)
        for r in range(x // row, (x + small.width - 1) // row + 1):
            self.overview.paste(small, (x - r * row, r * (high + GAP)))

    def _write_index(self, tiles: int, last: int) -> None:
        """Overview and index of the first `tiles` tiles, the last one `last` pixels wide."""
        for i in range(tiles, tiles + 1000):  # of an end that was longer
            if not self._path(i).exists():
                break
            self._path(i).unlink()
        save_png(self.overview, self.folder / "overview.png")
        page = PAGE.replace("CAPTION", html.escape(self.caption)).replace("NUMBERS", (
            f"tiles = {tiles}, width = {self.tile}, last = {last}, height = {self.height}"))
        with replacing(self.folder / "index.html") as file:
            file.write(page.encode())


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>CAPTION</title>
<style>
  body { margin: 0; background: #181818; color: #ccc; font: 15px sans-serif; }
  p { margin: 12px; }
  #strip { display: flex; overflow-x: auto; height: 60vh; }
  #strip img { flex: none; height: 100%; width: auto; }
  #overview { max-width: calc(100% - 24px); margin: 12px; }
</style>
<p>CAPTION</p>
<div id="strip" tabindex="0"></div>
<img id="overview" src="overview.png" alt="overview">
<script>
  const NUMBERS;
  const strip = document.getElementById("strip");
  for (let i = 0; i < tiles; i++) {
    const tile = new Image();
    tile.loading = "lazy";  // only those in sight are read
    tile.width = i + 1 < tiles ? width : last;
    tile.height = height;
    tile.src = `tile-${String(i).padStart(6, "0")}.png`;
    strip.append(tile);
  }
  strip.addEventListener("wheel", event => {
    strip.scrollLeft += event.deltaX + event.deltaY;
    event.preventDefault();
  }, { passive: false });
</script>
</html>
"""


def load_state(folder: Path) -> dict[str, Any]:
    """The state of an interrupted or finished scroll; raises UserError if there is none."""
    if not (folder / "state.pt").is_file():
        raise UserError(f"{folder} holds no scroll to resume (it has no state.pt); start one "
                        "without --resume")
    return checkpoint.load(folder / "state.pt", "scroll")


def check_new(folder: Path) -> None:
    """Raise UserError if the folder holds a scroll already."""
    if (folder / "state.pt").exists() or (folder / "tile-000000.png").exists():
        raise UserError(f"{folder} holds a scroll already; add --resume to continue it, or "
                        "choose another folder with --out")


def scroll(model: ImageGenerator, labels: Tensor, seed: int, folder: Path,
           options: SamplingOptions, *, tile: int, caption: str = "",
           settings: dict[str, Any] | None = None, resumed: dict[str, Any] | None = None,
           stop: Callable[[], bool] = lambda: False,
           progress: Callable[[Iterable], Iterable] = iter) -> int:
    """Draw a scroll of one class per column into `folder`; returns how many columns are drawn.

    labels: (columns,) class numbers; tile: columns per tile; settings: kept in the state, for
    whoever resumes; resumed: `load_state`'s dict to continue from; stop: asked after every
    column, True ends the scroll there.
    Neither time nor memory per column depends on the columns before.  Interrupted and resumed
    gives the same files as in one go.  Raises UserError for a state that does not fit.
    """
    f, height = model.tokenizer.config.f, model.tokenizer.config.image_size
    decoder = TiledDecoder(model.decode_whole, f, model.windows)
    # guidance as of any picture longer than the training's: nothing may depend on the length
    stream = model.stream(labels[:1], [seed], max(len(labels), model.columns + 1), options)
    made_by = "".join(weights_hash(g.state_dict()) for g in model.generators(options))
    remove_leftovers(folder)
    if resumed:
        with reading(folder / "state.pt"):
            _check_resumed(resumed, made_by, labels, folder)
            on = map_tensors(lambda x: x.to(model.device), resumed)
            _take_up(stream, decoder, on, tile * f)
    pictures = ScrollFolder(folder, tile * f, height, len(labels) * f, caption,
                            resumed["done"] if resumed else 0)
    if resumed:
        pictures.rest = resumed["rest"]
    saved = time.monotonic()

    def save() -> None:
        checkpoint.save(folder / "state.pt", "scroll", {
            "sampler": stream.state(), "decoder": decoder.state(), "done": pictures.done,
            "rest": pictures.rest, "generator": made_by, "settings": settings or {}})
        if decoder.columns >= 2:
            pictures.show_end(decoder.finish())

    if not resumed:
        save()  # a kill beside the first tile would leave one that nothing continues
    for i in progress(range(stream.column, len(labels))):
        stream.set_class(labels[i:i + 1])
        filled = [pictures.add(pixels) for pixels in decoder.push(stream.draw()[:, None])]
        if any(filled) or time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
        if stop():
            break
    save()
    return stream.column


def _take_up(stream: Stream, decoder: TiledDecoder, resumed: dict[str, Any], tile: int) -> None:
    """Load the state, and draw and decode once, so that one that does not fit fails here."""
    stream.load_state(resumed["sampler"])
    vars(decoder).update({name: resumed["decoder"][name] for name in decoder.state()})
    behind, (*_, rest) = decoder.columns - decoder.start, resumed["rest"].shape
    if not (decoder.columns == stream.column and 0 <= behind < decoder.windows.length
            and resumed["rest"].shape[:2] == (1, 3) and rest < tile
            and len(stream.cache) in (0, len(stream.generator.blocks))):
        raise ValueError("its columns, pixels and tiles do not fit together")
    if decoder.columns >= 2:
        torch.cat((resumed["rest"], decoder.finish().cpu()), -1)
    drawn = stream.draw()
    if decoder.columns:
        torch.cat((decoder.tokens, drawn[:, None]), 1)
    stream.load_state(resumed["sampler"])


def _check_resumed(resumed: dict[str, Any], made_by: str, labels: Tensor, folder: Path) -> None:
    if resumed["generator"] != made_by:
        raise UserError(f"the scroll in {folder} was drawn by a generator with other weights, or "
                        "with another guide; give the --checkpoint and --guide it was begun with")
    drawn, done = resumed["sampler"]["column"], resumed["done"]
    counts = drawn, done, resumed["decoder"]["columns"], resumed["decoder"]["start"]
    if not all(type(count) is int for count in counts):
        raise ValueError(f"its columns and tiles are no whole numbers, but {counts}")
    if len(labels) < drawn:
        raise UserError(f"the scroll in {folder} has {drawn} columns already, more than "
                        f"--scroll {len(labels)}")
    for i in range(done):  # however many: the first that is missing ends it
        if not (folder / f"tile-{i:06d}.png").is_file():
            raise UserError(f"{folder} lacks tile-{i:06d}.png, which was written before")
