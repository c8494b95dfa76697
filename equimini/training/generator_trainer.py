"""One step of the generator's training (Eq. 8), and what surrounds it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from equimini.autoencoder import Tokenizer, add_noise
from equimini.config import flag
from equimini.flow_head import HeadBlock
from equimini.generator import MLP, Block, Generator, flow_matching_errors, random_crops
from equimini.mean_flow import INTERVALS
from equimini.noise import normal, rng, seed_torch, uniform
from equimini.presets import GeneratorTraining
from equimini.training.loop import (MicroBatch, Trainer, add, cooldown, micro_batches, total,
                                    warmup_decay_lr)
from equimini.training.options import PRECISIONS, RunConfig
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_content
from equimini.utils.errors import UserError, first_line
from equimini.utils.images import clean_label, grid, save_png, to_float

TOKENIZER = "runs/tokenizer/last.pt"  # where train_tokenizer.py leaves it
PARTS = (Block, MLP, HeadBlock)  # what is compiled; the class tokens' way calls MLP by itself
T_BINS = 8  # parts of t whose losses are logged


@dataclass(frozen=True)
class GeneratorRun(RunConfig):
    """The run's options, and those of the generator alone."""

    tokenizer: str = flag("", "checkpoint of the trained tokenizer; empty: the one inside the "
                          f"checkpoint of --resume or --init-from, else {TOKENIZER}")
    latents: str = flag("", "folder made by python -m equimini.training.cache_latents, in place of --data")
    precision: str = flag("float32", "arithmetic of the matrix products; tf32 (CUDA: 10 bits of "
                          "mantissa) and bf16 (autocast: 7) are several times faster where the "
                          "processor has them", choices=PRECISIONS)
    compile: bool = flag(False, "compile the blocks of transformer and head in the first step, which "
                         "takes about a minute; worth it on GPUs")
    fused_optimizer: bool = flag(True, "AdamW in one pass over the weights")
    checkpoint_activations: bool = flag(False, "less memory, more time: activations inside the "
                                        "blocks are computed again for the backward pass")
    trained: str = flag("all", "weights that are trained: all, or those of the flow head alone",
                        choices=("all", "head"))
    guide: str = flag("", "with --objective mean-flow: checkpoint of a worse generator of the same "
                      "tokens, such as an earlier one of the same training, whose velocity without "
                      "class guides in place of the teacher's own; empty: the teacher's")
    preview_cfg: float = flag(2.0, "guidance scale of the preview pictures; 1: none", min=0)
    preview_steps: int = flag(25, "Euler steps per column of the preview pictures", min=1)


class Draws(NamedTuple):
    """All that is random in the loss of B images but for dropout, keyed per image."""

    sigma: Tensor  # (B,) normal
    noise: Tensor  # (B, N, C) normal: σ-noise on the tokens, with sigma
    u: Tensor  # (M, B, N) uniform: the flow's times
    eps: Tensor  # (M, B, N, C) normal: the flow's noise
    drop: Tensor  # (B,) uniform: below the label dropout, the class is left out
    starts: Tensor  # (B, k) uniform: places of crops, k = 0 without --real-equivariant
    more: Tensor  # (n, B, N) uniform: for mean_flow_errors, n = 0 without it
    shift: int | Tensor = 0  # of positions: of all images, or of each (B,)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Draws":
        """These, with the function applied to every tensor."""
        return Draws(*(function(x) if isinstance(x, Tensor) else x for x in self))


class Prefetcher:
    """Calls a pure function(step, …), always the same one, and for step + 1 in another thread.

    If the next call is for that step, with the same rest, its result is ready.  An error is
    raised by the call for its step.  Results of two steps are in memory, and the last one was
    made for nothing.
    """

    def __init__(self) -> None:
        self.pool, self.expected, self.coming = ThreadPoolExecutor(1), None, None

    def __call__(self, function: Callable[..., Any], step: int, *more: Any) -> Any:
        there = self.expected == (step, *more)
        result = self.coming.result() if there else function(step, *more)
        self.expected = step + 1, *more
        self.coming = self.pool.submit(function, *self.expected)
        return result


class GeneratorTrainer(Trainer):
    """The generator, its frozen tokenizer and the optimizer; `step` is one training step."""

    def __init__(self, model: Generator, tokenizer: Tokenizer, classes: list[str],
                 cfg: GeneratorTraining, opts: GeneratorRun,
                 sample: Callable[[Generator, list[str]], Tensor] | None = None) -> None:
        """model, tokenizer: on the device; sample: from a generator and n class names to pictures
        (n, 3, H, W), for the previews."""
        if cfg.subtasks and model.config.real_equivariant:
            raise UserError("--subtasks are places in the picture, which --real-equivariant does "
                            "not train on; give one of the two")
        self.tokenizer, self.classes, self.sample = tokenizer, classes, sample
        if opts.trained == "head":
            model.requires_grad_(False).head.requires_grad_(True)
        super().__init__(model, cfg, opts, model.no_class.device, adamw(
            weight_decay_groups(model, cfg.weight_decay), cfg.lr, opts.fused_optimizer),
            ema_warmup=False)
        if opts.checkpoint_activations:
            model.checkpoint_activations()
        self.flow_errors = compiled(flow_matching_errors) if opts.compile else flow_matching_errors
        self.prefetch = Prefetcher()
        self.columns = 0  # of the training pictures, once one has been seen
        self.mirrored = True  # whether these are mirrored at random

    def step(self, step: int, data: Tensor, labels: Tensor) -> dict:
        """One step of the generator (Eq. 8).

        data, as in `tokens`, and labels (B,): this process's local batch.  Returns the scalars to
        log, and the loss of every column and of T_BINS equal parts of t from 0 to 1.
        """
        cfg, sums = self.cfg, {}
        for part, draws in self.prefetch(self.step_draws, step, len(data), *self.shape(data)):
            seed_torch(self.seed, 1, step, part.places[0])  # dropout
            draws = draws.map(self.on_device)
            x = self.tokens(data[part.rows], draws)  # encode: (B, N, C)
            self.columns = x.shape[1]
            errors, u = self.errors(x, labels[part.rows], draws)  # (M, B, N)
            chosen = errors[:, :, list(cfg.subtasks)] if cfg.subtasks else errors
            loss = part.weight * chosen.mean()
            loss.backward()
            add(sums, {"loss": loss, "loss_per_column": part.weight * errors.mean((0, 1)),
                       **sums_by_time(errors, u)})
        found = total(sums)
        lr = (warmup_decay_lr(step, cfg.lr, cfg.warmup_steps)
              * cooldown(step, cfg.steps, cfg.lr_cooldown))
        norm = self.stepper(lr, cfg.grad_clip)  # AdamW
        self.ema.update(self.model)
        return {"loss": found["loss"], "lr": lr, "grad_norm": norm,
                "loss_per_column": [round(v, 5) for v in found["loss_per_column"]],
                "loss_per_t": [round(s / n, 5) if n else None
                               for s, n in zip(found["t_sums"], found["t_counts"])]}

    @torch.no_grad()
    def tokens(self, data: Tensor, draws: Draws) -> Tensor:
        """uint8 images (B, 3, H, W), or their cached means μ (B, N, C), to normalised noisy
        tokens (B, N, C): the transformer's input and the flow's target."""
        mean = self.on_device(data)
        if data.dtype == torch.uint8:
            with self.autocast():
                mean = self.tokenizer.encode(to_float(mean)).float()
        z = add_noise(mean, self.tokenizer.config.noise, draws.sigma, draws.noise)
        return self.tokenizer.normalize(z)

    def errors(self, x: Tensor, labels: Tensor,
               draws: Draws) -> tuple[Tensor, Tensor]:
        """Eq. 8's errors (M, B, N) on tokens (B, N, C), and their u."""
        labels = self.on_device(labels)
        if self.model.config.real_equivariant:
            x, labels, draws = self.crops(x, labels, draws)
        with self.autocast():
            return self.flow_errors(self.model, x, labels, draws.u, draws.eps,
                                    draws.drop < self.cfg.label_dropout, draws.shift), draws.u

    def crops(self, x: Tensor, labels: Tensor,
              draws: Draws) -> tuple[Tensor, Tensor, Draws]:
        """A batch of random crops of W columns (Eq. 6): as many of each image as it is long."""
        w, n, k = self.model.config.window, x.shape[1], draws.starts.shape[1]
        if k == 0:
            raise UserError(f"--window {w} is longer than the pictures of {n} columns, of which "
                            "--real-equivariant takes crops")

        u, eps, more = (a[:, :, :k * w].unflatten(2, (k, w)).flatten(1, 2)
                        for a in (draws.u, draws.eps, draws.more))
        labels, drop, shift = (a.repeat_interleave(k) if isinstance(a, Tensor) else a
                               for a in (labels, draws.drop, draws.shift))  # (B,) to (B·k,)
        return (random_crops(x, w, (draws.starts * (n - w + 1)).long()), labels,
                draws._replace(u=u, eps=eps, more=more, drop=drop, shift=shift))

    def shape(self, data: Tensor) -> tuple[int, int]:
        """(N, C) of the tokens of uint8 images (B, 3, H, W), or of cached means (B, N, C)."""
        if data.dtype != torch.uint8:
            return data.shape[1], data.shape[2]
        config = self.tokenizer.config
        return config.tokens(data.shape[3]), config.token_channels

    def draws(self, rngs: list, n: int, c: int) -> Draws:
        """What is random in the loss of len(rngs) images of n tokens of c channels; on the CPU."""
        m, config = self.cfg.batch_multiplier, self.model.config
        crops = n // config.window if config.real_equivariant else 0
        more = INTERVALS if config.objective == "mean-flow" else 0
        return Draws(sigma=normal((), rngs), noise=normal((n, c), rngs),
                     u=uniform((m, n), rngs).transpose(0, 1),
                     eps=normal((m, n, c), rngs).transpose(0, 1),
                     drop=uniform((), rngs), starts=uniform((crops,), rngs),
                     more=uniform((more, n), rngs).transpose(0, 1))

    def step_draws(self, step: int, images: int, n: int,
                   c: int) -> list[tuple[MicroBatch, Draws]]:
        """The micro-batches of the local batch of `images` images, each with its draws."""
        found = []
        for part in micro_batches(images, self.opts.accumulate):
            rngs = [rng("flow", self.seed, step, place) for place in part.places]
            draws = self.draws(rngs, n, c)._replace(shift=self.shift(step, part))
            cuda = self.device.type == "cuda"  # pinned, as the loader's batches are
            found.append((part, draws.map(Tensor.pin_memory) if cuda else draws))
        return found

    def shift(self, step: int, part: MicroBatch) -> int | Tensor:
        """The position augmentation: one number for each group of images of the global batch."""
        size, below = self.cfg.shift_group, self.cfg.position_shift
        if not size:
            return int(rng("shift", self.seed, step).integers(below))
        groups = [place // size for place in part.places]
        drawn = {g: int(rng("shift", self.seed, step, g).integers(below)) for g in set(groups)}
        return torch.tensor([drawn[g] for g in groups])  # (B,)

    def on_device(self, x: Tensor) -> Tensor:
        """From pinned memory to a GPU without waiting for the copy."""
        return x.to(self.device, non_blocking=self.device.type == "cuda")

    def more_state(self) -> dict:
        return {"columns": self.columns, "mirrored": self.mirrored,
                "tokenizer": tokenizer_content(self.tokenizer)}  # sampling needs these

    def load_state(self, state: dict) -> None:
        """The inverse of `state`; raises UserError if the run had another tokenizer."""
        mine = self.tokenizer.state_dict()
        theirs = state["tokenizer"]["weights"]
        if mine.keys() != theirs.keys() or any(
                not torch.equal(mine[k].cpu(), theirs[k]) for k in mine):
            raise UserError("the run to resume was trained with another tokenizer than --tokenizer")
        super().load_state(state)
        self.columns = state.get("columns", 0)

    def start_from(self, state: dict) -> None:
        """Take the EMA weights of another generator's checkpoint as the initial ones.

        Its classes keep their embeddings; other classes start as "no class".
        """
        weights, known = dict(state["ema"]), state["classes"]
        old = weights["class_table.weight"]
        rows = [old[known.index(name)] if name in known else weights["no_class"][0]
                for name in self.classes]
        weights["class_table.weight"] = torch.stack(rows)
        for model in (self.model, self.ema.model):
            checkpoint.load_weights(model, weights, "--init-from")
        new = [name for name in self.classes if name not in known]
        print(f"starting from the weights of {self.opts.init_from}; new classes: "
              f"{', '.join(map(clean_label, new)) or 'none'}")

    @torch.no_grad()
    def validate(self, loader) -> dict:
        """Loss of the EMA generator, always with the same noise, and the same per column."""
        sums = {}
        for data, labels, indices in loader:
            draws = self.draws([rng("validation", int(i)) for i in indices], *self.shape(data))
            draws = draws.map(self.on_device)
            x = self.tokens(data, draws)
            loss = self.held_out_errors(x, self.on_device(labels), draws).mean(0)  # (B, N)
            add(sums, {"columns": loss.cpu().double().sum(0), "count": torch.tensor(len(x))})
        if not sums:  # more processes than pictures
            sums = {"columns": torch.zeros(self.columns).double(), "count": torch.tensor(0)}
        found = total(sums)
        columns = [v / found["count"] for v in found["columns"]]
        return {"val_loss": sum(columns) / len(columns),
                "val_loss_per_column": [round(v, 6) for v in columns]}

    def held_out_errors(self, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Eq. 8's errors (M, B, N) of the EMA weights."""
        return flow_matching_errors(self.ema.model, x, labels, draws.u, draws.eps)

    def preview(self, path: Path) -> None:
        """Samples of up to eight classes: raw weights on the left, EMA weights on the right."""
        names = self.classes[:8]
        raw, average = (self.sample(model, [n for n in names for _ in range(4)]).unflatten(
            0, (len(names), 4)) for model in (self.model.eval(), self.ema.model))
        self.model.train()
        sheet = torch.cat((raw, torch.ones_like(raw[:, :1]), average), 1)
        save_png(grid(list(sheet), [f"{name} (raw, EMA)" for name in names]), path)


def sums_by_time(errors: Tensor, u: Tensor) -> dict[str, Tensor]:
    """Sums and counts of errors in T_BINS equal parts of t; both (M, B, N), u ~ t in [0, 1]."""
    bins = (u * T_BINS).long().clamp(max=T_BINS - 1).flatten()
    zeros = errors.new_zeros(T_BINS)
    return {"t_sums": zeros.index_add(0, bins, errors.detach().flatten()),
            "t_counts": zeros.index_add(0, bins, torch.ones_like(u).flatten())}


def weight_decay_groups(generator: Generator, weight_decay: float) -> list[dict]:
    """AdamW's groups of trained parameters: no decay on biases, norms and the flow head."""
    decayed, free = [], []
    for name, p in generator.named_parameters():
        if p.requires_grad:
            (free if p.dim() == 1 or name.startswith("head.") else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": free, "weight_decay": 0.0}]


def compiled(loss: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`loss`, with the blocks of the models among its arguments compiled at its first call.

    Block by block: all of a kind are one program, so depth costs no time to compile.
    """
    def call(*args: Any) -> Any:
        for model in args:
            for part in model.modules() if isinstance(model, nn.Module) else ():
                if isinstance(part, PARTS) and part._compiled_call_impl is None:
                    part.compile(backend=backend, fullgraph=True, dynamic=False)
        try:
            return loss(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"--compile does not work here ({first_line(error)}); on a CPU it "
                            "needs a C++ compiler, on a GPU triton; leave it out") from error

    return call


def adamw(groups: list[dict], lr: float, fused: bool) -> torch.optim.AdamW:
    """The generator's optimizer; fused: each weight read and written once per step."""
    try:
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused or None)
    except RuntimeError as error:
        raise UserError(f"--fused-optimizer does not work here ({first_line(error)}); give "
                        "--no-fused-optimizer") from None
