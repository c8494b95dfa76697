"""What pictures are compared with: a folder or archive, an .npz of pictures or of statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equimini.autoencoder import TokenizerConfig
from equimini.evaluate.feature_shards import RealPictures, read
from equimini.evaluate.metrics import Gaussian, Statistics
from equimini.training.data import SCALED_UP, UNREADABLE, ImageFolder, load_data, warn_of_left_out
from equimini.training.options import BUILT_IN, DataConfig
from equimini.training.split import open_pictures, part
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import file_hash
from equimini.utils.npz import map_array, open_npz

FEATURES_KEPT = 50_000  # rows of the reference for KID and the extrapolation, at most


@dataclass
class Reference:
    """Statistics that sets of pictures are compared with."""

    gaussian: Gaussian
    features: Tensor | None  # (m, d), a random part of a large set; None: only statistics
    about: dict[str, Any] = field(default_factory=dict)
    hashes: frozenset[str] = frozenset()  # of the pictures, if they are at hand


class NpzPictures(Dataset):
    """Pictures arr_0 of an .npz, uint8 (N, H, W, 3), as they are."""

    workers = 0  # that load them

    def __init__(self, path: str, what: str) -> None:
        try:
            self.pixels = map_array(path, "arr_0")
        except ValueError as error:
            raise UserError(f"{what}: the file is damaged ({error})") from None
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"{what}: its arr_0 is {self.pixels.dtype} {shape}, not uint8 "
                            "(N, H, W, 3)")
        self.height, self.width = shape[1:3]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        return torch.from_numpy(np.array(self.pixels[key[1]])).permute(2, 0, 1), 0, key[1]

    def where(self, index: int) -> str:
        return f"arr_0[{index}]"

    def content(self, index: int) -> bytes:
        return np.ascontiguousarray(self.pixels[index]).tobytes()


def open_source(spec: str, option: str, features: int, run: DataConfig,
                shape: TokenizerConfig) -> Reference | Dataset:
    """Statistics, or all pictures of a set, scaled and cropped to the shape where they are files.

    spec: a path, or the built-in held-out pictures; option: what gave it, for messages; features:
    of the network.  Raises UserError.
    """
    if spec.endswith(".npz"):
        return _open_npz(spec, f"{option} {spec} must be an .npz with mu and sigma (statistics), "
                         "or with arr_0 (pictures)", features)
    if spec in BUILT_IN:
        return load_data(replace(run, data=spec, val_data=""), shape)[1]
    source = open_pictures(run, spec)
    warn_of_left_out(source)
    return ImageFolder(*part(source), shape.image_size, run.width or shape.image_size, 0,
                       augment=False)


def _open_npz(path: str, what: str, features: int) -> Reference | NpzPictures:
    with open_npz(path, what) as file:
        names = set(file.files)
        if not ({"mu", "sigma"} <= names or "arr_0" in names):
            raise UserError(f"{what}; it has {', '.join(sorted(names)) or 'nothing'}")
        if not {"mu", "sigma"} <= names:
            return NpzPictures(path, what)
        try:
            mu, sigma = (torch.from_numpy(np.asarray(file[k], np.float64)) for k in ("mu", "sigma"))
            if mu.shape[0] != features and "arr_0" in names:
                return NpzPictures(path, what)  # ADM's, but by another network than the Inception
            gaussian = Gaussian.of(mu, sigma)
        except Exception as error:  # a damaged array can raise anything
            reason = first_line(error)
            raise UserError(f"{what}: " + ("mu and sigma must be arrays of numbers"
                                           if "pickle" in reason else reason)) from None
    if len(mu) != features:
        raise UserError(f"{what}: the statistics have {len(mu)} features, the network {features}; "
                        "give the --network that they were made with")
    return Reference(gaussian, None, {"source": path, "sha256": file_hash(path), "n": None,
                                      "not_used": sorted(names - {"mu", "sigma"})})


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
             "pixels": f"{pictures.data.width}x{pictures.data.height}",
             **faults(torch.cat(found) if found else None)}
    return Reference(gaussian, features, about, frozenset(hashes))


def faults(found: Tensor | None) -> dict[str, int]:
    """How many pictures could not be read, or were too small, by name; empty if none.

    found: what `ImageFolder` knows of each file, None for pictures without files.
    """
    counts = {} if found is None else {"unreadable": int((found == UNREADABLE).sum()),
                                       "scaled_up": int((found == SCALED_UP).sum())}
    return {name: count for name, count in counts.items() if count}
