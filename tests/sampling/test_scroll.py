"""Scrolls: equal to a picture drawn at once, interrupted, resumed, prolonged."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.sampling.options import SamplingOptions
from equimini.sampling.scroll import ScrollFolder, check_new, load_state, scroll
from equimini.utils.errors import UserError
from equimini.utils.images import to_uint8

N, TILE, F = 90, 20, 4
HOW = SamplingOptions(cfg=2.0, cfg_schedule="constant", steps=2)
OPTIONS = dict(options=HOW, tile=TILE)


@pytest.fixture
def labels():
    return torch.tensor([0] * 30 + [2] * 30).repeat(3)


def whole(folder) -> np.ndarray:
    tiles = sorted(folder.glob("tile-*.png"))
    assert [p.name for p in tiles] == [f"tile-{i:06d}.png" for i in range(len(tiles))]
    return np.concatenate([np.asarray(Image.open(p)) for p in tiles], 1)


def files(folder) -> dict[str, bytes]:
    """What is in the folder; of state.pt, the tensors (a zip file holds a time)."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".pt"}
    state = load_state(folder)
    return {**found, "tokens": state["decoder"]["tokens"].numpy().tobytes(),
            "rest": state["rest"].numpy().tobytes()}


def after(columns):
    """A `stop` that is True from so many calls on."""
    calls = iter(range(10**9))
    return lambda: next(calls) + 1 >= columns


def test_a_scroll_is_the_picture_drawn_at_once(model, labels, tmp_path):
    assert scroll(model, labels[:N], 7, tmp_path, **OPTIONS) == N
    tokens = torch.stack(list(model.draw(labels[None, :N], [7], HOW)), 1)
    picture = to_uint8(model.decode(tokens))[0]
    assert np.array_equal(whole(tmp_path), picture)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "index.html", "overview.png", "state.pt", *(f"tile-00000{i}.png" for i in range(5))]
    numbers = re.search(r"const (.*);", (tmp_path / "index.html").read_text())[1]
    assert numbers == f"tiles = 5, width = {TILE * F}, last = {10 * F}, height = 32"
    # the overview: all of it, wrapped into rows at full size here, since it is so small
    overview = np.asarray(Image.open(tmp_path / "overview.png"))
    width = overview.shape[1]
    assert np.array_equal(overview[:32], picture[:, :width])
    assert np.array_equal(overview[38:70, :40], picture[:, width:width + 40])


@pytest.mark.parametrize("stops", ((1,), (33, 34, 60), (N - 1,)))
def test_interrupted_and_resumed_equals_uninterrupted(model, labels, tmp_path, stops):
    for name in "ab":
        (tmp_path / name).mkdir()
    scroll(model, labels[:N], 7, tmp_path / "a", **OPTIONS)
    resumed, done = None, 0
    for stop in stops:
        assert scroll(model, labels[:N], 7, tmp_path / "b", resumed=resumed,
                      stop=after(stop - done), **OPTIONS) == stop
        resumed, done = load_state(tmp_path / "b"), stop
        if stop > 1:  # a picture needs two columns
            assert whole(tmp_path / "b").shape == (32, stop * F, 3)
    scroll(model, labels[:N], 7, tmp_path / "b", resumed=resumed, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_killed_scroll_goes_on_from_its_last_state(model, labels, tmp_path):
    """Whatever was written after the state is written again."""
    for name in "ab":
        (tmp_path / name).mkdir()
    scroll(model, labels[:N], 7, tmp_path / "a", **OPTIONS)
    scroll(model, labels[:N], 7, tmp_path / "b", stop=after(50), **OPTIONS)
    state = load_state(tmp_path / "b")
    scroll(model, labels[:N], 7, tmp_path / "b", resumed=state, stop=after(35), **OPTIONS)
    (tmp_path / "b" / f".tile-000002.png.{2**22 + 1}.tmp").write_bytes(b"half a tile")
    scroll(model, labels[:N], 7, tmp_path / "b", resumed=state, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_scroll_killed_beside_its_first_tile_goes_on(model, labels, tmp_path, monkeypatch):
    """The first tile is there, and what it can be continued from is the beginning."""
    for name in "ab":
        (tmp_path / name).mkdir()
    scroll(model, labels[:N], 7, tmp_path / "a", **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScrollFolder, "_write_index", interrupt)
        scroll(model, labels[:N], 7, tmp_path / "b", **OPTIONS)
    assert (tmp_path / "b/tile-000000.png").exists()
    scroll(model, labels[:N], 7, tmp_path / "b", resumed=load_state(tmp_path / "b"), **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_finished_scroll_is_prolonged(model, labels, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    scroll(model, labels, 7, tmp_path / "a", **OPTIONS)
    scroll(model, labels[:N], 7, tmp_path / "b", **OPTIONS)
    scroll(model, labels, 7, tmp_path / "b", resumed=load_state(tmp_path / "b"), **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_state_does_not_grow(model, labels, tmp_path):
    sizes, resumed = [], None
    for stop in (60, 60, 60):
        scroll(model, labels, 7, tmp_path, resumed=resumed, stop=after(stop), **OPTIONS)
        resumed = load_state(tmp_path)
        pixels = resumed["rest"].nbytes + resumed["decoder"]["tail"].nbytes
        sizes.append((tmp_path / "state.pt").stat().st_size - pixels)
        assert resumed["decoder"]["tokens"].shape[1] <= model.windows.length
        assert resumed["rest"].shape[-1] < TILE * F
        assert resumed["decoder"]["tail"].shape[-1] <= model.windows.overlap * F
    tokens = model.windows.length * 6 * 4  # bytes; the number of columns kept varies
    assert max(sizes) - min(sizes) <= tokens


def test_folders_that_do_not_serve(model, labels, tmp_path):
    with pytest.raises(UserError, match="no scroll to resume"):
        load_state(tmp_path)
    check_new(tmp_path)
    scroll(model, labels[:N], 7, tmp_path, stop=after(50), **OPTIONS)
    with pytest.raises(UserError, match="add --resume"):
        check_new(tmp_path)
    state = load_state(tmp_path)
    with pytest.raises(UserError, match="50 columns already"):
        scroll(model, labels[:40], 7, tmp_path, resumed=state, **OPTIONS)
    (tmp_path / "tile-000000.png").unlink()
    with pytest.raises(UserError, match="lacks tile-000000.png"):
        scroll(model, labels, 7, tmp_path, resumed=state, **OPTIONS)
    model.generator.no_class.data += 1
    with pytest.raises(UserError, match="other weights"):
        scroll(model, labels, 7, tmp_path, resumed=state, **OPTIONS)


def test_a_caption_cannot_break_the_page(model, labels, tmp_path):
    scroll(model, labels[:8], 7, tmp_path, caption="<script>alert(1)</script>", **OPTIONS)
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page
