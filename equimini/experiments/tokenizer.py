"""The tokenizer's losses, one added after another: the paper's ablation in miniature (Table 5).

    python -m equimini.experiments tokenizer --data scenes/train --val-data scenes/val \\
        --maps-network maps.pt --metrics-network metrics.pt --steps 1200 --out runs/ablation

trains six tokenizers for the same number of steps and compares how well they reconstruct held-out
pictures.  Options that are not its own go to every training (--batch-size 32, say).  Run again,
the same command resumes.  Writes table.md, results.json and pictures.png.

What variants share is trained once.  Before --adv-start the critics do nothing, so the variants
"+ PatchGAN" and "DINO-style heads" continue "+ perceptual" from there, bit for bit as if trained
alone.  The fine-tuned decoder takes its stage 1 from the aligned variant's first steps −
finetune-steps steps: both have had the same number of steps in the end.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini.config import flag
from equimini.evaluate.feature_networks import load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance, ssim
from equimini.experiments.report import flags_given, markdown
from equimini.experiments.training_runs import TrainingRun
from equimini.losses import psnr
from equimini.pretrained.torchscript import FeatureDistance
from equimini.training.data import fixed_loader, load_data
from equimini.training.options import DataConfig
from equimini.training.split import as_trained
from equimini.utils.checkpoint import load_tokenizer
from equimini.utils.command_line import command, output_folder, override, pick_device
from equimini.utils.errors import UserError
from equimini.utils.files import claim, write_text
from equimini.utils.images import grid, save_png, to_float, to_pixels

Variant = tuple[str, TrainingRun]  # the label of its row, its training
SCORES = ("psnr", "ssim", "perceptual_distance", "frechet_distance")


@dataclass(frozen=True)
class AblationConfig(DataConfig):
    preset: str = flag("tiny", "preset of every training")
    steps: int = flag(600, "training steps of every variant", min=3)
    adv_start: int = flag(0, "step from which the critics are on; 0: after a third", min=0)
    align_start: int = flag(0, "step from which the alignment is on; 0: after a sixth", min=0)
    finetune_steps: int = flag(0, "last steps of the fine-tuned variant, which train its decoder "
                               "alone; 0: a third", min=0)
    maps_network: str = flag("", "TorchScript network from images in [-1, 1] to feature maps: for "
                             "the perceptual distance, the critic's heads and the alignment, and "
                             "for the distance in the table")
    metrics_network: str = flag("", "TorchScript network for the Fréchet distance (the call of the "
                                "published Inception), or 'download'")
    val_images: int = flag(0, "held-out pictures that are measured; 0: all", min=0)
    shown: int = flag(8, "held-out pictures that are shown", min=1)


def settings(cfg: AblationConfig, extra: list[str]) -> dict[str, Any]:
    """What the results depend on, in the form of folders made before there was a split."""
    before = {"split": "order", "class_names": "", "allow_truncated": False}
    return {name: value for name, value in asdict(cfg).items()
            if name not in ("out", "workers", "device", "shown", "index")
            and before.get(name) != value} | {"training": extra}


def variants(cfg: AblationConfig, extra: list[str]) -> tuple[list[TrainingRun], list[Variant]]:
    """Every training, in an order in which forks follow what they continue; the table's rows."""
    out, steps, net = Path(cfg.out), cfg.steps, cfg.maps_network
    common = ["--preset", cfg.preset, *flags_given(cfg, DataConfig, ["out"]), *extra]
    perceptual = [*common, "--perceptual-net", net]
    patchgan = ["--discriminator", "patchgan", "--adv-start", str(cfg.adv_start)]
    heads = ["--discriminator", "dino", "--disc-net", net, "--adv-start", str(cfg.adv_start)]
    align = ["--align-net", net, "--align-start", str(cfg.align_start)]
    no_critic = ["--discriminator", "none"]
    stage_one = steps - cfg.finetune_steps

    def run(name: str, flags: list[str], steps: int = steps, fork: TrainingRun | None = None):
        return TrainingRun("tokenizer", out / name, steps, flags, fork)
    plain = run("1-l1-kl", [*common, "--perceptual", "none", *no_critic])
    start = run("2-perceptual-start", [*perceptual, *no_critic], cfg.adv_start)
    distance = run("2-perceptual", [*perceptual, *no_critic], fork=start)
    patch = run("3-patchgan", [*perceptual, *patchgan], fork=start)
    frozen = run("4-heads", [*perceptual, *heads], fork=start)
    first = run("5-aligned-start", [*perceptual, *heads, *align], stage_one)
    aligned = run("5-aligned", first.flags, fork=first)
    finetuned = run("6-finetuned", [*perceptual, *heads, "--adv-start", "0", "--finetune-decoder",
                                    str(first.last)], cfg.finetune_steps)
    rows = [("L1 + KL", plain), ("+ perceptual", distance), ("+ PatchGAN", patch),
            ("DINO-style heads instead", frozen), ("+ alignment", aligned),
            ("+ decoder fine-tuning", finetuned)]
    return [plain, start, distance, patch, frozen, first, aligned, finetuned], rows


class Comparison:
    """The held-out pictures, their features, and the networks that compare."""

    def __init__(self, cfg: AblationConfig, run: TrainingRun) -> None:
        """run: any variant's training, for the pictures' size."""
        _, val, _ = load_data(as_trained(cfg, str(run.last)), load_tokenizer(run.last).config)
        self.device, self.cfg = pick_device(cfg.device), cfg
        self.loader: DataLoader = fixed_loader(val, 64, cfg.val_images or len(val))
        self.net = load_network(cfg.metrics_network, device=self.device)
        self.distance = FeatureDistance(cfg.maps_network).to(self.device)
        features = torch.cat([self.net.features(images) for images, _, _ in
                              tqdm(self.loader, desc="features of the originals")])
        self.count, self.real = len(features), Gaussian.fit(features)

    @torch.no_grad()
    def scores(self, label: str, run: TrainingRun) -> dict[str, float]:
        """Those of one variant's EMA tokenizer, decoding the mode μ; kept in its folder."""
        kept = run.folder / "scores.json"
        if kept.exists():
            return json.loads(kept.read_text())
        tokenizer = load_tokenizer(run.last, self.device)
        sums, features = torch.zeros(3, dtype=torch.float64), []
        for images, _, _ in tqdm(self.loader, desc=f"measuring {label}"):
            x = to_float(images.to(self.device))
            x_hat = tokenizer.decode(tokenizer.encode(x)).clamp(-1, 1)
            found = psnr(x, x_hat), ssim(x, x_hat), self.distance(x, x_hat)
            sums += torch.stack([v.sum().double().cpu() for v in found])
            features.append(self.net.features(to_pixels(x_hat)))
        frechet = frechet_distance(self.real, Gaussian.fit(torch.cat(features)))
        scores = dict(zip(SCORES, [*(sums / self.count).tolist(), frechet]))
        write_text(kept, json.dumps(scores))
        return scores

    @torch.no_grad()
    def show(self, rows: list[Variant], path: Path) -> None:
        """A row of originals above a row of each variant's reconstructions."""
        pictures = to_float(next(iter(self.loader))[0][:self.cfg.shown]).to(self.device)
        tokenizers = (load_tokenizer(run.last, self.device) for _, run in rows)
        save_png(grid([pictures, *(t.decode(t.encode(pictures)) for t in tokenizers)],
                      ["original", *(label for label, _ in rows)]), path)


def table(scores: dict[str, dict[str, float]], cfg: AblationConfig, count: int) -> str:
    """The scores of every variant as Markdown, and how they were measured."""
    rows = [("variant", "PSNR (dB) ↑", "SSIM ↑", "perceptual distance ↓", "Fréchet distance ↓")]
    rows += [(label, *(f"{s[name]:.{digits}f}" for name, digits in zip(SCORES, (2, 4, 4, 3))))
             for label, s in scores.items()]
    names = Path(cfg.maps_network).stem, Path(cfg.metrics_network).stem
    return markdown(rows) + (
        f"\n\n{cfg.steps} steps each, {count} held-out pictures, moving average of the weights; "
        f"perceptual distance by the maps of {names[0]} (which is also what the variants from "
        f"the second on are trained with), Fréchet distance between originals and "
        f"reconstructions by the features of {names[1]}.\n")


def complete(cfg: AblationConfig) -> AblationConfig:
    """The configuration with every default made explicit; raises UserError for what cannot be."""
    cfg = replace(cfg, adv_start=cfg.adv_start or cfg.steps // 3,
                  align_start=cfg.align_start or max(1, cfg.steps // 6),
                  finetune_steps=cfg.finetune_steps or cfg.steps // 3)
    for option, path, more in (("--maps-network", cfg.maps_network, ()),
                               ("--metrics-network", cfg.metrics_network, ("download",))):
        if path not in more and not Path(path).is_file():
            raise UserError(f"{option} takes a TorchScript file, got {path or 'nothing'}")
    late = max(cfg.adv_start, cfg.align_start)
    if late >= cfg.steps - cfg.finetune_steps:
        raise UserError(f"--adv-start and --align-start must lie before the fine-tuning, which "
                        f"begins at step {cfg.steps - cfg.finetune_steps}; got {late}")
    return cfg


def main(argv: list[str] | None = None) -> None:
    defaults = AblationConfig(out="runs/ablation")
    parser = command("equimini.experiments tokenizer", __doc__, defaults, epilog="All other "
                     "options go to every training (train_tokenizer.py --help).")
    args, extra = parser.parse_known_args(argv)
    cfg = complete(override(defaults, args))
    out = output_folder(cfg.out)
    begun = out / "plan.json"
    if begun.exists() and "split" not in json.loads(begun.read_text()):
        cfg = replace(cfg, split="order")
    plan = settings(cfg, extra)
    if any(out.iterdir()) and not begun.exists():
        raise UserError(f"{out} holds files that are not this experiment's; choose another --out")
    claim(out, plan, "this experiment", "give the same ones to resume it, or another --out")
    runs, rows = variants(cfg, extra)
    for run in runs:
        run.train()
    comparison = Comparison(cfg, runs[0])
    scores = {label: comparison.scores(label, run) for label, run in rows}
    comparison.show(rows, out / "pictures.png")
    text = table(scores, cfg, comparison.count)
    write_text(out / "table.md", text)
    write_text(out / "results.json", json.dumps({
        "settings": plan, "pictures": comparison.count, "command": [
            "python", "-m", "equimini.experiments", "tokenizer",
            *(sys.argv[2:] if argv is None else argv)], "scores": scores}, indent=1))
    print(f"\n{text}\n{out}/table.md, results.json, pictures.png")
