"""The training loop's own parts; whole trainings are in test_scripts.py."""

from contextlib import closing

import pytest

from equimini.training import loop as training


def test_images_per_second_do_not_count_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    with closing(training.Progress(0, 9, 8, "test")) as progress:
        for pause in (0, 50, 0, 0):  # between steps of one second
            now[0] += 1
            progress.step({"loss": 1.0, "lr": 0.1}, 0)
            with progress.paused():
                now[0] += pause
        assert progress.rate == pytest.approx(8)  # measured over three steps
