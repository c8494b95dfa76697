"""Line plots: every curve is seen in the picture, and nothing fails without matplotlib."""

import math
import sys

import numpy as np
import pytest
from PIL import Image

from equimini.utils.plot import COLOURS, curves


def test_plots_show_their_curves(tmp_path):
    pytest.importorskip("matplotlib")
    curves(tmp_path / "a.png", {"one": [(1, 2), (2, 5), (3, math.nan)], "two": [(2, 3)],
                                "empty": []},
           "x", "y", "title", {"level": 4.0, "none": math.inf})
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.size == (720, 440)
    colours = {tuple(c) for c in np.asarray(image).reshape(-1, 3)}
    seen = [tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5)) in colours for colour in COLOURS]
    assert seen[:2] == [True, True] and seen[3] and not seen[4]  # both lines, and the level
    with pytest.raises(ValueError, match="finite point"):
        curves(tmp_path / "b.png", {"one": [(1, math.nan)]}, "x", "y", "title")


def test_without_matplotlib_a_report_names_what_was_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = curves(tmp_path / "curve.png", {"one": [(1, 2)]}, "x", "y", "title")
    assert found.startswith("curve.png was left out") and "equimini[plots]" in found
    assert "curve.png was left out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
