"""The evaluation's report: one row of numbers per set of pictures, and what they are not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equimini.evaluate.feature_networks import FeatureNetwork
from equimini.evaluate.feature_shards import RealPictures, read
from equimini.evaluate.metrics import (Gaussian, Statistics, extrapolated_distance,
                                       frechet_distance, inception_score, kernel_distance)
from equimini.training.data import SCALED_UP, UNREADABLE
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import file_hash

FEATURES_KEPT = 50_000  # rows of the reference for KID and the extrapolation, at most
FAULTS = {"unreadable": "{} files cannot be read; the next picture stood in for each, so that it "
                        "counts twice", "scaled_up": "{} pictures are smaller than the model's and "
                        "were scaled up"}


SCORES = ("psnr", "ssim", "lpips", "feature_distance")


@dataclass
class Reference:
    """Statistics that sets of pictures are compared with."""

    gaussian: Gaussian
    features: Tensor | None  # (m, d), a random part of a large set; None: only statistics
    about: dict[str, Any]
    hashes: frozenset[str] = frozenset()  # of the pictures, if they are at hand


def read_reference(path: str) -> Reference:
    """Published statistics, an .npz with `mu` (d,) and `sigma` (d, d).

    Raises UserError for a file that is missing or holds something else.
    """
    try:
        with np.load(path) as file:
            mu, sigma = (torch.from_numpy(np.asarray(file[k], np.float64)) for k in ("mu", "sigma"))
        gaussian = Gaussian.of(mu, sigma)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--reference {path} must be an .npz file with mu and sigma: "
                        f"{first_line(error)}") from None
    return Reference(gaussian, None, {"source": path, "sha256": file_hash(path), "n": None})


def score_reference(pictures: RealPictures, source: str) -> Reference:
    """Statistics of measured pictures, in one pass over their shards."""
    kept, found, statistics = [], [], None
    for rows in read(pictures):
        statistics = statistics or Statistics(rows["features"].shape[1])
        if statistics.n < FEATURES_KEPT:
            kept.append(rows["features"])
        statistics.update(rows["features"])
        found += [rows["found"]] if "found" in rows else []
    features = torch.cat(kept)
    gaussian = Gaussian.fit(features) if len(features) == statistics.n else \
        Gaussian.of(statistics.mean, statistics.covariance())
    hashes = sorted(pictures.hashes(0, pictures.n))
    content = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    about = {"source": source, "sha256": content, "n": pictures.n,
             **faults(torch.cat(found) if found else None)}
    return Reference(gaussian, features, about, frozenset(hashes))


def compare(rows: dict[str, Tensor], reference: Reference, paired: bool = False) -> dict[str, Any]:
    """All numbers of one set: distances to the reference, scores, means.

    rows: features (n, d), probabilities (n, classes) and scores (n,) by name.  paired: row i
    belongs to row i of the reference.
    """
    features, n = rows["features"], len(rows["features"])
    result = {"n": n, **faults(rows.get("found"))}
    result["frechet_distance"] = frechet_distance(Gaussian.fit(features), reference.gaussian)
    other = reference.gaussian if reference.features is None else reference.features
    result["frechet_extrapolated"] = extrapolated_distance(features, other, paired)
    if reference.features is not None:
        kid, spread = kernel_distance(features, reference.features, paired)
        result |= {"kid": kid, "kid_std": spread}
    splits = 10 if n >= 50_000 else 1
    score, spread = inception_score(rows["probabilities"], splits)
    result |= {"inception_score": score, "inception_score_splits": splits}
    if splits > 1:
        result["inception_score_std"] = spread
    return result | {name: rows[name].double().mean().item() for name in SCORES if name in rows}


def faults(found: Tensor | None) -> dict[str, int]:
    """How many pictures could not be read, or were too small, by name; empty if none.

    found: what `ImageFolder` knows of each file, None for pictures without files.
    """
    counts = {} if found is None else {"unreadable": int((found == UNREADABLE).sum()),
                                       "scaled_up": int((found == SCALED_UP).sum())}
    return {name: count for name, count in counts.items() if count}


def distance_name(net: FeatureNetwork, n: int, kind: str = "generator") -> str:
    """What the distance may be called: FID-50k only of 50,000 pictures and the Inception."""
    if net.is_inception and n >= 50_000:
        return f"{'r' if kind == 'tokenizer' else ''}FID-{n // 1000}k"
    return f"Frechet distance ({net.name}, {n} pictures)"


def notes(rows: list[dict], reference: Reference, net: FeatureNetwork,
          floor: RealPictures) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    found, n, d = [], rows[0]["n"], len(reference.gaussian.mean)
    if not net.is_inception:
        found.append("the network is not the published Inception: these distances are not FIDs, "
                     "and compare only with others of the same network")
    if not net.verified:
        found.append("the network's file was not checked against a known hash (--network-sha256)")
    if n < 50_000:
        found.append(f"{n} pictures, not 50,000: the plain distance is too large, the more so the "
                     "fewer; compare it with the floor's")
    if n < 2 * d:
        found.append(f"{n} pictures are fewer than twice the {d} features: the extrapolation "
                     "removes only a part of that; what it leaves of the floor shows how much")
    if reference.features is None:
        found.append("the reference is known by its statistics only: no KID, and the "
                     "extrapolation does not correct for the reference's own size")
    for counts in (*rows, {"set": "reference", **reference.about}):
        found += [f"{counts['set']}: {text.format(counts[k])}" for k, text in FAULTS.items()
                  if k in counts]
    if floor.n != n:
        found.append(f"the floor has {floor.n} pictures, not {n}, because --data has no more: its "
                     "plain distance does not compare with the others")
    shared = len(reference.hashes.intersection(floor.hashes(0, floor.n)))
    if shared:
        found.append(f"{shared} of the floor's pictures are in the reference, too: the floor is "
                     "too low")
    return found


COLUMNS = (("set", "set", ""), ("cfg", "cfg", "g"), ("n", "n", "d"),
           ("frechet_distance", "Frechet", ".3f"), ("frechet_extrapolated", "1/n -> 0", ".3f"),
           ("kid", "KID x1000", ".3f"), ("kid_std", "+-", ".3f"), ("inception_score", "IS", ".2f"),
           ("inception_score_std", "+-", ".2f"), ("psnr", "PSNR dB", ".2f"),
           ("ssim", "SSIM", ".4f"), ("lpips", "LPIPS", ".4f"),
           ("feature_distance", "feature dist.", ".4f"))


def print_report(report: dict[str, Any]) -> None:
    """The report as text: settings, table, notes."""
    reference, checkpoint, net = (report[k] for k in ("reference", "checkpoint", "network"))
    verified = "checked" if net["hash_verified"] else "not checked"
    size = f"{reference['n']} pictures, " if reference["n"] else ""
    print(f"\n{report['what']:11} {checkpoint['file']} ({checkpoint['weights']} weights, sha256 "
          f"{checkpoint['sha256'][:12]}), {report['pixels']} pixels\n"
          f"network     {net['name']} (sha256 {net['sha256'][:12]}, {verified})\n"
          f"reference   {reference['source']} ({size}sha256 {reference['sha256'][:12]})")
    print("settings    " + ", ".join(f"{k} {v}" for k, v in report["settings"].items()))
    print(f"distance    {report['distance']}\n")
    print_table(report["results"])
    for note in report["notes"]:
        print(f"- {note}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns; those that no row has are left out."""
    shown = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    lines = [[title for _, title, _ in shown]]
    for row in rows:
        scaled = {k: v * 1000 if k.startswith("kid") else v for k, v in row.items()}
        lines.append([format(scaled[k], form) if k in scaled else "" for k, _, form in shown])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:])),
              sep="  ")
    print()
