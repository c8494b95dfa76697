"""Options of the evaluation's three commands."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from equimini.config import Checked, flag
from equimini.sampler import SCHEDULES
from equimini.sampling.options import SamplingOptions
from equimini.training.options import DataConfig


@dataclass(frozen=True)
class NetworkConfig(Checked):
    network: str = flag("", "TorchScript network that gives the features, called as the Inception "
                        "of StyleGAN2-ADA is; 'download': that one")
    network_sha256: str = flag("", "hash that the network's file must have")
    batch_size: int = flag(64, "pictures computed at a time", min=1)
    cache: str = flag("runs/features", "folder where features of real pictures and of "
                      "reconstructions are kept, for all evaluations")


@dataclass(frozen=True)
class EvaluateConfig(NetworkConfig, DataConfig):
    checkpoint: str = flag("", "checkpoint to measure")
    weights: str = flag("ema", "moving average of the weights, or the raw ones",
                        choices=("ema", "raw"))
    seed: int = flag(0, "the --seed of the training: with it the same pictures of --data are held "
                     "out", min=0, max=2**32 - 1)
    n: int = flag(1000, "pictures measured; published FIDs use 50000", min=4)
    reference: str = flag("", "what pictures are compared with: a folder of images, 'synthetic' / "
                          "'synthetic-object', or an .npz file with mu and sigma, or of pictures; "
                          "empty: the held-out pictures of --data")
    lpips_weights: str = flag("", "LPIPS of reconstructions: 'download', a folder with "
                              "vgg16-397923af.pth and LPIPS v0.1's vgg.pth, or the two files with "
                              "a comma between")
    maps_network: str = flag("", "TorchScript network whose feature maps give a perceptual "
                             "distance of reconstructions; empty: none")


@dataclass(frozen=True)
class GeneratorEvaluation(EvaluateConfig, SamplingOptions):
    cfg: str = flag("2", "guidance scale; several with commas: all of them, and a curve")
    cfg_schedule: str = flag("linear", "guidance from 1 up to --cfg over the columns, or --cfg "
                             "throughout", choices=SCHEDULES)
    tokenizer: str = flag("", "checkpoint of the generator's tokenizer with a fine-tuned decoder; "
                          "empty: the tokenizer inside the generator's checkpoint")
    height: int = flag(0, "height at which pictures are compared, a multiple of the generator's, to "
                       "which its pictures are enlarged (Lanczos); 0: the generator's", min=0)
    sample_seed: int = flag(0, "seed of the first sample; the next ones count up", min=0)
    reference_n: int = flag(0, "pictures of the reference, at most; 0: all", min=0)
    keep_images: bool = flag(False, "keep every sample as a PNG in OUT/images")
    npz: bool = flag(False, "also write the samples of each scale into OUT/cfg-SCALE.npz, which "
                     "ADM's evaluator reads (their PNGs are kept)")
    overwrite: bool = flag(False, "drop samples of other settings that --out holds")


@dataclass(frozen=True)
class ImagesEvaluation(NetworkConfig):
    reference: str = flag("", "what SAMPLES are compared with: a folder of images, an .npz of "
                          "pictures (arr_0) or of statistics (mu, sigma)")
    n: int = flag(0, "pictures of SAMPLES, at most; 0: all", min=0)
    image_size: int = flag(0, "height that pictures are scaled and cropped to (those of an .npz "
                           "stay as they are); 0: that of the first picture", min=0)
    width: int = flag(0, "width of the crops; 0: as --image-size, or the first picture's", min=0)
    out: str = flag("runs/evaluate-images", "folder to write to")
    workers: int = flag(1, "processes that load images; 0: none but the main one", min=0)
    device: str = flag("auto", "where to compute: auto (CUDA, then MPS, then CPU), cpu, cuda, "
                       "cuda:N, mps")


def sampling(config: SamplingOptions, /, **changed: Any) -> SamplingOptions:
    """The sampling options alone of a configuration that has others as well."""
    given = {f.name: getattr(config, f.name) for f in fields(SamplingOptions)}
    return SamplingOptions(**given | changed)


GENERATOR = GeneratorEvaluation(checkpoint="runs/generator/last.pt", out="runs/evaluate-generator")
TOKENIZER = EvaluateConfig(checkpoint="runs/tokenizer/last.pt", out="runs/evaluate-tokenizer")
IMAGES = ImagesEvaluation()
