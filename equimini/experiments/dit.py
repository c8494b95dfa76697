"""Columns one by one beside a diffusion transformer over the same tokens (Table 2 in miniature).

    python -m equimini.experiments dit --data synthetic [--network inception.pt]

The transformer sees all noisy columns at once, attends to all, and is told time and class by adaLN,
as DiT.  It has the column model's width, number of blocks, optimizer and data, one time a picture,
and as many steps as take the same processor time.  It draws as the column model does, and by as
many midpoint steps as take that one's time.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from equimini.experiments.common import Lab
from equimini.experiments.probe import Probe
from equimini.experiments.report import Report, spread, verdict
from equimini.experiments.samples import BATCH, EXACT, Judge, SampledConfig, scales_text
from equimini.experiments.training_runs import TrainingRun
from equimini.flow_head import TimeMLP
from equimini.generator import MLP, GeneratorConfig, SelfAttention
from equimini.layers import LayerNorm, xavier
from equimini.noise import normal, rng, seed_torch
from equimini.presets import parameters
from equimini.rope import Rope, rope_tables, rotate
from equimini.training.cache_latents import CachedLatents
from equimini.training.data import training_loader
from equimini.training.generator_trainer import Draws, GeneratorTrainer
from equimini.utils.command_line import output_folder, parse, pick_device
from equimini.utils.files import replacing

PAPER = "gFID 5.57 with 294 M parameters, beside diffusion models of other tokenizers (Table 2)."


class Block(nn.Module):
    """Attention of all columns to all, then an MLP, each shifted, scaled and gated by adaLN."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        d = config.embed_dim
        self.norms = nn.ModuleList(LayerNorm(d, eps=1e-6) for _ in range(2))
        self.attn, self.mlp, self.ada = SelfAttention(config), MLP(config), nn.Linear(d, 6 * d)

    def attend(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, self.attn.heads, -1)).unbind(2)
        q, k, v = (a.transpose(1, 2) for a in (rotate(q, rope), rotate(k, rope), v))
        return self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, y: Tensor, rope: Rope) -> Tensor:
        """x (B, N, d), the condition y (B, 1, d)."""
        parts = self.ada(y).chunk(6, -1)
        x = x + parts[2] * self.attend(self.norms[0](x) * (1 + parts[1]) + parts[0], rope)
        return x + parts[5] * self.mlp(self.norms[1](x) * (1 + parts[4]) + parts[3])


class DiT(nn.Module):
    """The velocity v(x_t, t, class) of all columns."""

    def __init__(self, config: GeneratorConfig, num_classes: int, channels: int) -> None:
        super().__init__()
        self.config, d = config, config.embed_dim
        self.class_table, self.time_mlp = nn.Embedding(num_classes, d), TimeMLP(d)
        self.no_class = nn.Parameter(torch.zeros(1, d))
        self.x_in, self.norm_out = nn.Linear(channels, d), LayerNorm(d, eps=1e-6)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ada_out, self.x_out = nn.Linear(d, 2 * d), nn.Linear(d, channels)
        self.apply(xavier)
        nn.init.normal_(self.class_table.weight, std=0.02)
        for layer in (*(block.ada for block in self.blocks), self.ada_out, self.x_out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, drop: Tensor) -> Tensor:
        """Columns (B, N, C) at times t (B,), classes (B,); drop (B,) bool: without the class."""
        c = torch.where(drop[:, None], self.no_class, self.class_table(labels))
        y = F.silu(self.time_mlp(t) + c)[:, None]
        rope = rope_tables(torch.arange(x.shape[1], device=x.device),
                           self.config.embed_dim // self.config.heads)
        x = self.x_in(x)
        for block in self.blocks:
            x = block(x, y, rope)
        shift, scale = self.ada_out(y).chunk(2, -1)
        return self.x_out(self.norm_out(x) * (1 + scale) + shift)


class DiTTrainer(GeneratorTrainer):
    """The column model's training, with the transformer in its place."""

    def errors(self, x: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Eq. 8's errors (1, B, N), with one time for all columns of a picture."""
        u, eps = draws.u[0, :, 0], draws.eps[0]
        t = u * (1 - 1e-5) + 1e-5
        v = self.model(torch.lerp(x, eps, t[:, None, None]), t, self.on_device(labels),
                       draws.drop < self.cfg.label_dropout)
        errors = (v - (eps - x)).square().mean(2)[None]
        return errors, u[None, :, None].expand_as(errors)

    @torch.no_grad()
    def pictures(self, classes: Sequence[int], seed: int, cfg: float, solver: str,
                 steps: int) -> Tensor:
        """Pictures of the EMA weights: midpoint steps along v without class + cfg · (v with it −
        v without)."""
        shape = self.tokenizer.config.columns, self.tokenizer.config.token_channels
        x = self.on_device(normal(shape, [rng("dit", seed + i) for i in range(len(classes))]))
        drop = torch.arange(2 * len(x), device=x.device) >= len(x)

        def velocity(x: Tensor, t: float) -> Tensor:
            given, free = self.ema.model(x.repeat(2, 1, 1), x.new_full((len(drop),), t),
                                         self.on_device(torch.tensor([*classes] * 2)), drop).chunk(2)
            return torch.lerp(free, given, cfg)
        for k in range(steps):
            t, h = 1 - k / steps, 1 / steps
            x = x - h * velocity(x - h / 2 * velocity(x, t), t - h / 2)
        return self.tokenizer.decode(self.tokenizer.denormalize(x)).clamp(-1, 1)


def spent(*calls: Callable[[int], object], repeats: int = 9) -> list[float]:
    """Median processor seconds of each call, in turns, after one to warm up."""
    found = []
    for i in range(repeats + 1):
        for call in calls:
            before = time.process_time()
            call(i)
            found.append(time.process_time() - before)
    return np.median(np.reshape(found, (repeats + 1, -1))[1:], 0).tolist()


def beside(lab: Lab, run: TrainingRun, seed: int) -> tuple[DiTTrainer, dict[str, float]]:
    """The transformer beside a training of the column model, trained now if it is not yet; its
    steps and the seconds that both take for one."""
    probe = Probe(run.last, pick_device(lab.cfg.device), lab.cfg.precision)
    columns, sizes = probe.trainer(seed), (len(probe.classes), probe.tokenizer.config.token_channels)
    cfg = dataclasses.replace(columns.cfg, batch_multiplier=1, ema_decay=probe.content["config"][
        "training"]["ema_decay"])
    data = CachedLatents(str(lab.latents(seed=seed)[1]), "train", probe.tokenizer, seed)

    def fresh() -> DiTTrainer:
        seed_torch(seed, 0)
        return DiTTrainer(DiT(probe.model, *sizes).to(probe.device), probe.tokenizer,
                          probe.classes, cfg, columns.opts)

    def batches(steps: int) -> DataLoader:
        return training_loader(data, cfg.batch_size, columns.opts, 0, steps)
    dit, kept = fresh(), folder(lab, run) / "last.pt"
    if not kept.exists():
        means, labels, _ = next(iter(batches(1)))
        costs = spent(*(lambda i, of=of: of.step(i, means, labels) for of in (columns, fresh())))
        facts = {"steps": round(lab.steps * costs[0] / costs[1]), "columns": costs[0],
                 "dit": costs[1]}
        for step, (means, labels, _) in enumerate(tqdm(batches(facts["steps"]), desc="DiT")):
            dit.step(step, means, labels)
        with replacing(kept) as file:
            torch.save({"ema": dit.ema.model.state_dict(), "facts": facts}, file)
    content = torch.load(kept, map_location=probe.device, weights_only=True)
    dit.ema.model.load_state_dict(content["ema"])
    return dit, content["facts"]


def folder(lab: Lab, run: TrainingRun) -> Path:
    """Where the transformer beside this training of the column model is kept."""
    return output_folder(str(lab.runs / run.folder.name.replace("generator", "dit", 1)))


def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments dit", __doc__, SampledConfig(), argv)
    lab = Lab("dit", cfg)
    runs = lab.columns()
    dits, facts = zip(*(beside(lab, run, seed) for seed, run in enumerate(runs)))
    there = {folder(lab, run): SimpleNamespace(sample=dit.pictures, classes=dit.classes)
             for run, dit in zip(runs, dits)}
    others, judge = [TrainingRun("dit", path, 0) for path in there], Judge(cfg, lab, "columns")
    columns, of_columns = judge.load(runs[0]), judge.best(runs)
    judge.load = lambda run: there[run.folder]
    of_dit = judge.best(others)

    k, classes = EXACT["steps"], [i % len(columns.classes) for i in range(BATCH)]
    one, few, many = spent(*(lambda seed, model=model, steps=steps: model.sample(
        classes, seed=seed, cfg=2.0, **EXACT | {"steps": steps})
        for model, steps in ((columns, k), (there[others[0].folder], 1),
                             (there[others[0].folder], k))), repeats=3)
    each = (many - few) / (k - 1) if k > 1 else many
    steps = max(1, 1 + round((one - few) / each))  # of the transformer, in the columns' time
    equal = np.array([judge.distance(run, seed, scale, judge.samples, steps=steps)
                      for seed, (run, scale) in enumerate(zip(others, of_dit[0]))])
    rows = [("model", "parameters, M", "training steps", "s a step", "midpoint steps drawn with",
             "s a picture", "guidance", "distance to decoded pictures")]
    for name, model, trained, kind, drawn, time_of, (scales, distance) in (
            ("columns", columns.generator, [lab.steps], "columns", k, one, of_columns),
            ("diffusion transformer", dits[0].model, [f["steps"] for f in facts], "dit", k, many,
             of_dit),
            ("the same, in the columns' time", dits[0].model, [f["steps"] for f in facts], "dit",
             steps, few + (steps - 1) * each, (of_dit[0], equal))):
        rows.append((name, f"{parameters(model) / 1e6:.3f}", spread(trained, 0),
                     spread([f[kind] for f in facts]), str(drawn), f"{time_of / BATCH:.4f}",
                     scales_text(scales), spread(distance, 3)))
    rows.append(("training pictures, decoded (floor)", *[""] * 6, f"{judge.floor:.3f}"))
    reading = ". ".join(
        f"At equal training time, {how}: " + verdict("columns are closer", of - of_columns[1])
        for how, of in (("as many solver steps", of_dit[1]), ("equal sampling time", equal)))
    Report("Columns beside a diffusion transformer (Table 2)", PAPER, rows, f"{reading}.", [
        f"{judge.how} Times are of the processor, both models in turns; those of pictures, in "
        f"batches of {BATCH}, hold the decoding."],
        {"distances": {"columns": of_columns[1], "dit": of_dit[1], "equal time": equal},
         "facts": facts, "seconds": [one, few, many]}).write(lab)
