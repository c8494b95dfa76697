"""The 2-D baseline's layout, training on chosen subtasks, and the real equivariant variant."""

import dataclasses

import pytest
import torch

from equimini.autoencoder import Tokenizer
from equimini.columnize import ColumnConv, GridConv, columnize, rasterize
from equimini.generator import flow_matching_loss, random_crops
from equimini.noise import rng
from equimini.presets import PRESETS, parameters
from equimini.sampling.image_generator import ImageGenerator
from equimini.training import generator_trainer
from equimini.training.generator_trainer import GeneratorRun, GeneratorTrainer
from tests.conftest import SMALL_TOKENIZER, randomize, small_generator
from tests.helpers.scripts import GENERATOR, mistake

GRID = dataclasses.replace(SMALL_TOKENIZER, multipliers=(1, 2), attention_rows=(16,),
                           layout="grid")  # 32 pixels, f = 2: 16 rows, 4×4 patches


def test_grid_tokens_are_patches_in_raster_order():
    x = torch.randn(2, 3, 9, 9)
    tokens = columnize(x, "grid")
    assert tokens.shape == (2, 27, 9)
    for y in range(3):
        for k in range(3):
            patch = x[:, :, 3 * y:3 * y + 3, 3 * k:3 * k + 3].flatten(1)
            assert torch.equal(tokens[:, :, 3 * y + k], patch)
    assert torch.equal(rasterize(tokens, 9, "grid"), x)


def test_single_positions_are_tokens_in_raster_order():
    x = torch.randn(2, 3, 5, 5)
    tokens = columnize(x, "positions")
    assert tokens.shape == (2, 3, 25) and torch.equal(tokens[:, :, 7], x[:, :, 1, 2])
    assert torch.equal(rasterize(tokens, 5, "positions"), x)


def test_grid_conv_sees_the_neighbours_in_the_picture_and_no_more():
    conv, x = randomize(GridConv(8, 4)), torch.randn(1, 8, 16, requires_grad=True)
    grad, = torch.autograd.grad(conv(x)[0, :, 5].sum(), x)  # patch (1, 1) of a 4×4 grid
    seen = grad[0].abs().sum(0).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("sizes", ((512, 512), (512, 64), (64, 512), (4096, 256)))
def test_grid_conv_has_the_weights_of_a_column_conv(sizes):
    columns, grid = (parameters(kind(*sizes)) for kind in (ColumnConv, GridConv))
    assert abs(grid / columns - 1) < 0.01


def test_what_is_no_convolution_over_tokens_is_the_same_in_both_layouts():
    with torch.device("meta"):
        a, b = (Tokenizer(dataclasses.replace(PRESETS["tiny"].tokenizer, layout=layout))
                for layout in ("columns", "grid"))
    between = ("column_conv", "to_tokens", "from_tokens")
    one, other = ({name: p.shape for name, p in tokenizer.named_parameters()
                   if not any(part in name for part in between)} for tokenizer in (a, b))
    assert one == other
    assert parameters(b) == pytest.approx(parameters(a), rel=0.01)


@pytest.mark.parametrize("layout, count", (("grid", 16), ("positions", 256)))
def test_grid_tokenizer_encodes_and_decodes_square_pictures_only(layout, count):
    model = randomize(Tokenizer(dataclasses.replace(GRID, layout=layout))).eval()
    tokens = model.encode(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, count, 6)
    assert model.decode(tokens).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="square"):
        model.encode(torch.randn(1, 3, 32, 64))
    with pytest.raises(ValueError, match=f"{count} tokens"):
        model.decode(tokens[:, :8])


def test_a_grid_needs_a_square_number_of_rows():
    with pytest.raises(ValueError, match="layout grid needs"):
        dataclasses.replace(SMALL_TOKENIZER, layout="grid")  # 8 rows


@pytest.mark.parametrize("layout", ("grid", "positions"))
def test_generator_over_a_grid_samples_square_pictures_only(layout):
    tokenizer = randomize(Tokenizer(dataclasses.replace(GRID, layout=layout))).eval()
    tokenizer.set_statistics(0.0, 1.0)
    model = ImageGenerator(small_generator(window=tokenizer.config.columns), tokenizer,
                           ["a", "b", "c"])
    assert model.sample(["a", "b"], cfg=1, steps=1).shape == (2, 3, 32, 32)
    with pytest.raises(Exception, match="no columns"):
        model.sample(["a"], columns=20)


def test_real_equivariant_predicts_as_in_a_crop_wherever_it_lies():
    """The same W − 1 columns give the same z at any place, up to rounding."""
    real, labels = small_generator(real_equivariant=True), torch.tensor([0, 2])
    tokens, w = torch.randn(2, 11, 6), real.config.window
    z = real.predict(tokens, labels)
    for start in range(11 - w + 1):
        crop = real.predict(tokens[:, start:start + w], labels)
        torch.testing.assert_close(z[:, start + w - 1], crop[:, -1])
    torch.testing.assert_close(z[:, :w], real.predict(tokens[:, :w], labels))


def test_random_crops_are_pieces_of_their_image():
    tokens = torch.arange(20.0).reshape(2, 10, 1)
    crops = random_crops(tokens, 3, torch.tensor([[0, 7], [2, 2]]))
    assert crops[:, :, 0].tolist() == [[0, 1, 2], [7, 8, 9], [12, 13, 14], [12, 13, 14]]


class Setting:
    """A trainer of train_generator.py on random latents of eight columns."""

    def __init__(self, tokenizer, real_equivariant=False, **training):
        config = dataclasses.replace(PRESETS["tiny"].generator_training, warmup_steps=0, **training)
        model = small_generator(dropout=0.0, real_equivariant=real_equivariant)
        self.trainer = GeneratorTrainer(model, tokenizer, ["a", "b", "c"], config, GeneratorRun())
        randomize(self.trainer.ema.model, seed=1)
        self.means = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))
        self.labels = torch.tensor([0, 1, 2, 1])

    def step(self):
        """One step; returns its loss, and the errors (M, B, N) that it should be made of."""
        losses, errors, inner = [], [], self.trainer.flow_errors
        self.trainer.flow_errors = lambda *given: errors.append(inner(*given)) or errors[-1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss))
            logged = self.trainer.step(3, self.means, self.labels)
        assert logged["loss_per_column"] == pytest.approx(
            errors[0].mean((0, 1)).tolist(), abs=1e-5)
        return losses[0], errors[0]


def test_loss_is_the_mean_over_the_chosen_subtasks(tokenizer):
    whole, columns = Setting(tokenizer).step()
    torch.testing.assert_close(whole, columns.mean())
    chosen, same = Setting(tokenizer, subtasks=(1, 6)).step()
    assert torch.equal(same, columns)  # the same noise, whatever is chosen
    torch.testing.assert_close(chosen, same[:, :, [1, 6]].mean())
    grad, = torch.autograd.grad(chosen, same)
    assert grad.abs().sum((0, 1)).nonzero().flatten().tolist() == [1, 6]


def test_dropout_is_seeded_by_the_run_and_the_step(tokenizer, monkeypatch):
    keys, setting = [], Setting(tokenizer)
    monkeypatch.setattr(generator_trainer, "seed_torch", lambda *key: keys.append(key))
    for run, step in ((0, 3), (0, 4), (5, 4), (0, 3)):
        setting.trainer.seed = run
        setting.trainer.step(step, setting.means, setting.labels)
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0]


@pytest.mark.parametrize("share", (0.0, 0.5, 1.0))
def test_classes_are_dropped_below_the_label_dropout(tokenizer, share):
    setting = Setting(tokenizer, label_dropout=share)
    trainer, drawn = setting.trainer, []
    draws = trainer.draws([rng("here", i) for i in range(4)], 8, 6)._replace(
        drop=torch.tensor([0.1, 0.4, 0.6, 0.9]))
    trainer.flow_errors = lambda model, x, labels, u, eps, drop, shift: drawn.append(drop)
    trainer.errors(setting.means, setting.labels, draws)
    assert drawn[0].sum() == 4 * share and drawn[0].tolist() == sorted(drawn[0], reverse=True)


def test_real_equivariant_trains_on_as_many_tokens_in_crops(tokenizer):
    loss, columns = Setting(tokenizer, real_equivariant=True).step()
    assert columns.shape[1:] == (4 * (8 // 3), 3)  # W = 3: two crops of each image of eight
    torch.testing.assert_close(loss, columns.mean())


@pytest.mark.parametrize("setting", ({"subtasks": (2,)}, {"real_equivariant": True}), ids=str)
def test_validation_is_over_all_columns(tokenizer, setting):
    """Also for a generator that is trained on some, and for one that sees windows alone."""
    setting = Setting(tokenizer, **setting)
    trainer = setting.trainer
    scores = trainer.validate([(setting.means, setting.labels, torch.arange(4))])
    draws = trainer.draws([rng("validation", i) for i in range(4)], *setting.means.shape[1:])
    x = trainer.tokens(setting.means, draws)
    expected = flow_matching_loss(trainer.ema.model, x, setting.labels, draws.u, draws.eps).mean(0)
    assert scores["val_loss_per_column"] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("flags, text", (
    (["--subtasks", "0,8"], "--subtasks must be columns 0 to 7"),
    (["--subtasks", "0,2", "--real-equivariant"], "one of the two"),
    (["--real-equivariant", "--window", 9], "--window 9"),
    (["--real-equivariant", "--window", 1], "window of at least 2")))
def test_mistakes(runs, flags, text):
    assert text in mistake("train_generator.py", *GENERATOR, "--steps", 1, "--out", "mistake",
                           "--overwrite", *flags, cwd=runs)
