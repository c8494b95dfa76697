"""The Python interface: a trained generator with its tokenizer, from class names to images.

    from equimini import load_generator
    model = load_generator("runs/generator/last.pt")
    images = model.sample(["sea", "forest"], columns=128, seed=7)    # (2, 3, 64, 512), [-1, 1]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

from equimini import checkpoint
from equimini.autoencoder import Tokenizer
from equimini.cli import UserError, config_from_dict
from equimini.generator import Generator
from equimini.inference import LastPrepared
from equimini.presets import GeneratorConfig
from equimini.sampler import sample_columns


@dataclass
class ImageGenerator:
    """A generator, the tokenizer it was trained with, and its class names."""

    generator: Generator
    tokenizer: Tokenizer
    classes: list[str]
    prepared: LastPrepared = field(default_factory=LastPrepared, repr=False, compare=False)

    def class_numbers(self, classes: Sequence[str | int]) -> list[int]:
        """Class numbers of names or numbers (a name wins over a number that reads the same).

        Raises UserError for a class that does not exist.
        """
        numbers = []
        for wanted in classes:
            if wanted in self.classes:
                numbers.append(self.classes.index(wanted))
            elif str(wanted).isdecimal() and int(wanted) < len(self.classes):
                numbers.append(int(wanted))
            else:
                shown = ", ".join(f"{i} {name}" for i, name in enumerate(self.classes[:30]))
                more = ", …" if len(self.classes) > 30 else ""
                raise UserError(f"unknown class {wanted!r}; this generator has {shown}{more}")
        return numbers

    def sample(self, classes: Sequence[str | int], columns: int | None = None, *, seed: int = 0,
               cfg: float = 2.0, schedule: str = "linear", steps: int = 100,
               solver: str = "euler", time_shift: float = 1.0, precision: str = "float32",
               cuda_graphs: bool = False,
               progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Draw one image per entry of `classes`; image i has the seed `seed` + i.

        columns: the images' length (default: a square).  cfg: guidance scale, 1 is none;
        schedule: 'linear' or 'constant'; steps: of the solver per column; solver: 'euler',
        'midpoint' or 'heun'; time_shift: see `solvers.time_grid`; precision: of the matrix
        products, 'float32' or 'bf16'; cuda_graphs: see `graphs`; progress: wraps the loop over
        columns (tqdm, say).  Returns (B, 3, H, columns·f) in [−1, 1].
        """
        tokens = self.sample_tokens(classes, columns, [seed + i for i in range(len(classes))],
                                    cfg=cfg, schedule=schedule, steps=steps, solver=solver,
                                    time_shift=time_shift, precision=precision,
                                    cuda_graphs=cuda_graphs, progress=progress)
        return self.decode(tokens)

    def sample_tokens(self, classes: Sequence[str | int], columns: int | None,
                      seeds: Sequence[int], progress: Callable[[Iterable], Iterable] = iter,
                      precision: str = "float32", **options: Any) -> Tensor:
        """Normalised tokens (B, columns, C) of one image per class and seed; see `sample`."""
        square = self.tokenizer.config.columns
        columns = columns or square
        if self.tokenizer.config.layout == "grid" and columns != square:
            raise UserError(f"a generator over a grid draws square pictures only ({square} tokens), "
                            f"got {columns}")
        labels = torch.tensor(self.class_numbers(classes), dtype=torch.long)
        generator = self.prepared(self.generator, precision)
        drawn = sample_columns(generator, labels, columns, seeds, **options)
        return torch.stack(list(progress(drawn)), 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Normalised tokens (B, N, C) to images (B, 3, H, N·f) in [−1, 1]."""
        return self.tokenizer.decode(self.tokenizer.denormalize(tokens)).clamp(-1, 1)


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a generator's checkpoint holds of its tokenizer, so that one file is enough."""
    return {"config": asdict(tokenizer.config), "weights": tokenizer.state_dict()}


def tokenizer_inside(content: dict[str, Any], path: Any) -> Tokenizer:
    """The tokenizer that a generator's loaded checkpoint holds."""
    inside = content["tokenizer"]
    return checkpoint.tokenizer_from_dict({"config": {"model": inside["config"]},
                                           "ema": inside["weights"]}, path)


def load_generator(path: Path | str, device: str | torch.device = "cpu", ema: bool = True,
                   tokenizer_path: Path | str = "") -> ImageGenerator:
    """A trained generator (EMA or raw weights) and its tokenizer from one checkpoint file.

    tokenizer_path: the same tokenizer with a fine-tuned decoder, to take the place of the one
    inside.  Raises UserError if a file is missing, damaged, of another kind, or inconsistent.
    """
    content = checkpoint.load(path, "generator")
    tokenizer = tokenizer_inside(content, path)
    if tokenizer_path:
        finetuned = checkpoint.load_tokenizer(tokenizer_path)
        checkpoint.check_same_latents(tokenizer, finetuned, tokenizer_path)
        tokenizer = finetuned
    generator = Generator(config_from_dict(GeneratorConfig, content["config"]["model"]),
                          len(content["classes"]), tokenizer.config.token_channels)
    checkpoint.load_weights(generator, checkpoint.weights_of(content, ema, path), path)
    generator.eval().requires_grad_(False)
    return ImageGenerator(generator.to(device), tokenizer.to(device), content["classes"])
