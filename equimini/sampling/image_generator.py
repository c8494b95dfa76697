"""The Python interface: a trained generator with its tokenizer, from class names to images.

    from equimini import load_generator
    model = load_generator("scenes-mean-flow")   # in the box; or "runs/generator/last.pt"
    images = model.sample(["sea", "forest"], columns=128, seed=7)    # (2, 3, 128, 1024), [-1, 1]
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from equimini.autoencoder import Tokenizer
from equimini.generator import Generator, GeneratorConfig, make_generator
from equimini.sampler import Guidance, Stream
from equimini.sampling.cuda_graphs import graphed
from equimini.sampling.guide import Guide, GuidedSampler, GuidedStream
from equimini.sampling.options import SamplingOptions
from equimini.sampling.packed_weights import LastPacked
from equimini.sampling.tiled_decoder import Windows, decode_windows
from equimini.utils import checkpoint
from equimini.utils.checkpoint import tokenizer_inside
from equimini.utils.command_line import config_from_dict
from equimini.utils.errors import UserError, reading

UNMIRRORED = ("synthetic", "synthetic-object")  # the data that training does not mirror


@dataclass
class ImageGenerator:
    """A generator, the tokenizer it was trained with, and its class names."""

    generator: Generator
    tokenizer: Tokenizer
    classes: list[str]
    columns: int = 0  # of its training pictures; 0: those of a square
    mirrored: bool = True  # whether these were mirrored at random
    packed: LastPacked = field(default_factory=LastPacked, repr=False, compare=False)
    guides: dict[str, ImageGenerator] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.columns = self.columns or self.tokenizer.config.columns

    @property
    def device(self) -> torch.device:
        """Where the generator computes."""
        return self.generator.no_class.device

    def needs_columns(self, what: str) -> None:
        """Raise UserError for `what` if the tokens are no columns but patches or positions."""
        config = self.tokenizer.config
        if config.layout != "columns":
            raise UserError(f"{what}: the tokens of this generator are no columns (layout "
                            f"{config.layout}); it only draws squares of {config.columns} tokens")

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
               options: SamplingOptions = SamplingOptions(),
               progress: Callable[[Iterable], Iterable] = iter, **changed: Any) -> Tensor:
        """Draw one image per entry of `classes`; image i has the seed `seed` + i.

        columns: the images' length (default: a square).  options: how; `changed` are fields of it
        (cfg=3.0, steps=25).  progress: wraps the loop over columns (tqdm, say).
        Returns (B, 3, H, columns·f) in [−1, 1].
        """
        seeds = [seed + i for i in range(len(classes))]
        return self.decode(self.sample_tokens(classes, columns, seeds, replace(options, **changed),
                                              progress))

    def sample_tokens(self, classes: Sequence[str | int], columns: int | None,
                      seeds: Sequence[int], options: SamplingOptions = SamplingOptions(),
                      progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Normalised tokens (B, columns, C) of one image per class and seed; see `sample`."""
        columns = columns or self.tokenizer.config.columns
        labels = torch.tensor(self.class_numbers(classes))[:, None].expand(-1, columns)
        return torch.stack(list(progress(self.draw(labels, seeds, options))), 1)

    def draw(self, labels: Tensor, seeds: Sequence[int], options: SamplingOptions
             ) -> Iterator[Tensor]:
        """Yield the columns (B, C) of images whose columns have the classes `labels` (B, N)."""
        stream = self.stream(labels[:, 0], seeds, labels.shape[1], options)
        for column in labels.T:
            stream.set_class(column)
            yield stream.draw()

    def stream(self, labels: Tensor, seeds: Sequence[int], columns: int,
               options: SamplingOptions) -> Stream:
        """B images to be drawn column by column, with packed weights.

        labels: (B,); columns: their length, which guidance depends on (see `guidance`).
        """
        if columns != self.tokenizer.config.columns:
            self.needs_columns(f"a picture of {columns} tokens")
        options = options.resolved(self.generator.head)
        max_position = max(0, self.columns - 2) if options.positions == "hold" else None
        guidance = self.guidance(columns, options)
        own = self.packed(self.generator, options.precision)
        sampler, used, steps = options.column_sampler(own.head), [own], [None, None]
        if options.guide and guidance.branches == 2:
            guide = self.guide(options.guide)
            used.append(guide.packed(guide.generator, options.precision))
            sampler = GuidedSampler(sampler, options.column_sampler(used[1].head))
        if options.cuda_graphs == "on":
            sampler, *steps = self.packed.graphed(
                (options, *map(id, used)), lambda: graphed(sampler, max_position, *used))
        arguments = own, labels, seeds, sampler, guidance, max_position, steps[0]
        if len(used) == 1:
            return Stream(*arguments)
        return GuidedStream(Guide(used[1], len(seeds), max_position, steps[1]), *arguments)

    def generators(self, options: SamplingOptions) -> list[Generator]:
        """The generator, and its guide where the options name one."""
        return [self.generator, *([self.guide(options.guide).generator] if options.guide else [])]

    def guide(self, path: str) -> ImageGenerator:
        """The generator of `SamplingOptions.guide`, loaded once; raises as `load_guide` does."""
        if path not in self.guides:
            self.guides[path] = load_guide(path, self.tokenizer, self.device)
        return self.guides[path]

    def guidance(self, columns: int, options: SamplingOptions) -> Guidance:
        """Guidance of an image of this length.

        Schedule 'auto' is 'linear' up to the training pictures' length, 'constant' beyond; a
        linear one rises over guidance_columns, or (0) the image's, at most the training pictures'.
        """
        schedule = options.cfg_schedule
        if schedule == "auto":
            schedule = "linear" if columns <= self.columns else "constant"
        rise = options.guidance_columns or min(columns, self.columns)
        return Guidance(options.cfg, schedule, rise)

    @property
    def windows(self) -> Windows:
        """Windows of columns in which long pictures are decoded (docs/sampling.md)."""
        return Windows(4 * self.columns, 2 * self.columns, self.columns // 4)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, N·f) in [−1, 1] to normalised tokens (B, N, C).

        Wide ones piece by piece, as all columns attend to all others: time and memory grow with N².
        """
        def whole(x: Tensor) -> Tensor:
            return self.tokenizer.normalize(self.tokenizer.encode(x.to(self.device)))

        f, around, piece = self.tokenizer.config.f, self.columns, 8 * self.columns
        if images.shape[3] <= piece * f:
            return whole(images)
        starts = [(i, max(0, i - around)) for i in range(0, images.shape[3] // f, piece)]
        return torch.cat([whole(images[..., first * f:(i + piece + around) * f])[:, i - first:][
            :, :piece] for i, first in starts], 1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, windows: Windows | None = None) -> Tensor:
        """Normalised tokens (B, N, C) to images (B, 3, H, N·f) in [−1, 1].

        Pictures longer than one window (default: `self.windows`) are decoded piece by piece.
        """
        return decode_windows(self.decode_whole, tokens, self.tokenizer.config.f,
                              windows or self.windows)

    @torch.no_grad()
    def decode_whole(self, tokens: Tensor) -> Tensor:
        """The same in one piece, as the decoder was trained; memory grows with N."""
        return self.tokenizer.decode(self.tokenizer.denormalize(tokens)).clamp(-1, 1)


def load_generator(path: Path | str, device: str | torch.device = "cpu", ema: bool = True,
                   tokenizer_path: Path | str = "") -> ImageGenerator:
    """A trained generator (EMA or raw weights) and its tokenizer from one checkpoint file.

    path: of the file, or the name of a model in the box ('scenes').
    tokenizer_path: the same tokenizer with a fine-tuned decoder, to take the place of the one
    inside.  Raises UserError if a file is missing, damaged, of another kind, or inconsistent.
    """
    content = checkpoint.load(path, "generator")
    tokenizer = tokenizer_inside(content, path)
    if tokenizer_path:
        finetuned = checkpoint.load_tokenizer(tokenizer_path)
        checkpoint.check_same_latents(tokenizer, finetuned, tokenizer_path)
        tokenizer = finetuned
    with reading(path):
        classes = list(content["classes"])
        config = config_from_dict(GeneratorConfig, content["config"]["model"])
        generator = make_generator(config, len(classes), tokenizer.config.token_channels)
        checkpoint.load_weights(generator, checkpoint.weights_of(content, ema, path), path)
        run = content["config"].get("run", {})  # says both in files that do not themselves
        columns = content.get("columns", 0) or tokenizer.config.tokens(run.get("width", 0))
        mirrored = content.get("mirrored", run.get("latents") or run.get("data") not in UNMIRRORED)
        if not all(isinstance(name, str) for name in classes) or type(columns) is not int or (
                not 0 <= columns < 2**31):
            raise ValueError(f"{columns!r} columns, classes {str(classes)[:50]}")
    generator.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":  # convolutions take two thirds of the time so
        tokenizer.to(memory_format=torch.channels_last)
    return ImageGenerator(generator.to(device), tokenizer.to(device), classes, columns,
                          bool(mirrored))


def load_guide(path: Path | str, tokenizer: Tokenizer,
               device: str | torch.device = "cpu") -> ImageGenerator:
    """A generator whose velocity without a class guides another one of this tokenizer's tokens.

    Raises UserError as `load_generator` does, and for one of other tokens: their statistics tell
    (which convert.grow leaves as they are, and convert.pack rounds to float16).
    """
    guide = load_generator(path, device)
    mine, theirs = (torch.stack((t.latent_mean, t.latent_std)).half().cpu()
                    for t in (tokenizer, guide.tokenizer))
    if not torch.equal(mine, theirs):
        raise UserError(f"--guide {path} is a generator of another tokenizer's tokens; give one "
                        "trained on the same, such as an earlier checkpoint of the same training")
    return guide
