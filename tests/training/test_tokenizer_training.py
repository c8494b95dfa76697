"""train_tokenizer.py with its frozen networks, stage 2, mixed precision; the ablation."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from equimini import load_generator, load_tokenizer
from equimini.autoencoder import Tokenizer, add_noise, noise_variance
from equimini.discriminator import PatchGAN
from equimini.experiments import tokenizer as ablation
from equimini.experiments.training_runs import TrainingRun
from equimini.losses import total_loss
from equimini.presets import PRESETS, TokenizerTraining
from equimini.training.loop import Ema, micro_batches
from equimini.training.setup import Setup
from equimini.training.tokenizer_trainer import TokenizerRun
from equimini.utils import checkpoint
from equimini.utils.checkpoint import latents_hash, tokenizer_hash
from equimini.utils.command_line import config_from_dict
from equimini.utils.errors import UserError
from equimini.utils.images import to_float
from tests.conftest import SMALL_TOKENIZER, randomize
from tests.helpers.scripts import GENERATOR, TRAINED, call, mistake
from tests.method.test_losses import TwoMaps
from tests.training.test_scripts import records, same
from train_tokenizer import make_trainer

SIZES = ("--image-size 32 --base-channels 8 --norm-groups 1 --z-channels 8 --attention-rows 8 "
         "--token-channels 8").split()
TRAINING = ("--batch-size 4 --stats-images 8 --disc-channels 8 --disc-layers 2 --align-map -1 "
            "--disc-head-channels 8 --log-every 1 --warmup-steps 0").split()
STARTS = "--workers 0 --val-images 4 --adv-start 1 --align-start 1".split()
SMALL = [*SIZES, *TRAINING, *STARTS]


def train(*arguments, out):
    call("train_tokenizer.py", *arguments, "--out", out, cwd=out.parent)


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A folder with a TorchScript network, and a tokenizer trained with every loss."""
    folder = tmp_path_factory.mktemp("stage_one")
    torch.jit.script(TwoMaps()).save(str(folder / "maps.pt"))
    train(*SMALL, *networks(folder), "--steps", 4, out=folder / "one")
    return folder


def networks(folder):
    net = folder / "maps.pt"
    return ["--perceptual-net", net, "--discriminator", "dino", "--disc-net", net, "--align-net",
            net]


def log(folder):
    return records(folder / "log.jsonl")


def weights(path, which="ema"):
    return torch.load(path, weights_only=True)[which]


def test_every_loss_is_logged_and_the_head_fits_the_teacher(stage_one):
    first, *later = [r for r in log(stage_one / "one") if "loss" in r]
    names = {"adaptive_weight", "logit_real", "logit_fake", "rec_grad", "adv_grad", "align",
             "disc_loss", "disc_grad_norm", "grad_norm"}
    assert not names - {"grad_norm"} & first.keys()  # delayed
    for record in later:
        assert names <= record.keys() and all(math.isfinite(record[n]) for n in names)
        # adv_grad + 1e-4 as the definition has it, clamped
        weight = min(1e4, record["rec_grad"] / (record["adv_grad"] + 1e-4))
        assert record["adaptive_weight"] == pytest.approx(weight, rel=1e-4)
    assert load_tokenizer(stage_one / "one/last.pt").config.semantic_channels == 3


@pytest.mark.parametrize("critic", ("dino", "patchgan"))
def test_stage_two_trains_the_decoder_alone(stage_one, critic, tmp_path):
    extra = {"dino": ["--disc-net", stage_one / "maps.pt"],
             "patchgan": ["--no-carry-disc"]}[critic]  # stage one has another
    before = stage_one / "one/last.pt"
    train(*TRAINING, *STARTS, *extra, "--discriminator", critic, "--steps", 3,
          "--finetune-decoder", before, "--stats-images", 4, out=tmp_path / "two")
    a = weights(before)
    for which in ("model", "ema"):
        b = weights(tmp_path / "two/last.pt", which)
        for name in a:
            trained = name.startswith(("decoder.", "from_tokens."))
            assert torch.equal(a[name], b[name]) != trained, name
    content = torch.load(tmp_path / "two/last.pt", weights_only=True)
    one, two = load_tokenizer(before), load_tokenizer(tmp_path / "two/last.pt")
    decoding = [*two.decoder.parameters(), *two.from_tokens.parameters()]
    assert len(content["optimizer"]["param_groups"][0]["params"]) == len(decoding)
    assert two.has_statistics and latents_hash(one) == latents_hash(two)
    assert tokenizer_hash(one) != tokenizer_hash(two)
    assert not any("align" in r for r in log(tmp_path / "two"))


def trainer(folder, tmp_path, **run):
    """A Trainer as main makes it, and a batch."""
    options = TokenizerRun(out=str(tmp_path), **run)
    net = str(folder / "maps.pt")
    cfg = TokenizerTraining(steps=9, batch_size=4, lr=1e-3, warmup_steps=0, perceptual_net=net,
                            discriminator="dino", disc_net=net, disc_head_channels=8, adv_start=0,
                            align_net=net, align_start=0)
    initial = {"some": "checkpoint"} if options.finetune_decoder else None
    model = dataclasses.replace(SMALL_TOKENIZER, semantic_channels=3, norm_groups=1)
    setup = Setup("tiny", model, cfg, options, torch.device("cpu"), tmp_path, None, initial)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    return make_trainer(setup, to_float(images)), images


def test_a_step_has_the_value_and_the_gradient_of_eq_5(stage_one, tmp_path):
    """`total_loss`, the plain expression, differentiated as it stands."""
    plain, images = trainer(stage_one, tmp_path)
    part, = micro_batches(4, 1)
    out, cfg = plain.decoded(0, images, part), plain.cfg
    features = plain.adversary.features(out.x_hat, 0, real=False)
    loss = total_loss(out.x, out.x_hat, out.mean, plain.distance(out.x, out.x_hat),
                      plain.adversary.critic.logits(features), out.semantics,
                      plain.teacher(out.x, *out.semantics.shape[2:]),
                      plain.model.decoder.conv_out.weight, kl_weight=cfg.kl_weight,
                      adv_weight=cfg.adv_weight, align_weight=cfg.align_weight)
    loss.backward()
    stage, found = trainer(stage_one, tmp_path)[0], []
    stage.cfg = dataclasses.replace(cfg, grad_clip=1e9)
    stage.optimizer.register_step_pre_hook(lambda *_: found.extend(
        p.grad.flatten() for p in stage.model.parameters()))
    scalars = stage.step(0, images, None)
    assert scalars["adaptive_weight"] > 1e-3 and scalars["adv"] != 0
    assert scalars["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in plain.model.parameters()])
    # float32 sums of thousands of terms in another order, as in test_distributed.py
    assert (torch.cat(found) - expected).norm() < 1e-5 * expected.norm()


def test_nothing_flows_into_the_encoder_in_stage_two(stage_one, tmp_path):
    def reached(stage, images):
        names = []
        for name, p in stage.model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
        stage.step(0, images, None)
        return names

    second = reached(*trainer(stage_one, tmp_path, finetune_decoder="x"))
    assert second and all(n.startswith(("decoder.", "from_tokens.")) for n in second)
    assert "encoder.conv_in.weight" in reached(*trainer(stage_one, tmp_path))  # in stage 1 it does


def test_frozen_networks_run_no_more_often_than_needed(stage_one, tmp_path):
    """Originals once for perceptual distance and teacher; the critic's two sides once each."""
    stage, images = trainer(stage_one, tmp_path)
    net, sizes = stage.distance.net, []
    assert net is stage.teacher.maps and net is stage.adversary.critic.frozen[0].maps
    real_forward = type(net).forward
    net.forward = lambda x: (sizes.append(len(x)), real_forward(net, x))[1]
    stage.step(0, images, None)
    assert sizes == [4] * 4  # x; x̂; augmented x̂; augmented x


def test_bf16_is_close_to_float32_and_keeps_losses_and_images_in_it(stage_one, tmp_path):
    found = []
    for precision in ("float32", "bf16"):
        stage, images = trainer(stage_one, tmp_path, precision=precision)
        with stage.autocast():
            mean = stage.encode(to_float(images))
            image = stage.decode(mean)
        assert image.dtype == torch.float32
        found.append((mean.float(), image, stage.step(0, images, None)))
    # bf16 keeps 8 bits: 2^-9 rounding at each of some twenty layers, averaged over many inputs
    for a, b in zip(found[0][:2], found[1][:2]):
        assert ((a - b).norm() / a.norm()).item() < 0.05
        assert not torch.equal(a, b)
    for name, value in found[0][2].items():
        assert found[1][2][name] == pytest.approx(value, rel=0.2, abs=1e-2), name


def test_channels_last_and_compile_change_nothing_but_speed(stage_one, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f: calls.append(f) or f)
    plain, images = trainer(stage_one, tmp_path)
    a = plain.step(0, images, None)
    other, _ = trainer(stage_one, tmp_path, channels_last=True, compile=True)
    assert len(calls) == 3
    assert other.model.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    b = other.step(0, images, None)
    assert a.keys() == b.keys()
    for name in a:
        assert b[name] == pytest.approx(a[name], rel=1e-2), name


def test_a_resumed_run_with_every_network_equals_an_uninterrupted_one(stage_one, tmp_path):
    twin = tmp_path / "twin"
    train(*SMALL, *networks(stage_one), "--steps", 2, out=twin)
    train("--resume", "--steps", 4, out=twin)
    for which in ("model", "ema", "disc"):
        a, b = weights(stage_one / "one/last.pt", which), weights(twin / "last.pt", which)
        assert same(a, b), which


@pytest.mark.slow
def test_a_fork_is_the_same_as_a_training_from_the_start(stage_one, tmp_path):
    """What differs before the critic's start is nothing: the shared steps are trained once."""
    net = str(stage_one / "maps.pt")
    flags = [*SMALL, "--perceptual-net", net]
    start = TrainingRun("tokenizer", tmp_path / "start", 1, [*flags, "--discriminator", "none"])
    fork = TrainingRun("tokenizer", tmp_path / "fork", 3, [*flags, "--discriminator", "patchgan"],
                       start)
    train(*start.flags, "--steps", 1, out=start.folder)
    fork.train()
    assert fork.record()["steps"] == 3
    train(*flags, "--discriminator", "patchgan", "--steps", 3, out=tmp_path / "alone")
    for which in ("model", "ema", "disc"):
        a, b = (weights(tmp_path / n / "last.pt", which) for n in ("fork", "alone"))
        assert same(a, b), which
    before = fork.last.stat().st_mtime_ns
    fork.train()  # nothing left to do
    assert fork.last.stat().st_mtime_ns == before


class Features(torch.nn.Module):
    """A stand-in for a feature network of the evaluation."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x.float(), 16).flatten(1)


@pytest.mark.slow
def test_the_ablation_ends_in_a_table_and_a_picture(stage_one, picture_folder, tmp_path,
                                                    monkeypatch, capsys):
    torch.jit.script(Features()).save(str(tmp_path / "features.pt"))
    trained = []

    def train_here(run):  # in this process
        trained.append(run.folder.name)
        run.folder.mkdir(exist_ok=True)
        if run.fork:
            run.last.write_bytes(run.fork.last.read_bytes())
        train("--steps", run.steps, *run.flags, *(["--resume"] if run.fork else []),
              out=run.folder)
    monkeypatch.setattr(TrainingRun, "train", train_here)
    command = ["--data", str(picture_folder), "--val-data", str(picture_folder), "--workers", "0",
               "--maps-network", str(stage_one / "maps.pt"), "--metrics-network",
               str(tmp_path / "features.pt"), "--steps", "6", "--shown", "2", "--out",
               str(tmp_path / "out"), *SIZES, *TRAINING]
    ablation.main(command)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["scores"]) == 6 and len(trained) == 8
    for scores in results["scores"].values():
        assert set(scores) == {"psnr", "ssim", "perceptual_distance", "frechet_distance"}
        assert all(math.isfinite(v) for v in scores.values())
    text = (tmp_path / "out/table.md").read_text()
    assert text in shown and text.count("\n| ") == 7
    assert Image.open(tmp_path / "out/pictures.png").height > 7 * 32
    steps = {name: torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)["step"]
             for name in trained}
    assert steps["5-aligned-start"] + steps["6-finetuned"] == 6
    assert all(steps[name] == 6 for name in ("1-l1-kl", "2-perceptual", "3-patchgan", "4-heads",
                                             "5-aligned"))
    with pytest.raises(UserError, match="other settings.*steps"):
        ablation.main([*command, "--steps", "7"])
    with pytest.raises(UserError, match="not this experiment's"):
        ablation.main([*command, "--out", str(picture_folder)])
    with pytest.raises(UserError, match="--maps-network"):
        ablation.main(["--out", str(tmp_path / "x")])


def test_a_generator_takes_the_fine_tuned_decoder_and_no_other_tokenizer(stage_one, tmp_path):
    before = stage_one / "one/last.pt"
    train(*TRAINING, *STARTS, "--discriminator", "none", "--steps", 3, "--finetune-decoder",
          before, out=tmp_path / "two")
    train(*SMALL, "--discriminator", "none", "--steps", 1, "--seed", 5, out=tmp_path / "other")
    call("train_generator.py", *GENERATOR, "--steps", 1, "--tokenizer", before, cwd=tmp_path)
    sample = ["sample.py", *TRAINED, "--classes", "sea", "--count", 1, "--steps", 2]
    call(*sample, "--out", "one.png", cwd=tmp_path)
    call(*sample, "--tokenizer", "two/last.pt", "--out", "two.png", cwd=tmp_path)
    a, b = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("one.png", "two.png"))
    assert a.shape == b.shape and abs(a - b).max() > 0
    with pytest.raises(UserError, match="other tokens"):
        load_generator(tmp_path / "runs/generator/last.pt",
                       tokenizer_path=tmp_path / "other/last.pt")


def test_alignment_and_heads_on_wide_crops_and_odd_batches(stage_one, tmp_path):
    train(*SMALL, *networks(stage_one), "--width", 52, "--steps", 2, "--batch-size", 9,
          out=tmp_path)
    last = [r for r in log(tmp_path) if "align" in r][-1]
    assert math.isfinite(last["align"]) and math.isfinite(last["logit_fake"])


@pytest.mark.parametrize("arguments, text", (
    (["--preset", "small", "--data", "synthetic"], "--lpips-weights"),
    (["--preset", "small", "--perceptual", "none", "--align", "none"], "--dino-weights"),
    ([*SMALL, "--align-net", "MAPS", "--align-start", "9", "--steps", "9"], "--align-start"),
    ([*SMALL, "--align-net", "MAPS", "--steps", "3", "--semantic-channels", "4",
      "--discriminator", "none"], "the teacher 3"),
    ([*SMALL, "--semantic-channels", "4", "--discriminator", "none"], "no teacher"),
    ([*SMALL[2:], "--align-net", "MAPS", "--norm-groups", "2", "--steps", "3"], "--align-map"),
    ([*SMALL, "--finetune-decoder", "missing.pt"], "missing.pt"),
    (["--finetune-decoder", "STAGE", "--token-channels", "12"], "other sizes"),
    (["--finetune-decoder", "STAGE", "--init-from", "STAGE"], "not both")))
def test_mistakes_end_in_one_clear_error(stage_one, arguments, text, tmp_path):
    places = {"MAPS": stage_one / "maps.pt", "STAGE": stage_one / "one/last.pt"}
    assert text in mistake("train_tokenizer.py", *(places.get(a, a) for a in arguments), "--out",
                           "x", cwd=tmp_path)


def test_ema_leaves_frozen_parameters_alone():
    model = randomize(Tokenizer(SMALL_TOKENIZER))
    model.freeze_latents()
    ema = Ema(model, 0.9, warmup=False)
    before = {k: v.clone() for k, v in ema.model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    for name, p in ema.model.named_parameters():
        moved = name.startswith(("decoder.", "from_tokens."))
        torch.testing.assert_close(p, before[name] + 0.1 * moved, rtol=1e-5, atol=1e-6)


def test_start_from_forgets_statistics_unless_the_encoder_stays(stage_one, tmp_path):
    content = checkpoint.load(stage_one / "one/last.pt", "tokenizer")
    for run, kept in ((dict(), False), (dict(finetune_decoder="x"), True)):  # stage 1, stage 2
        net = str(stage_one / "maps.pt")
        options = TokenizerRun(out=str(tmp_path), **run)
        model = load_tokenizer(stage_one / "one/last.pt").config
        cfg = TokenizerTraining(discriminator="none", align_net=net)
        setup = Setup("tiny", model, cfg, options, torch.device("cpu"), tmp_path, None, content)
        stage = make_trainer(setup, torch.zeros(1, 3, 32, 32))
        stage.start_from(content)
        assert stage.model.has_statistics == stage.ema.model.has_statistics == kept


def test_stage_two_carries_the_discriminator_over(stage_one, tmp_path):
    """Its weights; what the optimizer knows of them begins anew."""
    stage, _ = trainer(stage_one, tmp_path, finetune_decoder="one")
    content = {"ema": stage.ema.model.state_dict(), "disc": weights(stage_one / "one/last.pt", "disc")}
    fresh = {k: v.clone() for k, v in stage.adversary.critic.state_dict().items()}
    for carry in (False, True):
        stage.cfg = dataclasses.replace(stage.cfg, carry_disc=carry)
        stage.start_from(content)
        now = stage.adversary.critic.state_dict()
        assert all(torch.equal(now[k], (content["disc"] if carry else fresh)[k]) for k in now)
    assert not all(torch.equal(fresh[k], content["disc"][k]) for k in fresh)
    assert not stage.adversary.optimizer.state
    with pytest.raises(UserError, match="one is of another layout.*--no-carry-disc"):
        stage.start_from(content | {"disc": PatchGAN(4, 1).state_dict()})
    old = dataclasses.asdict(TokenizerTraining())
    del old["carry_disc"]  # runs begun before there was a choice keep theirs
    assert not config_from_dict(TokenizerTraining, old).carry_disc
    assert TokenizerTraining().carry_disc


def test_the_noise_is_one_clamped_normal_sigma_per_image():
    """σ ~ N(0, (n/0.8)²) clamped to ±n: 42.4 % of images at the clamp, half of them each side."""
    n, count, noise = 200, 20_000, 2.5
    draw = torch.Generator().manual_seed(0)
    sigma = torch.randn(count, generator=draw)
    eps = torch.randn(count, n, 1, generator=draw)
    z = add_noise(torch.zeros(count, n, 1), noise, sigma, eps)[..., 0]
    ratio = z / eps[..., 0]  # σ, n times for every image
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=1e-5)
    s = ratio[:, 0]
    p = math.erfc(0.8 / math.sqrt(2))  # P(|N(0, 1)| > 0.8)
    clamped = (s.abs() > noise * (1 - 1e-5)).float().mean().item()
    four_sigma = 4 * math.sqrt(p * (1 - p) / count)
    assert abs(clamped - p) < four_sigma and s.abs().max() <= noise * (1 + 1e-5)
    inner = s[s.abs() < noise * (1 - 1e-5)]  # a normal of standard deviation n/0.8, cut at ±n
    below = (inner.abs() < noise / 2).float().mean().item()
    expected = math.erf(0.4 / math.sqrt(2)) / math.erf(0.8 / math.sqrt(2))
    assert abs(below - expected) < 4 * math.sqrt(0.25 / len(inner))
    spread = s.square().std().item() / math.sqrt(count)
    assert abs(s.square().mean().item() - noise_variance(noise)) < 4 * spread


def test_paper_presets_carry_the_papers_values():
    for name in ("small", "base", "large", "huge"):
        cfg, model = PRESETS[name].tokenizer_training, PRESETS[name].tokenizer
        assert (cfg.perceptual, cfg.discriminator, cfg.align) == ("required", "dino", "required")
        assert (cfg.perceptual_weight, cfg.kl_weight, cfg.adv_weight, cfg.align_weight) == (
            1.0, 0.01, 0.5, 5.0)
        assert (cfg.adv_start, cfg.adv_ramp, cfg.align_start) == (5000, 0, 20_000)
        assert (cfg.lr, cfg.batch_size, cfg.warmup_steps, cfg.lr_decay, cfg.lr_decay_every) == (
            1.92e-4, 192, 5000, 0.2, 30_000)
        assert (cfg.grad_clip, cfg.ema_decay, cfg.disc_lr) == (1.0, 0.9999, 0)
        assert model.semantic_channels == 768 and cfg.disc_head_channels == 384
