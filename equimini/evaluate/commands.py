"""Measure a trained generator or tokenizer against real pictures.

    python -m equimini.evaluate generator --network NET.pt --n 1000 --cfg 1,2,3
    python -m equimini.evaluate tokenizer --network NET.pt --data my/pictures
    torchrun --nproc-per-node=4 -m equimini.evaluate generator --samples 50000 ...

The last one shares the work among 4 processes (torchrun would take --n for its own option).
Writes report.json, and pictures, into --out, and prints the table.  Stopped, the same command goes
on where it was.  What the numbers mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equimini import load_generator
from equimini.autoencoder import Tokenizer, TokenizerConfig
from equimini.config import flag
from equimini.evaluate.feature_networks import FeatureNetwork, load_network
from equimini.evaluate.feature_shards import (SHOWN, RealPictures, Reconstructions, Samples,
                                              measure, read_all)
from equimini.evaluate.report import (Reference, compare, distance_name, notes, print_report,
                                      read_reference, score_reference)
from equimini.pretrained.published_weights import load_lpips
from equimini.pretrained.torchscript import FeatureDistance
from equimini.sampler import SCHEDULES, SOLVERS
from equimini.sampling.commands import check_device
from equimini.sampling.options import SamplingOptions
from equimini.sampling.packed_weights import PRECISIONS
from equimini.training.data import Synthetic, load_data
from equimini.training.options import DataConfig
from equimini.training.split import as_trained
from equimini.utils import distributed
from equimini.utils.checkpoint import find, load_any_tokenizer, tokenizer_hash, weights_hash
from equimini.utils.command_line import add_flags, output_folder, override
from equimini.utils.errors import UserError
from equimini.utils.files import claim, file_hash, remove_leftovers, write_text
from equimini.utils.images import grid, save_png, to_float
from equimini.utils.plot import curves


@dataclass(frozen=True)
class EvaluateConfig(DataConfig):
    """What is measured, against what, with which network."""

    checkpoint: str = flag("", "checkpoint to measure")
    weights: str = flag("ema", "moving average of the weights, or the raw ones",
                        choices=("ema", "raw"))
    seed: int = flag(0, "the --seed of the training: with it the same pictures of --data are held "
                     "out", min=0, max=2**32 - 1)
    n: int = flag(1000, "pictures measured; published FIDs use 50000", min=4)
    reference: str = flag("", "what pictures are compared with: a folder of images, 'synthetic' / "
                          "'synthetic-object', or an .npz file with mu and sigma; empty: the "
                          "held-out pictures of --data")
    network: str = flag("", "TorchScript network that gives the features, called as the Inception "
                        "of StyleGAN2-ADA is; 'download': that one")
    network_sha256: str = flag("", "hash that the network's file must have")
    lpips_weights: str = flag("", "LPIPS of reconstructions: 'download', a folder with "
                              "vgg16-397923af.pth and LPIPS v0.1's vgg.pth, or the two files with "
                              "a comma between")
    maps_network: str = flag("", "TorchScript network whose feature maps give a perceptual "
                             "distance of reconstructions; empty: none")
    batch_size: int = flag(64, "pictures computed at a time", min=1)
    cache: str = flag("runs/features", "folder where features of real pictures and of "
                      "reconstructions are kept, for all evaluations")


@dataclass(frozen=True)
class GeneratorEvaluation(EvaluateConfig):
    """How a generator draws its samples."""

    cfg: str = flag("2", "guidance scale; several with commas: all of them, and a curve")
    cfg_schedule: str = flag("linear", "guidance from 1 up to --cfg over the columns, or --cfg "
                             "throughout", choices=SCHEDULES)
    steps: int = flag(100, "steps of the solver per column", min=1)
    solver: str = flag("euler", "how a column follows the head's flow", choices=tuple(SOLVERS))
    time_shift: float = flag(1.0, "above 1: smaller steps near the noise, below 1: near the "
                             "token; 1: equal steps", min=1e-3)
    temperature: float = flag(1.0, "factor on the noise that columns start from; above 1: more "
                              "detail and variety, below 1: smoother", min=0)
    precision: str = flag("float32", "arithmetic of the generator's matrix products",
                          choices=tuple(PRECISIONS))
    cuda_graphs: str = flag("off", "on: replay recorded kernels, which is faster for few "
                            "pictures at a time; needs CUDA", choices=("off", "on"))
    tokenizer: str = flag("", "checkpoint of the generator's tokenizer with a fine-tuned decoder; "
                          "empty: the tokenizer inside the generator's checkpoint")
    sample_seed: int = flag(0, "seed of the first sample; the next ones count up", min=0)
    reference_n: int = flag(0, "pictures of the reference, at most; 0: all", min=0)
    keep_images: bool = flag(False, "keep every sample as a PNG in OUT/images")
    overwrite: bool = flag(False, "drop samples of other settings that --out holds")


GENERATOR = GeneratorEvaluation(checkpoint="runs/generator/last.pt", out="runs/evaluate-generator")
TOKENIZER = EvaluateConfig(checkpoint="runs/tokenizer/last.pt", out="runs/evaluate-tokenizer")


class Bench:
    """What both commands share: the network, the data, the folders."""

    def __init__(self, cfg: EvaluateConfig, shape: TokenizerConfig, device: torch.device) -> None:
        self.cfg, self.out, self.cache = cfg, output_folder(cfg.out), output_folder(cfg.cache)
        for folder in (self.out, self.cache, *self.out.glob("*/cfg-*")):
            remove_leftovers(folder)
        with distributed.main_first():
            self.net = load_network(cfg.network, cfg.network_sha256, device)
        self.distances = perceptual_distances(cfg, device)
        cfg = as_trained(cfg, cfg.checkpoint)
        self.train, self.held_out, self.classes = load_data(cfg, shape)
        self.statistics = None  # published ones, if the reference is such
        if cfg.reference.endswith(".npz"):
            self.statistics = read_reference(cfg.reference)
        elif cfg.reference:
            self.held_out = reference_data(cfg, shape)
        for data, name in ((self.train, "--data"), (self.held_out, "the reference")):
            if len(data) < 4:
                raise UserError(f"{name} has {len(data)} pictures; it takes at least 4")
        self.try_network()

    def try_network(self) -> None:
        """Find out on one picture, not after hours, that the network does not serve."""
        picture = torch.zeros(1, 3, self.train.height, self.train.width, dtype=torch.uint8)
        found = self.net.features(picture).shape[1]
        if self.statistics and found != len(self.statistics.gaussian.mean):
            raise UserError(f"--reference {self.cfg.reference} has "
                            f"{len(self.statistics.gaussian.mean)} features, the network {found}; "
                            "give the --network that the statistics were made with")

    def real(self, data: Any, n: int) -> RealPictures:
        """The first n pictures of a data set (in its fixed random order)."""
        return RealPictures(data, n, self.net.sha256, self.cache, self.cfg.batch_size,
                            self.cfg.workers)

    def reconstructed(self, pictures: RealPictures, tokenizer: Tokenizer) -> Reconstructions:
        """What the tokenizer makes of them."""
        return Reconstructions(pictures, self.net.sha256, tokenizer, self.distances)

    def reference(self, n: int) -> Reference:
        """The published statistics, or those of n reference pictures."""
        if self.statistics:
            return self.statistics
        pictures = self.real(self.held_out, n)
        measure(pictures, self.net, "reference")
        return score_reference(pictures, self.cfg.reference or self.cfg.val_data
                               or f"held out of {self.cfg.data}")


def perceptual_distances(cfg: EvaluateConfig,
                         device: torch.device) -> dict[str, tuple[str, torch.nn.Module]]:
    """By name, a hash of the network's weights (or file) and the distance, where asked for."""
    found = {}
    if cfg.lpips_weights:
        lpips = load_lpips(cfg.lpips_weights)
        found["lpips"] = weights_hash(lpips.state_dict()), lpips.to(device)
    if cfg.maps_network:
        maps = FeatureDistance(cfg.maps_network)
        found["feature_distance"] = file_hash(cfg.maps_network), maps.to(device)
    return found


def reference_data(cfg: EvaluateConfig, shape: TokenizerConfig) -> Any:
    """The data set --reference, all of it: a folder, or the built-in held-out pictures."""
    other = dataclasses.replace(cfg, data=cfg.reference, val_data="")
    if cfg.reference in ("synthetic", "synthetic-object"):
        return load_data(other, shape)[1]
    return load_data(dataclasses.replace(other, val_data=cfg.reference), shape)[1]


def scales(text: str) -> list[float]:
    """The numbers of --cfg, each once, in order.  Raises UserError for anything else."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(math.isfinite(s) and s >= 0 for s in found):
        raise UserError(f"--cfg takes numbers of at least 0, with commas between, got {text!r}")
    return found


def drop_samples(out: Path) -> None:
    """Delete the samples in a folder, and then the note on what they were made with."""
    for old in (*out.glob("samples/cfg-*/*.npz"), *out.glob("images/cfg-*/class*_seed*.png")):
        old.unlink()
    (out / "plan.json").unlink(missing_ok=True)


def sampling(cfg: GeneratorEvaluation, scale: float) -> SamplingOptions:
    """The options of sampling at one guidance scale."""
    return SamplingOptions(
        cfg=scale, cfg_schedule=cfg.cfg_schedule, solver=cfg.solver, steps=cfg.steps,
        time_shift=cfg.time_shift, temperature=cfg.temperature, precision=cfg.precision,
        cuda_graphs=cfg.cuda_graphs)


def evaluate_generator(cfg: GeneratorEvaluation, device: torch.device) -> None:
    """Samples at every scale against the reference; beside them the floor and the limit."""
    found = scales(cfg.cfg)
    check_device(sampling(cfg, 0), device)
    model = load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)
    shape = model.tokenizer.config
    bench = Bench(cfg, shape, device)
    if isinstance(bench.train, Synthetic) and bench.classes != model.classes:
        raise UserError(f"--data {cfg.data} has the classes {', '.join(bench.classes)}, the "
                        f"generator {', '.join(model.classes[:30])}; give --data the pictures it "
                        "was trained on")
    columns = (cfg.width or shape.image_size) // shape.f
    settings = {"schedule": cfg.cfg_schedule, "solver": cfg.solver, "steps": cfg.steps,
                "time_shift": cfg.time_shift, "temperature": cfg.temperature,
                "precision": cfg.precision, "seed": cfg.sample_seed, "columns": columns}
    plan = {"checkpoint": file_hash(find(cfg.checkpoint)), "weights": cfg.weights,
            "tokenizer": tokenizer_hash(model.tokenizer), "network": bench.net.sha256, **settings}
    with distributed.main_first():
        if distributed.is_main():
            if cfg.overwrite:
                drop_samples(bench.out)
            claim(bench.out, plan, "samples", "choose another --out, or add --overwrite")
    sets = {}
    for scale in found:
        keep = output_folder(str(bench.out / f"images/cfg-{scale}")) if cfg.keep_images else None
        sets[scale] = Samples(model, cfg.n, columns, cfg.sample_seed, sampling(cfg, scale),
                              bench.out / f"samples/cfg-{scale}", cfg.batch_size, keep)
        measure(sets[scale], bench.net, f"samples, cfg {scale:g}")
    floor = bench.real(bench.train, cfg.n)
    measure(floor, bench.net, "floor: training pictures")
    limit = bench.reconstructed(floor, model.tokenizer)
    measure(limit, bench.net, "limit: reconstructions")
    reference = bench.reference(cfg.reference_n or len(bench.held_out))
    if distributed.is_main():
        rows = [{"set": "samples", "cfg": scale, **compare(read_all(s), reference)}
                for scale, s in sets.items()]
        rows += [{"set": "tokenizer's limit", **compare(read_all(limit), reference)},
                 {"set": "floor (real pictures)", **compare(read_all(floor), reference)}]
        left_out = draw_sweep(bench.out, sets, rows, bench.net, cfg.n)
        finish(bench, "generator", rows, reference, floor, {**settings, "sample k":
               f"class k mod {len(model.classes)}, seed {cfg.sample_seed} + k"},
               model.classes, left_out)


def draw_sweep(out: Path, sets: dict[float, Samples], rows: list[dict], net: FeatureNetwork,
               n: int) -> str:
    """The first pictures of every scale below each other; of several scales, the curve.

    Returns what could not be drawn.
    """
    pictures = [to_float(read_all(s)["shown"][:n]) for s in sets.values()]
    save_png(grid(pictures, [f"cfg {scale:g}" for scale in sets]), out / "samples.png")
    if len(sets) < 2:
        return ""
    samples = [row for row in rows if row["set"] == "samples"]
    line = [(row["cfg"], row["frechet_distance"]) for row in samples]
    levels = {row["set"]: row["frechet_distance"] for row in rows if row["set"] != "samples"}
    return curves(out / "curve.png", {"samples": line}, "guidance scale", "Frechet distance",
                  distance_name(net, n), levels)


def evaluate_tokenizer(cfg: EvaluateConfig, device: torch.device) -> None:
    """Reconstructions of held-out pictures; beside them training pictures as they are."""
    tokenizer = load_any_tokenizer(cfg.checkpoint, device, cfg.weights == "ema")
    bench = Bench(cfg, tokenizer.config, device)
    originals = bench.real(bench.held_out, cfg.n)
    decoded = bench.reconstructed(originals, tokenizer)
    measure(decoded, bench.net, "reconstructions")
    floor = bench.real(bench.train, cfg.n)
    measure(floor, bench.net, "floor: training pictures")
    reference = bench.reference(cfg.n)
    if distributed.is_main():
        paired = reference.features is not None  # then it is the originals
        rows = [{"set": "reconstructions", **compare(read_all(decoded), reference, paired)},
                {"set": "floor (real pictures)", **compare(read_all(floor), reference)}]
        finish(bench, "tokenizer", rows, reference, floor,
               {"decoded": "from the mode of the posterior"})
        before = torch.cat([x for x, _ in originals.batches(0, min(SHOWN, originals.n))])
        after = read_all(decoded)["shown"]
        save_png(grid([to_float(before), to_float(after)], ["original", "decoded"]),
                 bench.out / "reconstructions.png")


def finish(bench: Bench, kind: str, rows: list[dict], reference: Reference, floor: RealPictures,
           settings: dict[str, Any], classes: list[str] | None = None, left_out: str = "") -> None:
    """Write report.json and print it.  classes: the generator's; left_out: what was not drawn."""
    cfg = bench.cfg
    remarks = notes(rows, reference, bench.net, floor) + ([left_out] if left_out else [])
    if classes not in (None, bench.classes):
        remarks.append("the generator's classes are not those of --data")
    report = {
        "what": kind, "distance": distance_name(bench.net, rows[0]["n"], kind),
        "checkpoint": {"file": Path(cfg.checkpoint).name, "sha256": file_hash(find(cfg.checkpoint)),
                       "weights": cfg.weights},
        "network": bench.net.describe(), "reference": reference.about, "settings": settings,
        "distances": {name: sha256 for name, (sha256, _) in bench.distances.items()},
        "pixels": f"{floor.data.width}x{floor.data.height}", "results": rows, "notes": remarks}
    write_text(bench.out / "report.json", json.dumps(report, indent=1))
    print_report(report)
    print(f"written to {bench.out}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m equimini.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="generator|tokenizer")
    for defaults, function in ((GENERATOR, evaluate_generator), (TOKENIZER, evaluate_tokenizer)):
        name = function.__name__.removeprefix("evaluate_")
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                      allow_abbrev=False)
        add_flags(command, defaults, "options")
        command.set_defaults(function=function, defaults=defaults)
        command.add_argument("--samples", dest="n", type=int, metavar="N",
                             default=argparse.SUPPRESS, help="the same as --n, which torchrun "
                             "takes for one of its own options")
    args = parser.parse_args(argv)
    cfg = override(args.defaults, args)
    device = distributed.local_device(cfg.device)
    with distributed.processes(device):
        try:
            args.function(cfg, device)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            raise
