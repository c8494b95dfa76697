"""The frozen network whose features are compared: a TorchScript file, checked by its hash.

Called as the Inception network is that StyleGAN2-ADA publishes: on uint8 pictures (B, 3, H, W),
`return_features=True` gives features (B, d), `no_output_bias=True` class probabilities.
"""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equimini.utils.errors import UserError, first_line
from equimini.utils.files import replacing

INCEPTION_URL = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                 "inception-2015-12-05.pt")


# as the package k-diffusion 0.1.1 records it for this address (k_diffusion/evaluation.py)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass
class FeatureNetwork:
    """A frozen feature network, and what is known of its file."""

    net: torch.jit.ScriptModule
    name: str
    sha256: str
    device: torch.device
    verified: bool  # the file's hash was compared with one that is known or was given

    @property
    def is_inception(self) -> bool:
        """Whether this is the published Inception, whose distance is called FID."""
        return self.sha256 == INCEPTION_SHA256

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 (B, d), on the CPU.

        Raises UserError if the network does not take the call.
        """
        return self._call(pictures, return_features=True)

    @torch.no_grad()
    def probabilities(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to class probabilities float32 (B, classes), on the CPU."""
        return self._call(pictures, no_output_bias=True)

    def _call(self, pictures: Tensor, **how: bool) -> Tensor:
        try:
            out = self.net(pictures.to(self.device), **how)
        except RuntimeError as error:
            raise UserError(f"the network {self.name} cannot be called on uint8 pictures "
                            f"{tuple(pictures.shape)} with {', '.join(how)}: "
                            f"{_reason(error)}") from None
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(pictures):
            raise UserError(f"the network {self.name} must return one row for each picture with "
                            f"{', '.join(how)}, got {getattr(out, 'shape', type(out).__name__)}")
        out = out.float().cpu()
        if not out.isfinite().all():
            raise UserError(f"the network {self.name} gave values that are not finite")
        return out

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"name": self.name, "sha256": self.sha256, "hash_verified": self.verified,
                "published_inception": self.is_inception}


def load_network(source: str, sha256: str = "", device: str | torch.device = "cpu",
                 cache: Path | str = "") -> FeatureNetwork:
    """A network from a TorchScript file, or, for 'download', the published Inception.

    sha256: the hash that the file must have; empty: that of the published Inception for a
    download, none for a file.  cache: folder of downloads (default: torch.hub's).
    Raises UserError for a file that is missing, of another hash, or no TorchScript.
    """
    if not source:
        raise UserError("--network is needed: the path of a TorchScript feature network, or "
                        f"'download' for the published Inception ({INCEPTION_URL})")
    expected = sha256.lower()
    if source == "download":
        expected = expected or INCEPTION_SHA256
        folder = Path(cache or Path(torch.hub.get_dir()) / "checkpoints")
        path = download(INCEPTION_URL, folder, expected)
    else:
        path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no feature network {path}; give --network the path of a "
                        "TorchScript file, or 'download'")
    found = file_hash(path)
    if expected and found != expected:
        raise UserError(f"the feature network {path} has the SHA-256 {found}, expected {expected}")
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cannot load the feature network {path} as TorchScript: "
                        f"{first_line(error)}") from None
    verified = bool(expected) or found == INCEPTION_SHA256
    return FeatureNetwork(net, path.stem, found, torch.device(device), verified)


def download(url: str, folder: Path, sha256: str) -> Path:
    """Fetch a file once into `folder`; it gets its name only if its hash is right.

    Raises UserError if it cannot be fetched, or is not the expected file.
    """
    path = folder / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    by_hand = f"; or fetch it elsewhere and give its path to --network: {url}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {folder}", flush=True)
        with urllib.request.urlopen(url, timeout=60) as source, replacing(path) as file:
            shutil.copyfileobj(source, file)
            file.flush()
            found = file_hash(Path(file.name))
            if found != sha256:
                raise UserError(f"what {url} gave has the SHA-256 {found}, expected {sha256}; it "
                                "was not kept" + by_hand)
    except OSError as error:  # URLError and timeouts, too
        raise UserError(f"cannot download {url}: {first_line(error)}{by_hand}") from None
    return path


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: RuntimeError) -> str:
    """The last line of TorchScript's long messages, which says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
