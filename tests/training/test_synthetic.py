"""The built-in landscapes: endless, the same statistics everywhere; and objects, which are not."""

import numpy as np
import pytest

from equimini.training.synthetic import (CLASSES, OBJECT_CLASSES, _Canvas, _canvas, landscape,
                                         with_object)

pytestmark = pytest.mark.filterwarnings("error")               # overflow, NaN to uint8
LABELS = range(len(CLASSES))
OBJECT_LABELS = range(len(OBJECT_CLASSES))


def z_score(differences: np.ndarray) -> float:
    """Mean of independent differences in standard errors; beyond 4.5 by chance in 7 of 1e6."""
    return abs(differences.mean()) / (differences.std(ddof=1) / len(differences) ** 0.5)


def lines(rows: int, height: int, width: int, **options) -> np.ndarray:
    """(rows, width) of 1-D noise, with independent keys."""
    rng = np.random.default_rng(0)
    noise = [_Canvas(height, width, 0, rng).line(**options) for _ in range(rows)]
    return np.stack(noise)[:, -width:]


@pytest.mark.parametrize("height, width", [(64, 64), (1, 1), (2, 70), (40, 3), (130, 65)])
def test_shape_dtype_and_determinism(height, width):
    for draw, labels in ((landscape, LABELS), (with_object, OBJECT_LABELS)):
        for label in labels:
            a, b = (draw(3, label=label, height=height, width=width, seed=5) for _ in range(2))
            assert a.dtype == np.uint8 and a.shape == (height, width, 3)
            assert a.flags.c_contiguous and np.array_equal(a, b)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("x0", [0, -101, 10**9, -(10**9) - 7, 2**63 - 50, -(10**30)])
def test_windows_of_one_scroll_agree_bit_for_bit(label, x0):
    for height in (64, 37):
        wide = landscape(2, label=label, height=height, width=200, x0=x0)
        for at, width in ((0, 64), (40, 64), (41, 64), (136, 64), (77, 1), (199, 1), (3, 131)):
            window = landscape(2, label=label, height=height, width=width, x0=x0 + at)
            np.testing.assert_array_equal(window, wide[:, at:at + width])


def test_numpy_integers_do_as_python_ones():
    a = landscape(np.int64(1), label=np.int32(2), height=np.int16(64), x0=np.int64(2**62))
    np.testing.assert_array_equal(a, landscape(1, label=2, x0=2**62))


def test_index_seed_label_and_place_all_matter():
    pictures = [landscape(i, label=k, seed=s, x0=x) for i in range(3) for k in LABELS
                for s in range(2) for x in (0, 64, -64, 10**9, 2**32, 2**40)]
    objects = [with_object(i, label=k, seed=s) for i in range(20) for k in OBJECT_LABELS
               for s in range(2)]
    everything = pictures + objects
    assert len({p.tobytes() for p in everything}) == len(everything)
    assert min(p.std() for p in everything) > 5                 # none is blank


def test_each_class_has_its_own_random_numbers():
    keys = {_canvas(kinds, 7, label, 64, 64, 0, 0).key()
            for kinds in (CLASSES, OBJECT_CLASSES) for label in range(len(kinds))}
    assert len(keys) == len(CLASSES) + len(OBJECT_CLASSES)


@pytest.mark.parametrize("label", LABELS)
def test_brightness_and_contrast_do_not_depend_on_x(label):
    columns = np.stack([landscape(i, label=label, height=32).mean((0, 2)) for i in range(300)])
    left, right = columns[:, :8].mean(1), columns[:, 56:].mean(1)
    middle = columns.mean(0).mean()
    assert z_score(left - right) < 4.5
    assert z_score((left - middle) ** 2 - (right - middle) ** 2) < 4.5


@pytest.mark.parametrize("smooth", [True, False])
def test_noise_varies_as_much_between_lattice_points_as_on_them(smooth):
    power = lines(2000, 64, 64, freq=1.0, count=1, smooth=smooth) ** 2
    # A lattice at rest has half the variance midway (x = 32) of that on its points (x = 0).
    assert z_score(power[:, 0] - power[:, 31]) < 4.5


def test_noise_does_not_repeat():
    n = lines(1, 8, 2**15, freq=1.0, count=2)[0].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(n - n.mean(), 2 * len(n))) ** 2
    lags = np.fft.irfft(spectrum)[:len(n) // 2]
    # 4096 cells, half of them or more overlap: a correlation's standard error is about
    # sqrt(sum of squared autocorrelations, < 2 cells, / 2048) = 0.03. A repetition gives > 0.5.
    assert np.abs(lags[4 * 8:] / lags[0]).max() < 6 * 0.031


@pytest.mark.parametrize("label", LABELS)
def test_a_larger_picture_shows_the_same_scene(label):
    pairs = [(landscape(i, label=label, height=256, width=256), landscape(i, label=label))
             for i in range(8)]
    large = np.stack([a.reshape(64, 4, 64, 4, 3).mean((1, 3)) for a, _ in pairs])
    small = np.stack([b for _, b in pairs]).astype(np.float64)
    same, other = np.abs(large - small).mean(), np.abs(large - np.roll(small, 1, 0)).mean()
    assert same < 0.3 * other


@pytest.mark.parametrize("label", OBJECT_LABELS)
def test_objects_stand_in_the_middle_of_nothing(label):
    sizes = []
    for i in range(60):
        p = with_object(i, label=label).astype(np.int64)
        object_columns = np.flatnonzero(np.abs(p - p[:, :1]).max((0, 2)) > 0)
        sizes.append(len(object_columns))
        assert abs(object_columns.mean() - 31.5) < 0.1 * 64     # jitter 0.03, crooked shapes
        assert 8 < object_columns.min() and object_columns.max() < 55
        assert np.abs(p[:, 28:36] - p[:, :1]).max() > 30        # and it is plain to see
    assert max(sizes) > 1.4 * min(sizes)


@pytest.mark.parametrize("draw, kinds", [(landscape, len(CLASSES)),
                                         (with_object, len(OBJECT_CLASSES))])
@pytest.mark.parametrize("name, bad", [
    ("label", -1), ("label", "kinds"), ("label", "sea"), ("label", 1.0), ("height", 0),
    ("height", 64.0), ("width", 0), ("width", -3), ("index", -1), ("index", 2**32), ("seed", -1),
    ("seed", None)])
def test_bad_arguments_are_named(draw, kinds, name, bad):
    bad = kinds if bad == "kinds" else bad
    arguments = {"index": 0, "label": 0, name: bad}
    with pytest.raises(ValueError, match=f"{name} is {bad!r}; takes an integer"):
        draw(**arguments)


def test_x0_must_be_an_integer():
    with pytest.raises(ValueError, match="x0 is 0.5"):
        landscape(0, label=0, x0=0.5)
