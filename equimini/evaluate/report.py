"""The evaluation's report: one row of numbers per set of pictures, and what they are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from equimini.evaluate.feature_networks import FeatureNetwork
from equimini.evaluate.feature_shards import RealPictures
from equimini.evaluate.metrics import (Gaussian, are_probabilities, extrapolated_distance,
                                       frechet_distance, inception_score, kernel_distance)
from equimini.evaluate.sources import Reference, faults
from equimini.utils.files import write_text

FAULTS = {"unreadable": "{} files cannot be read; the next picture stood in for each, so that it "
                        "counts twice", "scaled_up": "{} pictures are smaller than the model's and "
                        "were scaled up"}
SCORES = ("psnr", "ssim", "lpips", "feature_distance")


def compare(rows: dict[str, Tensor], reference: Reference, paired: bool = False) -> dict[str, Any]:
    """All numbers of one set: distances to the reference, scores, means.

    rows: features (n, d), probabilities (n, classes) and scores (n,) by name.  paired: row i
    belongs to row i of the reference.
    """
    features, n, other = rows["features"], len(rows["features"]), reference.features
    result = {"n": n, **faults(rows.get("found")),
              "frechet_distance": frechet_distance(Gaussian.fit(features), reference.gaussian)}
    if other is None:
        result["frechet_extrapolated"] = extrapolated_distance(features, reference.gaussian)
    else:
        if paired:  # of a large reference only the first rows are kept
            features = features[:len(other)]
        result["frechet_extrapolated"] = extrapolated_distance(features, other, paired)
        result["kid"], result["kid_std"] = kernel_distance(features, other, paired)
    if are_probabilities(rows["probabilities"]):
        splits = 10 if n >= 50_000 else 1
        score, spread = inception_score(rows["probabilities"], splits)
        result |= {"inception_score": score, "inception_score_splits": splits}
        if splits > 1:
            result["inception_score_std"] = spread
    return result | {name: rows[name].double().mean().item() for name in SCORES if name in rows}


def distance_name(net: FeatureNetwork, n: int | None, kind: str = "generator") -> str:
    """What the distance may be called: FID-50k only of 50,000 pictures and the Inception.

    n: None where only statistics are known.
    """
    if n and net.is_inception and n >= 50_000:
        return f"{'r' if kind == 'tokenizer' else ''}FID-{n // 1000}k"
    return f"Frechet distance ({net.name}{f', {n} pictures' if n else ''})"


def notes(rows: list[dict], reference: Reference, net: FeatureNetwork, pixels: str,
          floor: RealPictures | None = None) -> list[str]:
    """What a reader must know to read the numbers rightly.  pixels: of the pictures measured."""
    n, d, about = rows[0]["n"], len(reference.gaussian.mean), reference.about
    unused, size = about.get("not_used", ()), about.get("pixels", pixels)
    shared = len(reference.hashes.intersection(floor.hashes(0, floor.n))) if floor else 0
    cases = [
        (not net.is_inception, "the network is not the published Inception: these distances are "
         "not FIDs, and compare only with others of the same network"),
        (not net.verified, "the network's file was not checked against a known hash "
         "(--network-sha256)"),
        (n and n < 50_000, f"{n} pictures, not 50,000: the plain distance is too large, the more "
         "so the fewer" + ("; compare it with the floor's" if floor else "")),
        (n and n < 2 * d, f"{n} pictures are fewer than twice the {d} features: the extrapolation "
         "removes only a part of that" + (
             "; what it leaves of the floor shows how much" if floor else "")),
        (n and reference.features is None, "the reference is known by its statistics only: no KID, "
         "and the extrapolation does not correct for the reference's own size"),
        (n and "inception_score" not in rows[0], "no Inception Score: what the network gives with "
         "no_output_bias=True are no probabilities (rows of numbers from 0 that sum to 1)"),
        (unused, f"reference: {', '.join(unused)} in the file are not used"),
        (size != pixels, f"the reference's pictures have {size} pixels, not {pixels}"),
        *((k in counts, f"{counts['set']}: {text.format(counts.get(k))}")
          for counts in (*rows, {"set": "reference", **about}) for k, text in FAULTS.items()),
        (floor and floor.n != n, f"the floor has {floor and floor.n} pictures, not {n}, because "
         "--data has no more: its plain distance does not compare with the others"),
        (shared, f"{shared} of the floor's pictures are also in the reference: the floor is too "
         "low")]
    return [text for applies, text in cases if applies]


def write_report(report: dict[str, Any], out: Path) -> None:
    """report.json, and as text.  Numbers that are not finite become null: JSON has none."""
    report["results"] = [{k: None if isinstance(v, float) and not math.isfinite(v) else v
                          for k, v in row.items()} for row in report["results"]]
    write_text(out / "report.json", json.dumps(report, indent=1, allow_nan=False))
    print_report(report)
    print(f"written to {out}")


COLUMNS = (("set", "set", ""), ("cfg", "cfg", "g"), ("n", "n", "d"),
           ("frechet_distance", "Frechet", ".3f"), ("frechet_extrapolated", "1/n -> 0", ".3f"),
           ("kid", "KID x1000", ".3f"), ("kid_std", "+-", ".3f"), ("inception_score", "IS", ".2f"),
           ("inception_score_std", "+-", ".2f"), ("psnr", "PSNR dB", ".2f"),
           ("ssim", "SSIM", ".4f"), ("lpips", "LPIPS", ".4f"),
           ("feature_distance", "feature dist.", ".4f"))


def print_report(report: dict[str, Any]) -> None:
    """The report in words, for the terminal."""
    reference, measured, net = (report[k] for k in ("reference", "checkpoint", "network"))
    verified = "checked" if net["hash_verified"] else "not checked"
    size = f"{reference['n']} pictures, " if reference["n"] else ""
    weights = f"{measured['weights']} weights, " if "weights" in measured else ""
    print(f"\n{report['what']:11} {measured['file']} ({weights}sha256 "
          f"{measured['sha256'][:12]}), {report['pixels']} pixels\n"
          f"network     {net['name']} (sha256 {net['sha256'][:12]}, {verified})\n"
          f"reference   {reference['source']} ({size}sha256 {reference['sha256'][:12]})")
    print("settings    " + ", ".join(f"{k} {v}" for k, v in report["settings"].items()))
    print(f"distance    {report['distance']}\n")
    print_table(report["results"])
    print("".join(f"- {note}\n" for note in report["notes"]), end="")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns; those that no row has are left out."""
    shown = [c for c in COLUMNS if any(c[0] in row for row in rows)]
    lines = [[title for _, title, _ in shown]]
    for row in rows:
        scaled = {k: v * 1000 if k.startswith("kid") else v for k, v in row.items()
                  if v is not None}
        lines.append([format(scaled[k], form) if k in scaled else "" for k, _, form in shown])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:])),
              sep="  ")
    print()
