"""Measure a trained generator or tokenizer, or any pictures, against real pictures.

    python -m equimini.evaluate generator --network NET.pt --n 1000 --cfg 1,2,3
    python -m equimini.evaluate tokenizer --network NET.pt --data my/pictures
    python -m equimini.evaluate images samples.npz --reference my/pictures --network NET.pt
    torchrun --nproc-per-node=4 -m equimini.evaluate generator --samples 50000 ...

The last one shares the work among 4 processes (torchrun would take --n for its own option).
Writes report.json, and pictures, into --out, and prints the table.  Stopped, the same command goes
on where it was.  What the numbers mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from equimini import load_generator
from equimini.autoencoder import TokenizerConfig
from equimini.evaluate.enlarged import Enlarged
from equimini.evaluate.feature_networks import FeatureNetwork, load_network
from equimini.evaluate.feature_shards import (SHARD, SHOWN, RealPictures, Reconstructions, Samples,
                                              measure, read_all)
from equimini.evaluate.metrics import frechet_distance
from equimini.evaluate.options import (GENERATOR, IMAGES, TOKENIZER, EvaluateConfig,
                                       GeneratorEvaluation, ImagesEvaluation, NetworkConfig,
                                       sampling)
from equimini.evaluate.report import compare, distance_name, notes, write_report
from equimini.evaluate.sources import Reference, open_source, score_reference
from equimini.pretrained.published_weights import load_lpips
from equimini.pretrained.torchscript import FeatureDistance
from equimini.sampling.commands import check_device
from equimini.training.data import Synthetic, load_data
from equimini.training.options import BUILT_IN, DataConfig
from equimini.training.split import as_trained, open_pictures
from equimini.utils import distributed
from equimini.utils.checkpoint import find, load_any_tokenizer, tokenizer_hash, weights_hash
from equimini.utils.command_line import add_flags, command, output_folder, override
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import claim, file_hash, remove_leftovers
from equimini.utils.images import grid, read_rgb, save_png, to_float
from equimini.utils.npz import map_array, write_samples
from equimini.utils.plot import curves


class Bench:
    """What all commands share: the network, and features that are kept."""

    def __init__(self, cfg: NetworkConfig, height: int, width: int, device: torch.device) -> None:
        self.cfg, self.out, self.cache = cfg, output_folder(cfg.out), output_folder(cfg.cache)
        self.pixels, self.distances = f"{width}x{height}", {}
        for folder in (self.out, self.cache, *self.out.glob("*/cfg-*")):
            remove_leftovers(folder)
        with distributed.main_first():
            self.net = load_network(cfg.network, cfg.network_sha256, device)
        picture = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        self.dim = self.net(picture)[0].shape[1]  # an error comes now, not after hours

    def real(self, data: Dataset, n: int) -> RealPictures:
        """The first n pictures of a data set (in its fixed random order); 0: all."""
        return RealPictures(data, n or len(data), self.net.sha256, self.cache,
                            self.cfg.batch_size, self.cfg.workers)

    def measured(self, data: Dataset, n: int, label: str) -> RealPictures:
        """The same, with their features computed.  Raises UserError for too few pictures."""
        enough(data, f"the {label}")
        pictures = self.real(data, n)
        measure(pictures, self.net, label)
        return pictures


class ModelBench(Bench):
    """The bench of a trained model, with the pictures of --data and what it is compared with."""

    def __init__(self, cfg: EvaluateConfig, shape: TokenizerConfig, device: torch.device) -> None:
        super().__init__(cfg, shape.image_size, cfg.width or shape.image_size, device)
        if cfg.lpips_weights:
            lpips = load_lpips(cfg.lpips_weights)
            self.distances["lpips"] = weights_hash(lpips.state_dict()), lpips.to(device)
        if cfg.maps_network:
            maps = FeatureDistance(cfg.maps_network)
            self.distances["feature_distance"] = file_hash(cfg.maps_network), maps.to(device)
        cfg = as_trained(cfg, cfg.checkpoint)
        self.train, self.held_out, self.classes = load_data(cfg, shape)
        self.published = None  # statistics of the reference, where it is such
        if cfg.reference:
            source = open_source(cfg.reference, "--reference", self.dim, cfg, shape)
            if isinstance(source, Reference):
                self.published = source
            else:
                self.held_out = source
        enough(self.train, "--data")
        enough(self.held_out, "the reference")

    def checkpoint(self) -> dict[str, str]:
        return {"file": Path(self.cfg.checkpoint).name,
                "sha256": file_hash(find(self.cfg.checkpoint)), "weights": self.cfg.weights}

    def reference(self, n: int) -> Reference:
        """The published statistics, or those of n reference pictures."""
        return self.published or score_reference(
            self.measured(self.held_out, n, "reference"),
            self.cfg.reference or self.cfg.val_data or f"held out of {self.cfg.data}")


def enough(data: Dataset, what: str) -> None:
    """Raises UserError for fewer pictures than a covariance of features takes."""
    if len(data) < 4:
        raise UserError(f"{what} has {len(data)} pictures; it takes at least 4")


def scales(text: str) -> list[float]:
    """The numbers of --cfg, each once, in order.  Raises UserError for anything else."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(math.isfinite(s) and s >= 0 for s in found):
        raise UserError(f"--cfg takes numbers of at least 0, with commas between, got {text!r}")
    return found


def evaluate_generator(cfg: GeneratorEvaluation, device: torch.device) -> None:
    """Samples at every scale against the reference; beside them the floor and the limit."""
    found = scales(cfg.cfg)
    check_device(sampling(cfg, cfg=0), device)
    model = load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)
    if cfg.height:
        model.tokenizer = Enlarged(model.tokenizer, cfg.height)
    shape, classes = model.tokenizer.config, len(model.classes)
    if cfg.n < classes:
        raise UserError(f"--n {cfg.n} would draw only the first {cfg.n} of the {classes} classes "
                        f"and compare them with all; give at least --n {classes}")
    bench = ModelBench(cfg, shape, device)
    if isinstance(bench.train, Synthetic) and bench.classes != model.classes:
        raise UserError(f"--data {cfg.data} has the classes {', '.join(bench.classes)}, the "
                        f"generator {', '.join(model.classes[:30])}; give --data the pictures it "
                        "was trained on")
    columns = shape.tokens(cfg.width or shape.image_size)
    how = [sampling(cfg, cfg=scale).resolved(model.generator.head) for scale in found][0]
    settings = {"schedule": cfg.cfg_schedule, "solver": how.solver, "steps": how.steps,
                "time_shift": cfg.time_shift, "temperature": cfg.temperature,
                "precision": cfg.precision, "seed": cfg.sample_seed, "columns": columns,
                **{name: getattr(cfg, name)
                   for name in ("guidance_columns", "positions", "nodes", "height")
                   if getattr(cfg, name) != getattr(GENERATOR, name)},  # older plans lack them
                **({"guide": file_hash(find(cfg.guide))} if cfg.guide else {})}
    plan = {"checkpoint": file_hash(find(cfg.checkpoint)), "weights": cfg.weights,
            "tokenizer": tokenizer_hash(model.tokenizer), "network": bench.net.sha256, **settings}
    with distributed.main_first():
        if distributed.is_main():
            if cfg.overwrite:
                drop_samples(bench.out)
            claim(bench.out, plan, "samples", "choose another --out, or add --overwrite")
    sets = {}
    for scale in found:
        keep = (output_folder(bench.out / f"images/cfg-{scale}") if cfg.keep_images or cfg.npz
                else None)
        sets[scale] = Samples(model, cfg.n, columns, cfg.sample_seed, sampling(cfg, cfg=scale),
                              bench.out / f"samples/cfg-{scale}", cfg.batch_size, keep)
        measure(sets[scale], bench.net, f"samples, cfg {scale:g}")
        if cfg.npz and distributed.is_main():
            save_npz(sets[scale], bench.out / f"cfg-{scale}.npz")
    floor = bench.measured(bench.train, cfg.n, "floor: training pictures")
    limit = Reconstructions(floor, model.tokenizer, bench.distances)
    measure(limit, bench.net, "limit: reconstructions")
    reference = bench.reference(cfg.reference_n)
    if distributed.is_main():
        rows = [{"set": "samples", "cfg": scale, **compare(read_all(s), reference)}
                for scale, s in sets.items()]
        rows += [{"set": "tokenizer's limit", **compare(read_all(limit), reference)},
                 {"set": "floor (real pictures)", **compare(read_all(floor), reference)}]
        left_out = draw_sweep(bench.out, sets, rows, bench.net, cfg.n)
        if model.classes != bench.classes:
            left_out.append("the generator's classes are not those of --data")
        finish(bench, "generator", rows, reference, bench.checkpoint(), {**settings, "sample k":
               f"class k mod {classes}, seed {cfg.sample_seed} + k"}, floor, left_out)


def drop_samples(out: Path) -> None:
    """Delete the samples in a folder, and then the note on what they were made with."""
    for old in (*out.glob("samples/cfg-*/*.npz"), *out.glob("images/cfg-*/class*_seed*.png")):
        old.unlink()
    (out / "plan.json").unlink(missing_ok=True)


def save_npz(samples: Samples, path: Path) -> None:
    """The samples, read from their PNGs a shard at a time, as one file."""
    first = np.asarray(Image.open(samples.png(0)))
    with write_samples(path, samples.n, *first.shape[:2]) as add:
        for k in range(0, samples.n, SHARD):
            which = range(k, min(k + SHARD, samples.n))
            add(np.stack([np.asarray(Image.open(samples.png(i))) for i in which]),
                [samples.job(i)[0] for i in which])
    print(f"samples: {path}")


def draw_sweep(out: Path, sets: dict[float, Samples], rows: list[dict], net: FeatureNetwork,
               n: int) -> list[str]:
    """The first pictures of every scale below each other; of several scales, the curve.

    Returns what the report says of pictures that could not be drawn.
    """
    pictures = [to_float(read_all(s)["shown"][:n]) for s in sets.values()]
    save_png(grid(pictures, [f"cfg {scale:g}" for scale in sets]), out / "samples.png")
    if len(sets) < 2:
        return []
    samples = [row for row in rows if row["set"] == "samples"]
    line = [(row["cfg"], row["frechet_distance"]) for row in samples]
    levels = {row["set"]: row["frechet_distance"] for row in rows if row["set"] != "samples"}
    missing = curves(out / "curve.png", {"samples": line}, "guidance scale", "Frechet distance",
                     distance_name(net, n), levels)
    return [missing] if missing else []


def evaluate_tokenizer(cfg: EvaluateConfig, device: torch.device) -> None:
    """Reconstructions of held-out pictures; beside them training pictures as they are."""
    tokenizer = load_any_tokenizer(cfg.checkpoint, device, cfg.weights == "ema")
    bench = ModelBench(cfg, tokenizer.config, device)
    found = f"{bench.held_out.width}x{bench.held_out.height}"
    if found != bench.pixels:
        raise UserError(f"--reference {cfg.reference} has pictures of {found} pixels; the "
                        f"tokenizer takes {bench.pixels}")
    originals = bench.real(bench.held_out, cfg.n)
    decoded = Reconstructions(originals, tokenizer, bench.distances)
    measure(decoded, bench.net, "reconstructions")
    floor = bench.measured(bench.train, cfg.n, "floor: training pictures")
    reference = bench.reference(cfg.n)
    if distributed.is_main():
        rows = [{"set": "reconstructions",
                 **compare(read_all(decoded), reference, paired=not bench.published)},
                {"set": "floor (real pictures)", **compare(read_all(floor), reference)}]
        finish(bench, "tokenizer", rows, reference, bench.checkpoint(),
               {"decoded": "from the mode of the posterior"}, floor)
        before = torch.cat([x for x, _ in originals.batches(0, min(SHOWN, originals.n))])
        after = read_all(decoded)["shown"]
        save_png(grid([to_float(before), to_float(after)], ["original", "decoded"]),
                 bench.out / "reconstructions.png")


def finish(bench: Bench, kind: str, rows: list[dict], reference: Reference,
           measured: dict[str, str], settings: dict[str, Any], floor: RealPictures | None = None,
           remarks: Sequence[str] = ()) -> None:
    """Write and print the report; measured: the file, its SHA-256, and which of its weights."""
    net = bench.net
    write_report({
        "what": kind, "distance": distance_name(net, rows[0]["n"], kind), "checkpoint": measured,
        "network": {"name": net.name, "sha256": net.sha256, "hash_verified": net.verified,
                    "published_inception": net.is_inception},
        "reference": reference.about, "settings": settings,
        "distances": {name: sha256 for name, (sha256, _) in bench.distances.items()},
        "pixels": bench.pixels, "results": rows,
        "notes": [*notes(rows, reference, net, bench.pixels, floor), *remarks]}, bench.out)


def picture_size(path: str, run: DataConfig) -> tuple[int, int] | None:
    """Height and width of the first picture of a set; None for statistics and built-in ones."""
    if path in BUILT_IN:
        return None
    if path.endswith(".npz"):
        try:
            return map_array(path, "arr_0").shape[1:3]
        except ValueError:
            return None  # statistics, or a file whose fault `open_source` names
    source = open_pictures(run, path)
    try:
        image = read_rgb(BytesIO(source.read(0)))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(f"the size of the pictures is taken from the first, {source.where(0)}, "
                        f"which cannot be read ({first_line(error)}); give --image-size") from None
    return image.height, image.width


def evaluate_images(cfg: ImagesEvaluation, device: torch.device, samples: str) -> None:
    """Pictures that any model drew (a folder, an archive, an .npz of pictures or of statistics)
    against others of the same kinds."""
    if not cfg.reference:
        raise UserError("--reference is needed: a folder of images, or an .npz of pictures (arr_0) "
                        "or of statistics (mu, sigma)")
    run = DataConfig(out=str(output_folder(cfg.out)))
    if cfg.image_size:
        height, width = cfg.image_size, cfg.width or cfg.image_size
    else:
        height, width = (picture_size(samples, run) or picture_size(cfg.reference, run)
                         or (64, 64))  # of statistics alone: just to try the network
    bench = Bench(cfg, height, width, device)
    run = replace(run, width=width)
    shape = SimpleNamespace(image_size=height, f=1, layout="columns")  # any size will do
    given, reference = (open_source(spec, option, bench.dim, run, shape) for spec, option in (
        (samples, "SAMPLES"), (cfg.reference, "--reference")))
    if not isinstance(given, Reference):
        pictures = bench.measured(given, cfg.n, "samples")
    if not isinstance(reference, Reference):
        reference = score_reference(bench.measured(reference, 0, "reference"), cfg.reference)
    if not distributed.is_main():
        return
    if isinstance(given, Reference):
        about = given.about
        row = {"n": None, "frechet_distance": frechet_distance(given.gaussian, reference.gaussian)}
    else:
        about = score_reference(pictures, samples).about
        row = compare(read_all(pictures), reference)
    bench.pixels = about.get("pixels", "no")
    finish(bench, "images", [{"set": "samples", **row}], reference,
           {"file": samples, "sha256": about["sha256"]}, {})


def main(argv: list[str] | None = None) -> None:
    parser = command("equimini.evaluate", __doc__)
    commands = parser.add_subparsers(required=True, metavar="generator|tokenizer|images")
    for defaults, function in ((GENERATOR, evaluate_generator), (TOKENIZER, evaluate_tokenizer),
                               (IMAGES, evaluate_images)):
        about, name = function.__doc__, function.__name__.removeprefix("evaluate_")
        one = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add_flags(one, defaults, "options")
        one.set_defaults(function=function, defaults=defaults)
        if name == "images":
            one.add_argument("pictures", metavar="SAMPLES", nargs=1, help="pictures to measure: a "
                             "folder, an archive, or an .npz")
        else:
            one.add_argument("--samples", dest="n", type=int, metavar="N",
                             default=argparse.SUPPRESS, help="the same as --n, which torchrun "
                             "takes for one of its own options")
    args = parser.parse_args(argv)
    cfg = override(args.defaults, args)
    device = distributed.local_device(cfg.device)
    with distributed.processes(device):
        try:
            args.function(cfg, device, *getattr(args, "pictures", ()))
        except KeyboardInterrupt:
            print("\nstopped; the same command continues from here", file=sys.stderr)
            raise
