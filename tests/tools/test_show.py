"""Pictures of what a model does."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from equimini.show.drift import column_statistics, repetition
from equimini.show.neighbours import nearest, pixels
from equimini.training.data import ImageFolder
from equimini.training.index import open_source
from equimini.training.split import part
from tests.helpers.scripts import invoke, mistake


class Mean(torch.nn.Module):
    """Stands in for a feature network: the mean colour of the four quarters."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_copies_of_training_pictures_are_found_also_mirrored(picture_folder):
    data = ImageFolder(*part(open_source(str(picture_folder))), 32, 32, 0, augment=False)
    planted = torch.stack([data.view(7, None, False)[0], data.view(2, None, True)[0]])
    distances, names = nearest(planted, data, pixels, 3, 5, torch.device("cpu"), 0)
    assert names[0][0] == (7, False) and names[1][0] == (2, True)
    assert distances[:, 0].max() < 1e-3 < distances[:, 1].min()
    assert (distances.diff(dim=1) >= 0).all()
    brute = [(data.view(i, None, bool(m))[0] / 127.5 - planted[0] / 127.5).square().mean() ** 0.5
             for i in range(12) for m in range(2)]
    torch.testing.assert_close(distances[0], torch.stack(brute).sort().values[:3], atol=1e-3,
                               rtol=1e-3)


@pytest.mark.parametrize("network", (False, True))
def test_neighbours_sheet(runs, picture_folder, capsys, network):
    torch.jit.script(Mean()).save(str(runs / "mean.pt"))
    extra = ["--network", "mean.pt"] if network else []
    invoke("equimini.show", "neighbours", "--data", picture_folder, "--count", 3, "--nearest", 2,
           "--steps", 1, "--workers", 0, "--out", "near.png", *extra, cwd=runs)
    text = capsys.readouterr().out
    assert "11 training pictures" in text and "held-out" in text
    sheet = np.asarray(Image.open(runs / "near.png"))
    assert sheet.shape[0] == 3 * 34 + 2 and (sheet[:, -34:] != 255).any()


def test_statistics_of_columns_are_those_of_their_pixels():
    images = torch.zeros(2, 3, 8, 12)  # three columns of four pixels, grey 127.5
    images[0, :, :, :4] = 1  # column 0: white, and grey
    images[:, :, :, 4:8] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]  # column 1: red
    images[:, :, ::2, 8:] = -1  # column 2: rows of black and grey
    found = column_statistics(2 * torch.ones(2, 3, 5), images, f=4)
    expected = {"token": (2, 2, 2), "contrast": (0, 0, 127.5 / 2), "gradient y": (0, 0, 127.5),
                "brightness": (127.5 * 1.5, 0.299 * 255, 127.5 / 2), "variety": (127.5 / 2, 0, 0),
                "saturation": (0, 100, 0), "red": (0, 255, 0), "blue": (0, 0, 0)}
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values).float(), atol=0.2 + (
            name == "contrast"), rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert found["gradient x"][2] == 0 < found["gradient x"][0]  # no next column; the border
    assert found.keys() == {*expected, "gradient x"}


def test_neighbours_mistakes(runs, picture_folder, capsys):
    for arguments, text in ((["--data", "nowhere"], "nowhere"),
                            (["--data", picture_folder, "--network", "none.pt"], "none.pt"),
                            (["--data", picture_folder, "--nearest", 99], "--nearest")):
        assert text in mistake("equimini.show", "neighbours", *arguments, "--workers", 0, cwd=runs)
    with pytest.raises(SystemExit):
        invoke("equimini.show", "--help", cwd=runs)
    assert "neighbours  Samples beside" in capsys.readouterr().out


def test_repetition():
    """Noise does not repeat itself; a tile of 20 columns does, exactly or nearly."""
    torch.manual_seed(0)
    noise, labels = torch.randn(4, 60, 3), torch.zeros(4, 60)
    assert repetition(noise, labels) == pytest.approx(1, abs=0.05)
    tiled = torch.randn(4, 20, 3).repeat(1, 3, 1)
    assert repetition(tiled, labels) < 1e-2
    assert 0.05 < repetition(tiled + 0.2 * noise, labels) < 0.5
    alone = torch.arange(4)[:, None].expand(4, 60)
    assert math.isnan(repetition(noise, alone)) and math.isnan(repetition(noise[:, :20], labels))
