"""The formulas of the evaluation: distances between sets of features, scores, picture errors.

Everything here is plain functions of tensors, in float64.  Features are (n, d): one row for each
picture, from a frozen network (equimini/evaluate/feature_networks.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from equimini.noise import rng


class Statistics:
    """Count, mean and covariance of features, taken in batch by batch (float64).

    Chan, Golub and LeVeque's update: deviations are summed around the running mean, so that
    features with a large mean lose no digits.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Take in a batch (n, d), n ≥ 1; raises ValueError if it is not finite."""
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity")
        mean = x.mean(0)
        x = x - mean
        delta, total = mean - self.mean, self.n + len(x)
        self.scatter += x.T @ x + torch.outer(delta, delta) * (self.n * len(x) / total)
        self.mean += delta * (len(x) / total)
        self.n = total

    def covariance(self) -> Tensor:
        """Unbiased (divided by n − 1); raises ValueError for fewer than two samples."""
        if self.n < 2:
            raise ValueError(f"a covariance takes at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)


@dataclass(frozen=True)
class Gaussian:
    """A mean (d,) and a root (d, r) of the covariance: covariance = root · rootᵀ."""

    mean: Tensor
    root: Tensor

    @staticmethod
    def of(mean: Tensor, covariance: Tensor) -> Gaussian:
        """From a mean (d,) and a covariance (d, d).

        Directions whose variance is below rounding are dropped.  Raises ValueError for a matrix
        that is no covariance.
        """
        mean, covariance = mean.double(), covariance.double()
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mean and covariance must be (d,) and (d, d), got "
                             f"{tuple(mean.shape)} and {tuple(covariance.shape)}")
        scale = covariance.abs().max()
        if not (scale.isfinite() and mean.isfinite().all()):
            raise ValueError("mean and covariance must be finite, got NaN or infinity")
        if (covariance - covariance.T).abs().max() > 1e-5 * scale:
            raise ValueError("the covariance is not symmetric")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if values[0] < -1e-5 * scale:
            raise ValueError(f"the covariance has a negative eigenvalue, {values[0]:.3g}")
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return Gaussian(mean, vectors[:, kept] * values[kept].sqrt())

    @staticmethod
    def fit(features: Tensor) -> Gaussian:
        """To features (n, d), n ≥ 2, with the unbiased covariance."""
        x, (n, d) = features.detach().cpu().double(), features.shape
        mean, x = x.mean(0), x - x.mean(0)
        if n <= d:  # the centred features are a root
            return Gaussian(mean, x.T / (n - 1) ** 0.5)
        return Gaussian.of(mean, x.T @ x / (n - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½) (Dowson and Landau 1982; FID: Heusel 2017).

    With roots Σ = R Rᵀ, the eigenvalues of Σ_a Σ_b are the squared singular values of R_aᵀ R_b,
    so the last trace is the sum of these.  No square root is taken of a matrix that is near
    singular, which is where the usual iterations lose digits or turn complex.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must be of one network, got {len(a.mean)} and {len(b.mean)} "
                         "channels")
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    traces = a.root.square().sum() + b.root.square().sum()
    return ((a.mean - b.mean).square().sum() + traces - 2 * cross).clamp_min(0).item()


def extrapolated_distance(a: Tensor, b: Tensor | Gaussian, paired: bool = False,
                          halvings: int = 4) -> float:
    """Fréchet distance extrapolated in 1/n to endless samples, as FID∞ (Chong and Forsyth 2020).

    The distance of finite sets is too large, by about c/n.  So the sets a (n, d), and b where it
    is also a set, are halved at random, which doubles that: D∞ = 2·D(n) − D(n/2), where D(n/2) is
    the mean distance of half to half over `halvings` halvings.  It can come out below 0.  Halves
    of fewer than d pictures follow that law only roughly, and D∞ stays too large.  With b a
    Gaussian only a's share of the error is removed.
    paired: row i of b belongs to row i of a (a picture and its reconstruction): halved alike.
    Raises ValueError for sets of fewer than 4 pictures.
    """
    if min(len(x) for x in (a, b) if isinstance(x, Tensor)) < 4:
        raise ValueError("extrapolation takes at least 4 pictures of each set")
    whole = frechet_distance(_fitted(a), _fitted(b))
    halves = [frechet_distance(x, y) for h in range(halvings)
              for x, y in zip(_halves(a, h, 0), _halves(b, h, 0 if paired else 1))]
    return 2 * whole - sum(halves) / len(halves)


def _fitted(x: Tensor | Gaussian) -> Gaussian:
    return x if isinstance(x, Gaussian) else Gaussian.fit(x)


def _halves(x: Tensor | Gaussian, *key: int) -> list[Gaussian]:
    """Gaussians of two disjoint random halves of a set; a Gaussian stays what it is."""
    if isinstance(x, Gaussian):
        return [x, x]
    order = torch.from_numpy(rng("halves", *key).permutation(len(x)))
    half = len(x) // 2
    return [Gaussian.fit(x[order[:half]]), Gaussian.fit(x[order[half:2 * half]])]


def kernel_distance(a: Tensor, b: Tensor, paired: bool = False, subsets: int = 100,
                    size: int = 1000) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased MMD² with the kernel (x·y/d + 1)³.

    a (n, d), b (m, d): features.  Returns mean and standard deviation over random subsets of
    `size` pictures of each set (of half the smaller set, if that is less).  Its expectation does
    not depend on the number of samples; it can come out below 0.
    paired: row i of b belongs to row i of a; kept together, and such pairs do not count.
    Raises ValueError for sets of fewer than 4 pictures.
    """
    size = min(size, len(a) // 2, len(b) // 2)
    if size < 2:
        raise ValueError(f"KID takes at least 4 pictures of each set, got {len(a)} and {len(b)}")
    values = []
    for i in range(subsets):
        draw = rng("kid", i)
        of_a = torch.from_numpy(draw.permutation(len(a))[:size])
        of_b = of_a if paired else torch.from_numpy(draw.permutation(len(b))[:size])
        values.append(_mmd2(a[of_a].double(), b[of_b].double(), paired))
    values = torch.stack(values)
    return values.mean().item(), values.std().item()


def _mmd2(x: Tensor, y: Tensor, paired: bool) -> Tensor:
    """Unbiased MMD² of two sets of the same size; polynomial kernel of degree 3."""
    d = x.shape[1]
    kxx, kyy, kxy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    cross = _mean_off_diagonal(kxy) if paired else kxy.mean()
    return _mean_off_diagonal(kxx) + _mean_off_diagonal(kyy) - 2 * cross


def _mean_off_diagonal(k: Tensor) -> Tensor:
    return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))


def are_probabilities(rows: Tensor) -> bool:
    """Whether all rows (n, classes) are 0 or more and sum to 1, to the digits of half precision."""
    sums = rows.double().sum(1)
    return bool((rows >= 0).all() and ((sums - 1).abs() < 0.01).all())


def inception_score(probabilities: Tensor, splits: int = 1) -> tuple[float, float]:
    """exp(mean KL(p(y|x) ‖ p(y))) (Salimans et al. 2016).

    probabilities: (n, classes), rows that sum to 1.  Returns mean and standard deviation (biased,
    as is usual) over `splits` consecutive parts.  Too low for n not far above the classes.
    Raises ValueError for other rows (logits), and for more splits than rows.
    """
    if not are_probabilities(probabilities):
        raise ValueError("the Inception Score takes rows of probabilities, which sum to 1")
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits must be 1 to {len(probabilities)}, got {splits}")
    scores = []
    for p in probabilities.double().tensor_split(splits):
        entropies = torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()
        scores.append((entropies[1] - entropies[0]).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per picture (Wang et al. 2004), (B,); 1 for equal ones.

    x, y: (B, 3, H, W) in [−1, 1], at least 11 pixels a side; y is clipped.  Compared as values in
    [0, 1], with a Gaussian window of 11 pixels, σ = 1.5, unpadded, K₁ = 0.01, K₂ = 0.03; mean over
    places and colour channels.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM takes pictures of at least 11x11 pixels, got {tuple(x.shape)}")
    x, y = (x.double() + 1) / 2, (y.double().clamp(-1, 1) + 1) / 2
    g = torch.exp(-(torch.arange(11, dtype=x.dtype, device=x.device) - 5).square() / (2 * 1.5**2))
    g = (g / g.sum()).expand(x.shape[1], 1, 1, 11)

    def blur(image: Tensor) -> Tensor:
        channels = image.shape[1]
        return F.conv2d(F.conv2d(image, g, groups=channels), g.mT, groups=channels)

    c1, c2 = 0.01**2, 0.03**2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    map_ = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return map_.flatten(1).mean(1)
