"""Columns drawn between kept ones: what do several candidates buy (equimini/sampling/fit.py)?

    python -m equimini.experiments fits --data my/held-out/pictures

Takes columns out of held-out pictures and draws them again, with 1, 4, 16 and 64 candidates.
Measures how likely the kept right side is afterwards, by the exact likelihood of the flow, and the
gradient at the right edge of what was drawn.  Before that: whether the estimate that candidates
are weighed by ranks them as the exact likelihood does.  With --network, and nothing else then: the
Fréchet distance of many such results to other held-out pictures.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import chain, islice, pairwise, zip_longest
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from equimini.config import Checked, flag
from equimini.evaluate.feature_networks import load_network
from equimini.evaluate.metrics import Gaussian, frechet_distance
from equimini.experiments.report import Report, paired_interval, spread
from equimini.generator import Generator
from equimini.sampler import time_grid
from equimini.sampling.edit import Tokens, paste, resample
from equimini.sampling.fit import LOOK_AHEAD, log_likelihoods
from equimini.sampling.image_generator import ImageGenerator, load_generator
from equimini.sampling.options import SamplingOptions
from equimini.training.data import load_data
from equimini.training.options import DataConfig
from equimini.utils.command_line import output_folder, parse, pick_device
from equimini.utils.errors import UserError
from equimini.utils.images import grid, save_png, to_float, to_pixels

PAPER = ("bad columns are discarded and drawn again (Fig. 6, pictures only); what follows them "
         "fits by luck.")
TITLE = "Columns that fit on both sides (Fig. 6)"
FIRST = 6  # column that is taken out
SHOWN = 10  # gaps in the picture
APART = 18  # pictures are so many parts of a class apart
HEAD = ("columns drawn", "candidates", f"log-likelihood of the next {LOOK_AHEAD} kept columns, "
        "less the picture's own, nats", "more than with the first, 95 %", "gradient at the right edge",
        "seconds of processor time")
PARTS = 20  # of the pictures, each of which is left out once for an interval
DISTANCES = ("columns drawn", "candidates", "distance to other pictures", "less that of the "
             "pictures themselves, 95 %", "less than with the first, 95 %")


@dataclass(frozen=True)
class FitsConfig(Checked):
    """What is taken out of which pictures, and how it is drawn again."""

    checkpoint: str = flag("scenes", "checkpoint of a generator, or a model in the box")
    data: str = flag("synthetic", "pictures with the generator's classes, none that it was trained "
                     "on")
    pictures: int = flag(6, "how many of them, of the classes in turn", min=1)
    gaps: tuple[int, ...] = flag((1, 2, 4), "columns taken out", min=1)
    fits: tuple[int, ...] = flag((1, 4, 16, 64), "candidates; the first is what others are "
                                 "compared with", min=1)
    seeds: int = flag(3, "drawings of every gap", min=1)
    network: str = flag("", "TorchScript network of the Fréchet distance (the call of the "
                        "published Inception), or 'download'; then nothing else is measured")
    measured: int = flag(600, "pictures that are drawn again for it, once each; all others of "
                         "--data are what they are compared with", min=PARTS)
    cfg: float = flag(2.0, "guidance scale", min=0)
    steps: int = flag(10, "midpoint steps per column", min=1)
    exact_steps: int = flag(10, "midpoint steps of the exact likelihood", min=1)
    out: str = flag("runs/experiments", "folder to write to")
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


@torch.no_grad()
def exact_log_likelihood(head: nn.Module, z: Tensor, x: Tensor, steps: int = 10) -> Tensor:
    """log p(x | z) (R,) of tokens x (R, C) under the head's flow, from its divergence.

    log p_0(x_0) = log N(x_1) + ∫ div v dt along the flow to t = 1; the divergence exactly, by C
    forward-mode derivatives at every midpoint.  Time steps are smaller near the token.
    """
    basis, total = torch.eye(x.shape[1], device=x.device), x.new_zeros(len(x))
    for t, r in pairwise(reversed(time_grid(steps, shift=0.2))):
        at = [head.modulations(head.embed_time(x.new_tensor(s))[None], z) for s in (t, (t + r) / 2)]
        middle = x + (r - t) / 2 * head.velocity(x, at[0])

        def directional(e: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(lambda y: head.velocity(y, at[1]), (middle,), (e.expand_as(x),))

        v, along = torch.func.vmap(directional)(basis)  # (C, R, C), derivatives of all of v
        total, x = total + (r - t) * torch.einsum("crc->r", along), x + (r - t) * v[0]
    return total - x.square().sum(1) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)


@torch.no_grad()
def right_side(generator: Generator, tokens: Tensor, label: int,
               stop: int) -> tuple[Tensor, Tensor]:
    """The columns (R, C) from `stop` on, after what they are predicted from, z (B, R, d)."""
    labels = torch.full((len(tokens),), label, device=generator.no_class.device)
    z = generator.predict(tokens.to(labels.device), labels)
    return z[:, stop:], tokens[0, stop:].to(labels.device)


def right_likelihood(cfg: FitsConfig, model: ImageGenerator, tokens: Tensor, label: int, stop: int,
                     most: int | None = None) -> Tensor:
    """Exact log-likelihood (B, R) of each column from `stop` on, after each version's left side.

    most: measure only so many of them.
    """
    z, x = (a[..., :most, :] for a in right_side(model.generator, tokens, label, stop))
    rows = x.expand(len(z), -1, -1).flatten(0, 1)
    parts = [exact_log_likelihood(model.generator.head, a, b, cfg.exact_steps)
             for a, b in zip(z.flatten(0, 1).split(96), rows.split(96))]
    return torch.cat(parts).unflatten(0, z.shape[:2]).cpu()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two vectors."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare_estimates(cfg: FitsConfig, model: ImageGenerator, pictures: list[tuple[Tokens, int]],
                      options: SamplingOptions) -> list[tuple[str, ...]]:
    """The table of the estimate against the exact likelihood, by distance from the gap."""
    estimated, exact, stop = [], [], FIRST + 1
    for source, label in pictures:
        versions = resample(model, source, [FIRST], range(16), options)
        z, x = right_side(model.generator, versions.tokens, label, stop)
        estimated.append(torch.stack([log_likelihoods(model.generator.head, z[:, j], x[j], 1, j)
                                      for j in range(len(x))], 1).cpu())
        exact.append(right_likelihood(cfg, model, versions.tokens, label, stop))
    a, b = (torch.stack(values) for values in (estimated, exact))  # (pictures, 16, R)
    a, b = a - a.mean(1, True), b - b.mean(1, True)
    rows = [("kept column", "spread over candidates, nats", "rank correlation", "slope")]
    for name, p, q in [*((f"{j + 1}", a[..., j], b[..., j]) for j in range(a.shape[2])),
                       (f"all, estimated by {LOOK_AHEAD}", a[..., :LOOK_AHEAD].sum(2), b.sum(2))]:
        rows.append((name, f"{q.std():.1f}", f"{np.mean([*map(rank_correlation, p, q)]):.3f}",
                     f"{float((p * q).sum() / (p * p).sum()):.2f}"))
    return rows


def edge_gradients(model: ImageGenerator, tokens: Tensor, stop: int) -> tuple[float, float]:
    """Mean absolute gradient at the right edge of a gap, and at other kept columns' right edges."""
    light, f = model.decode(tokens.to(model.device)).mean(1), model.tokenizer.config.f
    gradient = (light[..., f::f] - light[..., f - 1:-1:f]).abs().mean((0, 1)).cpu()  # (N − 1,)
    others = [i for i in range(len(gradient)) if not FIRST - 1 <= i < stop]
    return float(gradient[stop - 1]), float(gradient[others].mean())


def measure(cfg: FitsConfig, model: ImageGenerator, pictures: list[tuple[Tokens, int]],
            options: SamplingOptions, gap: int, fit: int, seed: int) -> dict[str, float]:
    """One drawing of a gap in every picture: means over them; fit 0: the pictures themselves."""
    stop, found = FIRST + gap, []
    for source, label in pictures:
        began = time.process_time()
        drawn = resample(model, source, range(FIRST, stop), [seed], options,
                         fit=fit) if fit else source
        seconds = time.process_time() - began
        likely = right_likelihood(cfg, model, drawn.tokens, label, stop, LOOK_AHEAD)
        found.append((likely.sum(), seconds, *edge_gradients(model, drawn.tokens, stop)))
    likely, seconds, edge, others = np.array(found, dtype=float).T
    return {"likely": likely.mean(), "edge": edge.sum() / others.sum(), "seconds": seconds.mean()}


def held_out(cfg: FitsConfig, model: ImageGenerator) -> Iterator[tuple[Tokens, int, Tensor]]:
    """All pictures, the classes in turn, encoded: tokens, class number, pixels."""
    data, _, classes = load_data(DataConfig(data=cfg.data), model.tokenizer.config)
    numbers = getattr(data, "labels", np.arange(len(data)) % len(classes))  # built-in: in turn
    by_class = []
    for c in np.unique(numbers):
        place = np.arange((numbers == c).sum())
        order = np.lexsort((place, place % max(1, len(place) // APART)))
        by_class.append(np.flatnonzero(numbers == c)[order])
    for index in chain.from_iterable(zip_longest(*by_class)):
        if index is not None:
            image, label = data.view(int(index), None, False)
            pixels, label = to_float(image[None]), model.class_numbers([classes[label]])[0]
            tokens = model.encode(pixels).cpu()
            labels = torch.full(tokens.shape[:2], label)
            yield Tokens(tokens, labels, torch.zeros_like(labels)), label, pixels


def picture(cfg: FitsConfig, model: ImageGenerator, found: list[tuple[Tokens, int, Tensor]],
            options: SamplingOptions, gap: int) -> list[Tensor]:
    """Rows of gaps side by side: the photographs, then as drawn with each number of candidates."""
    rows, columns = [torch.cat([pixels for *_, pixels in found])], range(FIRST, FIRST + gap)
    changed = torch.zeros(found[0][0].tokens.shape[1], dtype=torch.bool)
    changed[list(columns)] = True
    for fit in cfg.fits:
        drawn = [resample(model, source, columns, [1], options, fit=fit).tokens
                 for source, *_ in found]
        after = model.decode(torch.cat(drawn).to(model.device)).cpu()
        rows.append(paste(rows[0], after, changed, model.tokenizer.config.f, fade=1))
    return rows


def further(a: Tensor, b: Tensor, reference: Gaussian) -> str:
    """How much further the features a (n, d) are from the reference than b: a 95 % interval.

    Row i of both belongs to one picture.  The jackknife: each of PARTS parts of the pictures is
    left out once, which also removes what distances of few pictures have in excess, as far as that
    goes with 1/n.
    """
    def value(kept: Tensor) -> float:
        return float(np.subtract(*(frechet_distance(Gaussian.fit(x[kept]), reference)
                                   for x in (a, b))))

    part = torch.arange(len(a)) * PARTS // len(a)
    whole = value(part >= 0)
    return "{:+.2f} to {:+.2f}".format(*paired_interval(
        [PARTS * whole - (PARTS - 1) * value(part != k) for k in range(PARTS)]))


def measure_distances(cfg: FitsConfig, model: ImageGenerator,
                      options: SamplingOptions) -> tuple[list[tuple[str, ...]], int]:
    """The table of distances, and how many pictures are compared with; all of them decoded."""
    net, found = load_network(cfg.network, device=model.device), held_out(cfg, model)

    def features(tokens: Iterable[Tensor]) -> Tensor:
        return torch.cat([net.features(to_pixels(model.decode(x.to(model.device))))
                          for x in tokens])

    sources = [source for source, *_ in islice(found, cfg.measured)]
    others = features(source.tokens for source, *_ in found)
    if len(sources) < PARTS or len(others) < 2:
        raise UserError(f"--data {cfg.data} has {len(sources) + len(others)} pictures, too few for "
                        f"--measured {cfg.measured} and others to compare them with")
    reference, real = Gaussian.fit(others), features(source.tokens for source in sources)
    own = frechet_distance(Gaussian.fit(real), reference)
    table = [DISTANCES, ("", "the pictures", f"{own:.2f}", "", "")]
    for gap in cfg.gaps:
        first = None
        for fit in cfg.fits:
            drawn = features(resample(model, source, range(FIRST, FIRST + gap), [seed], options,
                                      fit=fit).tokens for seed, source in enumerate(sources))
            first = drawn if first is None else first
            table.append((f"{gap}", f"{fit}",
                          f"{frechet_distance(Gaussian.fit(drawn), reference):.2f}",
                          further(drawn, real, reference),
                          "" if first is drawn else further(first, drawn, reference)))
            print("  ".join(table[-1]), flush=True)
    return table, len(others)


@torch.no_grad()
def main(argv: list[str]) -> None:
    cfg = parse("equimini.experiments fits", __doc__, FitsConfig(), argv)
    model = load_generator(cfg.checkpoint, pick_device(cfg.device))
    model.needs_columns("fits")
    options = SamplingOptions(cfg=cfg.cfg, solver="midpoint", steps=cfg.steps)
    if cfg.network:
        table, others = measure_distances(cfg, model, options)
        notes = [f"{cfg.measured} pictures, one drawing each, against {others} others; intervals "
                 f"95 % (jackknife over {PARTS} parts of the pictures)."]
        return Report(TITLE, PAPER, table, "Fréchet distances; see the intervals.", notes).save(
            "fits", cfg, output_folder(f"{cfg.out}/fits-distance"))
    folder = output_folder(f"{cfg.out}/fits")
    found = [*islice(held_out(cfg, model), max(cfg.pictures, SHOWN))]
    pictures = [(source, label) for source, label, _ in found[:cfg.pictures]]
    gap = cfg.gaps[min(1, len(cfg.gaps) - 1)]
    rows = picture(cfg, model, found[:SHOWN], options, gap)
    save_png(grid(rows, ["photographs", *(f"candidates: {k}" for k in cfg.fits)]),
             folder / "gaps.png")
    ranks = compare_estimates(cfg, model, pictures[:6], options)
    print("\n".join("  ".join(row) for row in ranks), flush=True)
    table, values = [HEAD], {}
    for gap in cfg.gaps:
        real = measure(cfg, model, pictures, options, gap, 0, 0)
        table.append((f"{gap}", "the picture", "0", "", f"{real['edge']:.2f}", ""))
        for fit in cfg.fits:
            runs = values[f"{gap},{fit}"] = [
                measure(cfg, model, pictures, options, gap, fit, 100 + s) for s in range(cfg.seeds)]
            first = values[f"{gap},{cfg.fits[0]}"]
            more = [run["likely"] - base["likely"] for run, base in zip(runs, first)]
            table.append((f"{gap}", f"{fit}",
                          spread([run["likely"] - real["likely"] for run in runs], 0),
                          "" if runs is first else
                          "{:+.0f} to {:+.0f}".format(*paired_interval(more)),
                          spread([run["edge"] for run in runs], 2),
                          f"{np.mean([run['seconds'] for run in runs]):.2f}"))
            print("  ".join(table[-1]), flush=True)
    notes = ["\n".join(f"| {' | '.join(row)} |" for row in (ranks[0], ["---:"] * 4, *ranks[1:])),
             f"{len(pictures)} pictures, {cfg.seeds} seeds; ± over seeds, intervals 95 % (paired "
             "by seed, Student's t)."]
    Report(TITLE, PAPER, table,
           "More candidates make the kept right side more likely; see the intervals.", notes,
           {"runs": values, "ranks": ranks}).save("fits", cfg, folder)
