"""The frozen network whose features are compared: a TorchScript file, checked by its hash.

Called as the Inception network is that StyleGAN2-ADA publishes: on uint8 pictures (B, 3, H, W),
`return_features=True` gives features (B, d), `no_output_bias=True` class probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from equimini.pretrained.published_weights import INCEPTION, fetch
from equimini.pretrained.torchscript import load_script
from equimini.utils.errors import UserError
from equimini.utils.files import file_hash

AT_A_TIME = 4  # pictures on a CPU: what a layer writes is then still in its cache for the next one


@dataclass
class FeatureNetwork:
    """A frozen feature network, and what is known of its file."""

    net: torch.jit.ScriptModule
    name: str
    sha256: str
    device: torch.device
    verified: bool  # the file's hash was compared with one that is known or was given
    both: Callable | None = field(default=None, init=False)  # from pictures to both outputs

    @property
    def is_inception(self) -> bool:
        """Whether this is the published Inception, whose distance is called FID."""
        return self.sha256 == INCEPTION.sha256

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) to features (B, d) and probabilities (B, classes), float32, CPU."""
        parts = []
        for x in self.parts(pictures):
            self.both = self.both or self.fastest(x)
            parts.append(self.both(x))
        return tuple(map(self.joined, zip(*parts)))

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 (B, d), CPU; the network may have features alone."""
        return self.joined([self.call(x, return_features=True) for x in self.parts(pictures)])

    def parts(self, pictures: Tensor) -> Iterator[Tensor]:
        """As many pictures at a time as are quick, on the network's device."""
        for x in pictures.split(AT_A_TIME if self.device.type == "cpu" else len(pictures)):
            yield x.to(self.device)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """One output of all parts; raises UserError for values that are not finite."""
        values = torch.cat(tuple(parts)).float().cpu()
        if not values.isfinite().all():
            raise UserError(f"the network {self.name} gave values that are not finite")
        return values

    def fastest(self, x: Tensor) -> Callable:
        """One run that gives both outputs, if it gives what two do on the pictures x."""
        expected = self.run_twice(x)
        try:
            joined, d = both_in_one(self.net), expected[0].shape[1]
            for got, want in zip(joined(x).tensor_split([d], 1), expected):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max())
        except (RuntimeError, AssertionError, LookupError, TypeError, OSError, AttributeError):
            return self.run_twice
        return lambda pictures: joined(pictures).tensor_split([d], 1)

    def run_twice(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and probabilities by the two calls that are known to be right."""
        return self.call(x, return_features=True), self.call(x, no_output_bias=True)

    def call(self, x: Tensor, **how: bool) -> Tensor:
        try:
            out = self.net(x, **how)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else "RuntimeError"  # TorchScript says it at the end
            raise UserError(f"the network {self.name} cannot be called on uint8 pictures "
                            f"{tuple(x.shape)} with {', '.join(how)}: {reason}") from None
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(x):
            raise UserError(f"the network {self.name} must return one row for each picture with "
                            f"{', '.join(how)}, got {getattr(out, 'shape', type(out).__name__)}")
        return out


class Features(nn.Module):
    """The network's call for features alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, return_features=True)


class Probabilities(Features):
    """That for probabilities, with a place beside them: (B, 2 * classes)."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.net(x, no_output_bias=True)
        return torch.cat((p, p), 1)


def both_in_one(net: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A module that runs the network once and returns (B, d + classes).

    With its flags frozen the network's program for features is the beginning of that for
    probabilities.  So the value that the former ends with is looked up at the same place in the
    latter, and put beside what it returns.  Raises LookupError for a network that is not so built.
    """
    short, whole = (torch.jit.freeze(torch.jit.script(kind(net).eval()))
                    for kind in (Features, Probabilities))
    first, then = ([node for node in module.graph.nodes() if node.kind() != "prim::Constant"]
                   for module in (short, whole))
    name = next(short.graph.outputs()).debugName()
    last = [name in [o.debugName() for o in node.outputs()] for node in first].index(True)
    if [node.kind() for node in first[:last + 1]] != [node.kind() for node in then[:last + 1]]:
        raise LookupError("the programs differ before the features")
    pair = [node for node in then if node.kind() == "prim::ListConstruct"][-1]
    pair.replaceInput(0, then[last].output())
    return whole


def load_network(source: str, sha256: str = "",
                 device: str | torch.device = "cpu") -> FeatureNetwork:
    """A network from a TorchScript file, or, for 'download', the published Inception.

    sha256: that the file must have; empty: the published Inception's for a download, else any.
    """
    if not source:
        raise UserError("--network is needed: the path of a TorchScript feature network, or "
                        f"'download' for the published Inception ({INCEPTION.url})")
    expected = sha256.lower()
    if source == "download":
        expected = expected or INCEPTION.sha256
        path = fetch(replace(INCEPTION, sha256=expected), "--network")
    else:
        path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no feature network {path}; give --network the path of a "
                        "TorchScript file, or 'download'")
    found = file_hash(path)
    if expected and found != expected:
        raise UserError(f"the feature network {path} has the SHA-256 {found}, expected {expected}")
    return FeatureNetwork(load_script(path, "feature network", device), path.stem, found,
                          torch.device(device), bool(expected) or found == INCEPTION.sha256)
