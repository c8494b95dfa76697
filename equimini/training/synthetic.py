"""Landscapes drawn by code: built-in training data for those who have no folder of pictures.

`landscape` shows a window of an endless scroll. Everything along x is laid out by noise on integer
lattices: a hash of (key, cell number) gives each cell its value, and the lattice is shifted by a
random phase. So no place is special and all statistics are the same at every x, which is what an
equivariant model of columns supposes. `with_object` breaks this on purpose: one object in the
middle of a calm background.

Lengths are in picture heights (y from 0, the top, to 1), so a larger picture shows the same scene
in finer detail. Arrays that vary along x meet only + - * / sqrt and comparisons: these are
correctly rounded, so a pixel has the same bits in whichever window it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple

import numpy as np

CLASSES: tuple[str, ...] = ("mountains", "forest", "sea", "desert")
OBJECT_CLASSES: tuple[str, ...] = ("balloon", "house", "ball")
_LOW32, _MASK64 = 2**32 - 1, 2**64 - 1
_CELL, _ROW = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _values(key: int, first: int, count: int, rows: int = 1) -> np.ndarray:
    """Hash (splitmix64) of `count` cells from `first` on, in each row: (rows, count) in [0, 1)."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(first & _MASK64)) * _CELL
    z = z + (np.arange(rows, dtype=np.uint64) * _ROW + np.uint64(key))[:, None]
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _rgb(r: float, g: float, b: float) -> np.ndarray:
    return np.array([r, g, b], np.float32)[:, None, None]


def _smooth(t: np.ndarray) -> np.ndarray:
    return t * t * (3 - 2 * t)


def _ramp(t: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(t, 0), 1)                      # np.clip, with less overhead


class _Canvas:
    """A window of columns, painted back to front: `rgb` is (3, height, width) float32 in 0..1.

    All random numbers of a scroll are drawn in one order from `rng`, whatever the window.
    """

    def __init__(self, height: int, width: int, x0: int, rng: np.random.Generator) -> None:
        self.margin = max(1, round(height / 64))                # on the left, for `slope`; cropped
        self.height, self.width, self.x0 = height, width + self.margin, x0 - self.margin
        self.rng = rng
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.columns = np.arange(self.width, dtype=np.int64)
        self.rgb = np.zeros((3, height, self.width), np.float32)

    def pixels(self) -> np.ndarray:
        rgb = (_ramp(self.rgb[:, :, self.margin:]) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(rgb.transpose(1, 2, 0))

    def draw(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def between(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + self.rng.random() * (b - a)

    def key(self) -> int:
        return int(self.rng.integers(_MASK64, dtype=np.uint64))

    def lattice(self, freq: float, key: int) -> tuple[int, np.ndarray, np.ndarray]:
        """First cell's number, then each column's cell, counted from it, and place in it (0..1).

        There are `freq` cells a height. Fixed point with 32 fractional bits on Python's integers:
        exact for any x0. The phase is the key's high half; being uniform over a cell, it makes
        the noise stationary (a lattice at rest would have less variance between its points).
        """
        half_pixel = round(freq * 2**31 / self.height)
        start = (2 * self.x0 + 1) * half_pixel + (key >> 32)
        at = self.columns * (2 * half_pixel) + (start & _LOW32)
        return start >> 32, at >> 32, ((at & _LOW32) >> 8).astype(np.float32) * np.float32(2**-24)

    def octaves(self, freq: float, count: int) -> Iterator[tuple[float, int, float]]:
        """(frequency, key, weight) of `count` octaves, less those finer than 2 pixels a cell."""
        key = self.key()
        for o in range(count):
            if o == 0 or freq * 2**o <= self.height / 2:
                yield freq * 2**o, (key + o * int(_MIX1)) & _MASK64, 0.5**o / (1 - 0.5**count)

    def line(self, freq: float, count: int = 4, smooth: bool = True) -> np.ndarray:
        """1-D value noise: (width,) in -1..1, `count` octaves from `freq` cells a height on."""
        total = 0.0
        for f, key, weight in self.octaves(freq, count):
            first, cell, t = self.lattice(f, key)
            v = _values(key, first, int(cell[-1]) + 2)[0] * weight - weight / 2
            total = total + v[cell] + (_smooth(t) if smooth else t) * (v[1:] - v[:-1])[cell]
        return total

    def field(self, freq: float, v: np.ndarray, count: int = 3) -> np.ndarray:
        """2-D value noise: (rows, width) in -1..1; v >= 0, (rows, 1): each row's lattice place."""
        total = 0.0
        for o, (f, key, weight) in enumerate(self.octaves(freq, count)):
            first, cell, t = self.lattice(f, key)
            row = (v[:, 0] * 2**o).astype(np.int64)
            s = _smooth(v * 2**o - row[:, None].astype(np.float32))
            n = _values(key, first, int(cell[-1]) + 2, int(row.max()) + 2) * weight - weight / 2
            n = n[:, cell] + _smooth(t) * (n[:, 1:] - n[:, :-1])[:, cell]
            total = total + n[row] + s * (n[1:] - n[:-1])[row]
        return total

    def cells(self, freq: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Per column: x from its cell's centre, in heights (width,); draws (count, width)."""
        key = self.key()
        first, cell, t = self.lattice(freq, key)
        return (t - 0.5) / freq, _values(key, first, int(cell[-1]) + 1, count)[:, cell]

    def slope(self, f: np.ndarray) -> np.ndarray:
        """Rise of f along x, per height."""
        rise = np.zeros_like(f)
        rise[..., self.margin:] = f[..., self.margin:] - f[..., :-self.margin]
        return rise * (self.height / self.margin)

    def edge(self, inside: np.ndarray) -> np.ndarray:
        """Coverage, soft over one pixel, of points that lie `inside` (heights) an outline."""
        return _ramp(inside * self.height + 0.5)

    def paint(self, cover: np.ndarray, colour: np.ndarray) -> None:
        self.rgb += cover * (colour - self.rgb)


class _Light(NamedTuple):
    """Colours, (3, 1, 1), of the sky at the top and the horizon, and of the light on things."""

    zenith: np.ndarray
    horizon: np.ndarray
    tint: np.ndarray

    def on(self, colour: np.ndarray, far: float = 0.0) -> np.ndarray:
        """The colour in this light through haze: far 0 is clear, 1 has the horizon's colour."""
        return colour * self.tint * (1 - far) + self.horizon * far


_TIMES = tuple(_Light(*(_rgb(*colour) for colour in colours)) for colours in (
    ((.20, .46, .84), (.76, .88, .96), (1.0, 1.0, 1.0)),        # noon
    ((.42, .62, .82), (.99, .90, .76), (1.0, .94, .84)),        # morning
    ((.30, .38, .60), (1.0, .66, .42), (.98, .74, .60)),        # sunset
    ((.32, .35, .60), (.96, .72, .72), (.80, .72, .82)),        # dusk
    ((.52, .59, .66), (.84, .86, .88), (.80, .83, .86)),        # overcast
    ((.36, .58, .72), (1.0, .88, .58), (1.0, .88, .66)),        # golden hour
))


def _sky(c: _Canvas, level: float, clouds: float = 1.0) -> _Light:
    """Paint a sky, at some time of day, with its horizon at `level`; give its light."""
    a, b = (_TIMES[i] for i in c.rng.integers(len(_TIMES), size=2))
    share = c.draw(0, 0.6)
    light = _Light(*(p + share * (q - p) for p, q in zip(a, b)))
    t = _ramp(c.y / level)
    c.rgb += light.zenith + t * np.sqrt(t) * (light.horizon - light.zenith)
    view = c.rgb[:, :max(1, int(level * c.height))]
    # Rows of the lattice crowd towards the horizon, as clouds seen from below do.
    v = c.draw(0.9, 1.4) / (level + 0.25 - c.y[:view.shape[1]])
    n = c.field(c.draw(1.0, 1.8), v, 4)
    cover = clouds * _smooth(_ramp((n - c.draw(-0.15, 0.4)) * 2.2))
    shaded, bright = light.horizon * 0.55 + light.zenith * 0.3, light.tint * 0.5 + 0.5
    view += cover * (shaded + _ramp(0.75 - 0.6 * n) * (bright - shaded) - view)
    return light


def _ground(c: _Canvas, top: np.ndarray, colour: np.ndarray, shade: np.ndarray | float = 0.0,
            mist: np.ndarray | None = None) -> None:
    """All below the line `top`; `shade` > 0 lightens it, < 0 darkens; `mist` fills the valley."""
    colour = colour * (1 + shade)
    if mist is not None:
        colour = colour + _smooth(_ramp((c.y - top) * 2.2)) * (mist - colour)
    c.paint(c.edge(c.y - top), colour)


def _relief(c: _Canvas, top: np.ndarray, freq: float, rows: float, rough: float) -> np.ndarray:
    """Shade of ground lit from the left, (height, width) in -0.5..0.5: the crest's and its own."""
    crest = c.slope(top) * _ramp(1 - (c.y - top) * 3)
    own = c.slope(c.field(freq, rows * c.y)) * (rough / freq)
    return np.minimum(np.maximum(own - crest * 0.5, -0.5), 0.5)


def _water(c: _Canvas, level: float, deep: np.ndarray, mirror: float) -> None:
    """From `level` down: what is above, mirrored on waves that look finer further away."""
    r = max(1, round(level * c.height))
    if r >= c.height:                                           # no row left for it
        return
    depth = c.y[:c.height - r]
    v, near = 20 - 6.4 / (depth + 0.33), _ramp(depth * 3)
    waves = (1 - near) * c.field(5, v) + near * c.field(2.2, v, 4)
    down = _ramp(depth + waves * (0.02 + 0.12 * depth)) * c.height
    seen = c.rgb[:, np.maximum(r - 1 - down.astype(np.int64), 0), c.columns]
    c.rgb[:, r:] = (deep + mirror * (seen - deep)) * (1 + 0.25 * waves) + 0.04 * waves


def _firs(c: _Canvas, top: np.ndarray, size: float, colour: np.ndarray, gaps: float) -> None:
    """Firs up to `size` high whose feet stand on the line `top`; a share `gaps` is missing."""
    dx, (present, tall, place, tone) = c.cells(c.draw(2.2, 2.8) / size, 4)
    dx = np.abs(dx - (place - 0.5) * (0.1 * size))
    tall = size * (0.55 + 0.45 * tall)
    down = c.y - top + tall                                     # from the tip
    bough = down * (7 / size)
    half = np.minimum(down * 0.2 * (0.7 + 0.6 * (bough - np.floor(bough))), 0.2 * size)
    cover = c.edge(half - dx) * (present >= gaps) * (down < tall * 1.15)
    c.paint(cover, colour * (0.8 + 0.35 * tone))


def _mountains(c: _Canvas) -> None:
    light = _sky(c, 0.65)
    rock = c.between(_rgb(.36, .34, .38), _rgb(.46, .36, .28))
    green = c.between(_rgb(.16, .30, .14), _rgb(.36, .34, .14))
    rugged = c.draw(0.22, 0.34)
    for far, level in ((0.62, 0.40), (0.25, 0.52)):
        top = level + rugged * (np.abs(c.line(c.draw(1.2, 1.8), 5, False)) * 2 - 0.8)
        relief = _relief(c, top, 3, 4, 0.35)
        _ground(c, top, light.on(rock, far), relief, light.on(rock, min(1, far + 0.3)))
        snow = c.edge(c.y - top) * _ramp((level - 0.06 - c.y + relief * 0.16) * 14)
        c.paint(snow, light.on(_rgb(.97, .98, 1.), far * 0.8) * (1 + 0.5 * np.minimum(relief, 0)))
    top = c.draw(0.70, 0.76) + 0.10 * c.line(1.2, 3)
    _ground(c, top, light.on(green, 0.15), 0.3 * c.field(3, 14 * c.y, 4))
    _firs(c, top + 0.02, 0.09, light.on(green * 0.7, 0.1), 0.3)
    if c.rng.random() < 0.5:
        _water(c, c.draw(0.76, 0.82), light.zenith * 0.8, 0.7)


def _forest(c: _Canvas) -> None:
    light = _sky(c, 0.6)
    tree = c.between(_rgb(.05, .20, .16), _rgb(.20, .27, .08))
    base, rise = c.draw(0.28, 0.40), c.draw(0.08, 0.16)
    _ground(c, base - 0.02 + rise * c.line(0.8, 3), light.on(tree, 0.75), mist=light.horizon)
    for k, far in enumerate((0.55, 0.34, 0.16, 0.0)):
        top, colour = base + 0.13 + 0.155 * k + rise * c.line(0.9, 2), light.on(tree, far)
        for gaps in (0.0, 0.2):
            _firs(c, top + 0.02, 0.10 + 0.075 * k, colour * (1 - 0.5 * gaps), gaps)
        _ground(c, top, colour, mist=light.on(tree, far + 0.35) if k < 3 else None)


def _sea(c: _Canvas) -> None:
    level = c.draw(0.38, 0.55)
    light = _sky(c, level)
    rock = light.on(c.between(_rgb(.20, .26, .20), _rgb(.34, .28, .24)), 0.45)
    top = level + 0.05 - c.draw(0.05, 0.22) * _ramp(c.line(c.draw(0.6, 1.0), 5) * 2)
    _ground(c, top, rock, _relief(c, top, 6, 10, 0.15))
    deep = c.between(_rgb(.02, .22, .40), _rgb(.04, .42, .44)) * light.tint
    _water(c, level, deep, c.draw(0.25, 0.5))
    if c.rng.random() < 0.6:
        sand = light.on(c.between(_rgb(.93, .84, .65), _rgb(.80, .68, .50)))
        shore = c.y - c.draw(0.80, 0.90) - 0.08 * c.line(0.9, 3)
        c.paint(_ramp((shore + 0.06) * 12) * 0.5, deep + 0.25)  # shallows, foam, beach
        c.paint(c.edge(shore + 0.025), _rgb(.96, .97, .97) * light.tint)
        c.paint(c.edge(shore), sand * (1 + 0.1 * c.field(5, 12 * c.y)))


def _desert(c: _Canvas) -> None:
    light = _sky(c, 0.5)
    sand = c.between(_rgb(.93, .70, .42), _rgb(.84, .50, .30))
    top = c.draw(0.36, 0.44) + 0.06 * c.line(1.0, 4, False)
    _ground(c, top, light.on(sand * 0.75, 0.55))
    level = c.draw(0.45, 0.50)
    for k, far in enumerate((0.35, 0.15, 0.0)):
        top = level + 0.18 * k + (0.12 + 0.10 * k) * (
            2 * np.abs(c.line(c.draw(1.1, 1.5) * (1 - 0.2 * k), 2)) - 0.5)
        ripples = 0.10 * c.field(2.5, c.y * (24 - 5 * k), 2)
        _ground(c, top, light.on(sand, far), _relief(c, top, 1.2, 2, 0.05) + ripples)


def _objects(c: _Canvas, kind: str, x: np.ndarray, r: float, light: _Light, ground: float) -> None:
    """One object of radius about r (heights) at x = 0, in the air or on the ground."""
    a, b = (light.on(_rgb(*c.rng.permutation((.92, c.draw(.2, .7), .12)))) for _ in range(2))
    if kind == "balloon":
        y = c.y - c.draw(0.36, 0.44)
        ball = r - np.sqrt(x * x + y * y * np.where(y > 0, 0.7, 1))
        gore = np.floor(3.5 + 3.5 * x / np.sqrt(np.maximum(r * r - y * y * 0.7, 0.02 * r * r))) % 2
        ropes = np.maximum(np.abs(np.abs(x) - 0.15 * r) - 0.02 * r, np.abs(y - 1.3 * r) - 0.3 * r)
        c.paint(c.edge(-ropes), b * 0.5)
        c.paint(c.edge(ball), (a + gore * (b - a)) * (1 - 0.25 * (x + y) / r))
        basket = np.maximum(np.abs(x) - 0.2 * r, np.abs(y - 1.7 * r) - 0.15 * r)
        c.paint(c.edge(-basket), light.on(_rgb(.42, .28, .16)))
    elif kind == "house":
        y = c.y - ground - 0.08 + 0.9 * r                      # from the top of the walls
        side = np.abs(x)
        c.paint(c.edge(-np.maximum(side - 0.9 * r, np.maximum(-y, y - 0.9 * r))), a * 0.5 + 0.4)
        c.paint(c.edge(-np.maximum(side - 1.1 * r - y * 1.3, y)), b * 0.8)
        c.paint(c.edge(-np.maximum(side - 0.17 * r, np.abs(y - 0.63 * r) - 0.27 * r)), b * 0.4)
        panes = np.maximum(np.abs(side - 0.55 * r), np.abs(y - 0.45 * r)) - 0.15 * r
        c.paint(c.edge(-panes), light.on(_rgb(.25, .35, .45)))
    else:
        y = c.y - ground - 0.08 + r
        c.paint(0.4 * _ramp(3 - 3 * (x / r) ** 2 - 3 * ((y - r) / (0.2 * r)) ** 2), a * 0.1)
        stripe = c.edge(0.3 * r - np.abs(y + 0.4 * x))
        coat = (a + stripe * (b - a)) * (1 - 0.35 * (x + y) / r)
        c.paint(c.edge(r - np.sqrt(x * x + y * y)), coat)


_PAINTERS = dict(zip(CLASSES, (_mountains, _forest, _sea, _desert), strict=True))


def _canvas(kinds: tuple[str, ...], index: int, label: int, height: int, width: int, seed: int,
            x0: int) -> _Canvas:
    """Check the arguments; a blank canvas whose rng is keyed by them, less the window."""
    for name, value, low, high in (("index", index, 0, 2**32), ("seed", seed, 0, 2**32),
                                   ("label", label, 0, len(kinds)), ("height", height, 1, 2**16),
                                   ("width", width, 1, 2**24), ("x0", x0, -np.inf, np.inf)):
        if not isinstance(value, Integral) or not low <= value < high:
            raise ValueError(f"{name} is {value!r}; takes an integer, {low} <= {name} < {high}")
    words = (int(seed), int(index), int(label), int(kinds is CLASSES))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    return _Canvas(int(height), int(width), int(x0), rng)


def landscape(index: int, *, label: int, height: int = 64, width: int = 64, seed: int = 0,
              x0: int = 0) -> np.ndarray:
    """Columns x0 ... x0 + width - 1 of scroll `index` of class `CLASSES[label]`.

    Returns (height, width, 3) uint8. A column depends on (seed, index, label, height, x) only, so
    windows of one scroll agree, bit for bit, where they overlap; x0 is any integer.
    Raises ValueError if index or seed is outside [0, 2**32), label is not a class's number, or
    height or width is < 1.
    """
    c = _canvas(CLASSES, index, label, height, width, seed, x0)
    _PAINTERS[CLASSES[label]](c)
    return c.pixels()


def with_object(index: int, *, label: int, height: int = 64, width: int = 64,
                seed: int = 0) -> np.ndarray:
    """Non-uniform data: one `OBJECT_CLASSES[label]` near the centre, nothing else along x.

    Returns (height, width, 3) uint8; size, colours and light vary with (seed, index, label).
    Raises ValueError as `landscape` does.
    """
    c = _canvas(OBJECT_CLASSES, index, label, height, width, seed, 0)
    ground, r = c.draw(0.62, 0.72), c.draw(0.13, 0.24) * min(1, width / height)
    light = _sky(c, ground, clouds=0.0)
    soil = light.on(c.between(_rgb(.36, .52, .22), _rgb(.80, .66, .44)))
    c.paint(c.edge(c.y - ground), soil * (1.3 - 0.4 * c.y))
    x = (c.columns - c.margin + 0.5 - width / 2) / height + c.draw(-0.03, 0.03)
    _objects(c, OBJECT_CLASSES[label], x.astype(np.float32), r, light, ground)
    return c.pixels()
