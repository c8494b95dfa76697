"""The 2-D baseline's layout, training on chosen subtasks, and the real equivariant variant."""

import dataclasses

import pytest
import torch

from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.columnize import ColumnConv, GridConv, columnize, rasterize
from equimini.generator import GeneratorConfig, flow_matching_loss, make_generator, random_crops
from equimini.noise import rng
from equimini.presets import PRESETS, parameters
from equimini.sampler import Guidance, sample_plainly, sample_tokens
from equimini.sampling.image_generator import ImageGenerator
from equimini.training import generator_trainer
from equimini.training.generator_trainer import GeneratorRun, GeneratorTrainer
from equimini.utils.command_line import config_from_dict
from tests.conftest import SMALL_GENERATOR, SMALL_TOKENIZER, randomize
from tests.helpers.scripts import GENERATOR, mistake
from tests.method.test_sampler import LABELS, SEEDS, filled

GRID = dataclasses.replace(SMALL_TOKENIZER, multipliers=(1, 2), attention_rows=(16,),
                           layout="grid")  # 32 pixels, f = 2: 16 rows, 4×4 patches
REAL = dataclasses.replace(SMALL_GENERATOR, real_equivariant=True)  # 3 layers, W = 3


@pytest.fixture
def real():
    return randomize(make_generator(REAL, num_classes=3, channels=6)).eval()


def test_grid_tokens_are_patches_in_raster_order():
    x = torch.randn(2, 3, 9, 9)
    tokens = columnize(x, "grid")
    assert tokens.shape == (2, 27, 9)
    for y in range(3):
        for k in range(3):
            patch = x[:, :, 3 * y:3 * y + 3, 3 * k:3 * k + 3].flatten(1)
            assert torch.equal(tokens[:, :, 3 * y + k], patch)
    assert torch.equal(rasterize(tokens, 9, "grid"), x)


def test_grid_conv_sees_the_neighbours_in_the_picture_and_no_more():
    conv, x = randomize(GridConv(8, 4)), torch.randn(1, 8, 16, requires_grad=True)
    grad, = torch.autograd.grad(conv(x)[0, :, 5].sum(), x)  # patch (1, 1) of a 4×4 grid
    seen = grad[0].abs().sum(0).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("sizes", ((512, 512), (512, 64), (64, 512), (4096, 256)))
def test_grid_conv_has_the_weights_of_a_column_conv(sizes):
    columns, grid = (parameters(kind(*sizes)) for kind in (ColumnConv, GridConv))
    assert abs(grid / columns - 1) < 0.01


def test_tokenizers_of_both_layouts_have_the_same_weights():
    """To 1 %, and what is no convolution over tokens is the same."""
    columns = PRESETS["tiny"].tokenizer
    with torch.device("meta"):
        a, b = Tokenizer(columns), Tokenizer(dataclasses.replace(columns, layout="grid"))
    assert abs(parameters(b) / parameters(a) - 1) < 0.01
    between = ("column_conv", "to_tokens", "from_tokens")
    shapes = [{k: v.shape for k, v in t.state_dict().items() if not any(n in k for n in between)}
              for t in (a, b)]
    assert shapes[0] == shapes[1]


def test_grid_tokenizer_encodes_and_decodes_square_pictures_only():
    model = randomize(Tokenizer(GRID)).eval()
    tokens = model.encode(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 16, 6)
    assert model.decode(tokens).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="square"):
        model.encode(torch.randn(1, 3, 32, 64))
    with pytest.raises(ValueError, match="16 tokens"):
        model.decode(tokens[:, :8])
    with pytest.raises(ValueError, match="layout grid needs"):
        dataclasses.replace(SMALL_TOKENIZER, layout="grid")  # 8 rows


def test_checkpoints_without_the_new_settings_mean_columns_and_windowed_layers():
    old = {k: v for k, v in dataclasses.asdict(SMALL_TOKENIZER).items() if k != "layout"}
    assert config_from_dict(TokenizerConfig, old).layout == "columns"
    old = {k: v for k, v in dataclasses.asdict(SMALL_GENERATOR).items() if k != "real_equivariant"}
    assert config_from_dict(GeneratorConfig, old) == SMALL_GENERATOR


def test_generator_over_a_grid_samples_square_pictures_only():
    tokenizer = randomize(Tokenizer(GRID)).eval()
    tokenizer.set_statistics(0.0, 1.0)
    config = dataclasses.replace(SMALL_GENERATOR, window=16)
    model = ImageGenerator(randomize(make_generator(config, 2, 6)).eval(), tokenizer, ["a", "b"])
    assert model.sample(["a", "b"], cfg=1, steps=1).shape == (2, 3, 32, 32)
    with pytest.raises(Exception, match="square pictures only"):
        model.sample(["a"], columns=20)


def test_real_equivariant_sees_its_window_alone(real):
    """z_i depends on columns i−W+1 … i−1 and on nothing beyond, however many the layers."""
    tokens = torch.randn(1, 9, 6, requires_grad=True)
    z = real.predict(tokens, LABELS[:1])
    for i in range(9):
        grad, = torch.autograd.grad(z[0, i].square().sum(), tokens, retain_graph=True,
                                    allow_unused=i == 0)
        seen = set() if grad is None else set(grad[0].abs().sum(1).nonzero().flatten().tolist())
        assert seen == set(range(max(0, i - REAL.window + 1), i)), i


def test_real_equivariant_predicts_as_in_a_crop_wherever_it_lies(real):
    """The same W − 1 columns give the same z at any place, up to rounding."""
    tokens, w = torch.randn(2, 11, 6), REAL.window
    z = real.predict(tokens, LABELS[:2])
    for start in range(11 - w + 1):
        crop = real.predict(tokens[:, start:start + w], LABELS[:2])
        torch.testing.assert_close(z[:, start + w - 1], crop[:, -1])
    torch.testing.assert_close(z[:, :w], real.predict(tokens[:, :w], LABELS[:2]))


@torch.no_grad()
def test_real_equivariant_sampler_equals_the_literal_one(real):
    drawn = sample_tokens(real, LABELS, 8, SEEDS, cfg=2.5, steps=3)
    torch.testing.assert_close(drawn, sample_plainly(real, LABELS, 8, SEEDS, 2.5, "linear", 3),
                               rtol=1e-4, atol=1e-4)
    given = filled(real, drawn[:, :4], 8, guidance=Guidance(2.5, "linear", 8), steps=3)
    torch.testing.assert_close(given, drawn, rtol=1e-4, atol=1e-4)


def test_random_crops_are_pieces_of_their_image():
    tokens = torch.arange(20.0).reshape(2, 10, 1)
    crops = random_crops(tokens, 3, torch.tensor([[0, 7], [2, 2]]))
    assert crops[:, :, 0].tolist() == [[0, 1, 2], [7, 8, 9], [12, 13, 14], [12, 13, 14]]


class Setting:
    """A trainer of train_generator.py on random latents of eight columns."""

    def __init__(self, tokenizer, model=SMALL_GENERATOR, **training):
        config = dataclasses.replace(PRESETS["tiny"].generator_training, warmup_steps=0, **training)
        model = randomize(make_generator(dataclasses.replace(model, dropout=0.0), 3, 6))
        self.trainer = GeneratorTrainer(model, tokenizer, ["a", "b", "c"], config, GeneratorRun())
        randomize(self.trainer.ema.model, seed=1)
        self.means = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))
        self.labels = torch.tensor([0, 1, 2, 1])

    def step(self):
        """One step; returns its loss, and the errors (M, B, N) that it should be made of."""
        seen = []
        inner = self.trainer.flow_errors
        errors = []

        def spy(*arguments):
            errors.append(inner(*arguments))
            return errors[-1]

        self.trainer.flow_errors = spy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", lambda loss: seen.append(loss))
            logged = self.trainer.step(3, self.means, self.labels)
        assert logged["loss_per_column"] == pytest.approx(
            errors[0].mean((0, 1)).tolist(), abs=1e-5)
        return seen[0], errors[0]


def test_loss_is_the_mean_over_the_chosen_subtasks(tokenizer):
    whole, columns = Setting(tokenizer).step()
    torch.testing.assert_close(whole, columns.mean())
    chosen, same = Setting(tokenizer, subtasks=(1, 6)).step()
    assert torch.equal(same, columns)  # the same noise, whatever is chosen
    torch.testing.assert_close(chosen, columns[:, :, [1, 6]].mean())


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


def test_only_chosen_subtasks_have_a_gradient(tokenizer):
    loss, columns = Setting(tokenizer, subtasks=(0, 5)).step()
    grad, = torch.autograd.grad(loss, columns)
    assert grad.abs().sum((0, 1)).nonzero().flatten().tolist() == [0, 5]


def test_real_equivariant_trains_on_as_many_tokens_in_crops(tokenizer):
    loss, columns = Setting(tokenizer, REAL).step()
    assert columns.shape[1:] == (4 * (8 // 3), 3)  # W = 3: two crops of each image of eight
    torch.testing.assert_close(loss, columns.mean())


def test_validation_is_over_all_columns(tokenizer):
    """Also for a generator that is trained on some, and for one that sees windows alone."""
    for model, training in ((SMALL_GENERATOR, {"subtasks": (2,)}), (REAL, {})):
        setting = Setting(tokenizer, model, **training)
        batch = setting.means, setting.labels, torch.arange(4)
        trainer = setting.trainer
        scores = trainer.validate([batch])
        draws = trainer.draws([rng("validation", i) for i in range(4)],
                              *setting.means.shape[1:])
        x = trainer.tokens(setting.means, draws)
        expected = flow_matching_loss(trainer.ema.model, x, setting.labels, draws.u,
                                      draws.eps).mean(0)
        assert scores["val_loss_per_column"] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("flags, text", (
    (["--subtasks", "0,8"], "--subtasks must be columns 0 to 7"),
    (["--subtasks", "0,2", "--real-equivariant"], "one of the two"),
    (["--real-equivariant", "--window", 9], "--window 9"),
    (["--real-equivariant", "--window", 1], "window of at least 2")))
def test_mistakes(runs, flags, text):
    assert text in mistake("train_generator.py", *GENERATOR, "--steps", 1, "--out", "mistake",
                           "--overwrite", *flags, cwd=runs)
