"""Published weights of the frozen networks: found or downloaded, checked, and loaded.

A network is never run with random weights in place of them: a file that is missing, damaged or
of another layout is an error that says what to do.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equimini.pretrained.lpips import Lpips
from equimini.pretrained.vision_transformer import VisionTransformer, dino_vits16, dinov2_vitb14
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import download, file_hash


@dataclass(frozen=True)
class Published:
    """A published file: its address, its name in torch.hub's folder, its SHA-256 if known."""

    url: str
    name: str
    sha256: str = ""  # the whole digest, or the first characters that the publisher names

    @property
    def path(self) -> Path:
        """Where a download is kept, and where a copy made by hand is found."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


VGG16 = Published("https://download.pytorch.org/models/vgg16-397923af.pth", "vgg16-397923af.pth",
                  "397923af")
LPIPS = Published("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/"
                  "weights/v0.1/vgg.pth", "lpips_v0.1_vgg.pth",  # the digest: pip's lpips 0.1.4
                  "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")
DINO = Published("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
                 "dino_deitsmall16_pretrain.pth", "dino_deitsmall16_pretrain.pth")
DINOV2 = Published("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/"
                   "dinov2_vitb14_pretrain.pth", "dinov2_vitb14_pretrain.pth")
INCEPTION = Published(  # the digest: k_diffusion/evaluation.py of the package k-diffusion
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt", "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4")


def fetch(published: Published, option: str) -> Path:
    """The file in torch.hub's folder, downloaded if it is not there; option: the flag for it."""
    if not published.path.exists():
        download(published.url, published.path, published.sha256, option)
    return published.path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a file; nothing in it is executed; raises UserError if it is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        content = None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the weights {path}: {first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} is no file of weights (a dict of tensors by name)")
    return content


def load_published(module: nn.Module, weights: dict[str, Tensor], path: object, what: str,
                   ignored: tuple[str, ...] = ()) -> None:
    """Load weights of the published layout, all of them; raises UserError for any other.

    what: the network's name, for the message; ignored: prefixes of published tensors that the
    network does not need.
    """
    mine = module.state_dict()
    given = {k: v for k, v in weights.items() if not k.startswith(ignored)}
    faults = [f"{k} is missing" for k in mine if k not in given]
    faults += [f"{k} is not known" for k in given if k not in mine]
    faults += [f"{k} is {tuple(given[k].shape)}, not {tuple(v.shape)}"
               for k, v in mine.items() if k in given and given[k].shape != v.shape]
    if faults:
        raise UserError(f"{path} does not have the published layout of {what}: "
                        f"{'; '.join(faults[:3])}"
                        + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""))
    bad = [k for k, v in given.items() if not v.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds values that are not finite ({bad[0]})")
    module.load_state_dict(given)


def located(spec: str, published: Published, option: str) -> Path:
    """The file for a flag's value, a path or 'download', its SHA-256 compared with the published.

    Raises UserError where a file under the publisher's name has another digest.  A file under
    another name may be the user's own; there, and where none is published, the digest is printed.
    """
    path = fetch(published, option) if spec == "download" else Path(spec)
    if not path.is_file():
        raise UserError(f"{option}: there is no file {path}; fetch {published.url}, or give "
                        "'download'")
    sha, original = file_hash(path), path.name in (published.name, published.url.rsplit("/", 1)[-1])
    if published.sha256 and sha.startswith(published.sha256):
        return path
    if published.sha256 and original:
        raise UserError(f"{path} is damaged or not the published file: its SHA-256 is {sha}, that "
                        f"of {published.url} begins with {published.sha256}")
    reason = "its publisher names none" if original else "not the published file's name"
    print(f"{path}: SHA-256 {sha}, not verified ({reason})", file=sys.stderr)
    return path


def chosen(wanted: str, switch: str, published: str, published_flag: str, net: str,
           net_flag: str) -> str:
    """Which network a setting asks for: 'published', 'net' (a TorchScript file), or '' for none.

    wanted: 'required', 'if-given' or 'none', the value of the flag `switch`.
    """
    if published and net:
        raise UserError(f"give --{published_flag} or --{net_flag}, not both")
    if wanted == "none" and (published or net):
        raise UserError(f"--{switch} none leaves --{published_flag if published else net_flag} "
                        "without a use; leave one of them out")
    if wanted == "required" and not (published or net):
        raise UserError(
            f"the {switch} loss of these settings needs a frozen network: give --{published_flag} "
            f"(a file, or 'download'), or in its place --{net_flag} (a TorchScript file), or do "
            f"without it: --{switch} none")
    return "published" if published else "net" if net else ""


def unused(because: str, settings: object, *names: str) -> None:
    """Raise UserError for networks that are given but that another setting leaves unused."""
    for name in names:
        if getattr(settings, name):
            raise UserError(f"{because} leaves --{name.replace('_', '-')} without a use; leave "
                            "one of them out")


def load_lpips(spec: str) -> Lpips:
    """LPIPS from --lpips-weights: 'download', a folder with both files, or 'VGG16,LINEAR'."""
    option = "--lpips-weights VGG16.pth,LPIPS.pth"
    if Path(spec).is_dir():
        names = (VGG16.name,), (LPIPS.url.rsplit("/", 1)[-1], LPIPS.name)
        specs = [next((str(Path(spec, n)) for n in names_ if Path(spec, n).exists()),
                      str(Path(spec, names_[0]))) for names_ in names]
    else:
        specs = ["download"] * 2 if spec == "download" else spec.split(",")
    if len(specs) != 2:
        raise UserError(f"--lpips-weights takes two files with a comma ({VGG16.name} and LPIPS's "
                        f"vgg.pth), a folder that holds both, or 'download'; got {spec!r}")
    net = Lpips()
    vgg, linear = (located(s, p, option) for s, p in zip(specs, (VGG16, LPIPS)))
    load_published(net.vgg, read_tensors(vgg), vgg, "VGG16", ignored=("classifier.",))
    lins = nn.ModuleDict({k: m for k, m in net.named_children() if k != "vgg"})
    load_published(lins, read_tensors(linear), linear, "LPIPS's linear weights")
    return net


def load_dino(spec: str) -> VisionTransformer:
    """DINO ViT-S/16 from --dino-weights (a file or 'download'); raises UserError."""
    return _load_vit(dino_vits16(), located(spec, DINO, "--dino-weights"), "DINO ViT-S/16")


def load_dinov2(spec: str) -> VisionTransformer:
    """DINOv2 ViT-B/14 from --dinov2-weights (a file or 'download'); raises UserError."""
    return _load_vit(dinov2_vitb14(), located(spec, DINOV2, "--dinov2-weights"), "DINOv2 ViT-B/14")


def _load_vit(vit: VisionTransformer, path: Path, what: str) -> VisionTransformer:
    load_published(vit, read_tensors(path), path, what, ignored=("mask_token",))
    return vit
