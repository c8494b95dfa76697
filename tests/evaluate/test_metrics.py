"""The formulas of the evaluation against closed forms."""

import math

import numpy as np
import pytest
import torch

from equimini.evaluate.metrics import (Gaussian, Statistics, _mmd2, extrapolated_distance,
                                       frechet_distance, inception_score, kernel_distance, ssim)

EPS = torch.finfo(torch.float64).eps


def draw(n, d, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def rotation(d, seed=0):
    return torch.linalg.qr(draw(d, d, seed))[0]


def test_frechet_distance_of_gaussians_with_a_common_basis():
    """Covariances that commute: ‖μ_a − μ_b‖² + Σ (√λ_a − √λ_b)²."""
    q, mean = rotation(5), torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
    for la, lb in (([4.0, 1.0, 9.0, 0.25, 2.0], [1.0, 1.0, 4.0, 1.0, 0.5]),
                   ([4.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 4.0, 0.0, 2.0]),  # other ranges
                   ([1e-6, 1.0, 0.0, 1e6, 0.0], [0.0] * 5)):
        la, lb = (torch.tensor(v, dtype=torch.float64) for v in (la, lb))
        a = Gaussian.of(torch.zeros(5), q @ la.diag() @ q.T)
        b = Gaussian.of(mean, q @ lb.diag() @ q.T)
        expected = mean.square().sum() + (la.sqrt() - lb.sqrt()).square().sum()
        # an eigenvalue is off by a few ε·λmax, and one of exactly 0 is dropped
        size = max(la.max(), lb.max()).item()
        near = pytest.approx(expected.item(), abs=1e3 * EPS * size + 1e-12)
        assert frechet_distance(a, b) == near
        assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-9 * size)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In two dimensions tr (Σ_a Σ_b)^½ = √(tr Σ_a Σ_b + 2 √det Σ_a Σ_b)."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    product = a @ b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    zero = torch.zeros(2)
    assert frechet_distance(Gaussian.of(zero, a), Gaussian.of(zero, b)) == pytest.approx(
        expected, rel=1e-13)


@pytest.mark.parametrize("n, d", ((40, 6), (6, 40), (40, 40)))
def test_a_fit_by_covariance_and_by_features_is_the_same_gaussian(n, d):
    x, y = draw(n, d, 1, shift=3), draw(n + 3, d, 2, scale=2)
    statistics = [Statistics(d) for _ in range(2)]
    for s, set_ in zip(statistics, (x, y)):
        s.update(set_)
    whole = frechet_distance(*(Gaussian.of(s.mean, s.covariance()) for s in statistics))
    assert frechet_distance(Gaussian.fit(x), Gaussian.fit(y)) == pytest.approx(whole, rel=1e-11)
    assert torch.allclose(statistics[0].covariance(), torch.cov(x.T), atol=1e-13)


def test_equal_sets_are_at_distance_zero_and_shifted_ones_at_the_shift():
    x = torch.cat((draw(30, 8), torch.zeros(30, 4)), 1)  # rank-deficient
    assert frechet_distance(Gaussian.fit(x), Gaussian.fit(x.flip(0))) < 1e-12
    assert frechet_distance(Gaussian.fit(x), Gaussian.fit(x + 2)) == pytest.approx(4 * 12)
    few = draw(5, 300)
    assert frechet_distance(Gaussian.fit(few), Gaussian.fit(few)) < 1e-11


def test_one_pass_equals_the_whole_in_any_order_and_batches():
    x = draw(101, 7, shift=1e6)  # a large mean: naive sums of squares would lose the variance
    expected = torch.cov((x - 1e6).T)
    for order in (torch.arange(101), torch.from_numpy(np.random.default_rng(0).permutation(101))):
        for size in (1, 10, 101):
            s = Statistics(7)
            for batch in x[order].split(size):
                s.update(batch)
            # x itself is rounded to ε·10⁶, and each of 101 updates rounds the mean as much
            assert torch.allclose(s.covariance(), expected, rtol=0, atol=101 * EPS * 1e6)
            assert torch.allclose(s.mean, x.mean(0), rtol=101 * EPS)
    assert s.n == 101


def test_what_is_no_gaussian_is_refused():
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3)
    lopsided = eye.clone()
    lopsided[0, 1] = 0.5
    for mean, covariance, text in (
            (zero, eye[:2], "shape|got"), (zero, lopsided, "symmetric"), (zero, -eye, "negative"),
            (zero, eye * math.nan, "finite"), (zero + math.inf, eye, "finite")):
        with pytest.raises(ValueError, match=text):
            Gaussian.of(mean, covariance)
    with pytest.raises(ValueError, match="one network"):
        frechet_distance(Gaussian.of(zero, eye), Gaussian.of(zero[:2], eye[:2, :2]))
    with pytest.raises(ValueError, match="finite"):
        Statistics(2).update(torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match="at least 2"):
        Statistics(2).covariance()


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5


def test_extrapolation_removes_most_of_the_bias():
    """20 pairs of sets of one distribution: plain distances are far above 0, D∞ is near."""
    pairs = [(draw(200, 10, 2 * i), draw(300, 10, 2 * i + 1)) for i in range(20)]
    plain = [frechet_distance(Gaussian.fit(a), Gaussian.fit(b)) for a, b in pairs]
    mean, error = mean_and_error([extrapolated_distance(a, b) for a, b in pairs])
    # 1/n² terms are left: about (d/n)² a direction
    assert abs(mean) < 4 * error + 10 * (10 / 200) ** 2 and abs(mean) < 0.1 * np.mean(plain)
    known = Gaussian.of(torch.zeros(10), torch.eye(10))  # a reference without an error of its own
    mean, error = mean_and_error([extrapolated_distance(a, known) for a, _ in pairs])
    assert abs(mean) < 4 * error + 10 * (10 / 200) ** 2
    far = extrapolated_distance(pairs[0][0] + 3, pairs[0][1])
    assert far == pytest.approx(90, rel=0.1)  # 10 · 3²


def test_pairs_are_halved_together():
    x = draw(41, 12)
    assert extrapolated_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)
    assert extrapolated_distance(x, x) < -0.1  # halves of other pictures differ
    with pytest.raises(ValueError, match="at least 4"):
        extrapolated_distance(x[:3], x)


def test_kid_is_the_plain_double_sum_and_leaves_pairs_out():
    """On whole sets; on random subsets it is that on average, as the sum is unbiased."""
    a, b = draw(8, 3, 1), draw(8, 3, 2, shift=1.0)

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    for paired in (False, True):
        within = [sum(k(s[i], s[j]) for i in range(8) for j in range(8) if i != j) / 56
                  for s in (a, b)]
        pairs = [k(a[i], b[j]) for i in range(8) for j in range(8) if not paired or i != j]
        expected = sum(within) - 2 * sum(pairs) / len(pairs)
        assert _mmd2(a, b, paired).item() == pytest.approx(expected, rel=1e-12)
        mean, spread = kernel_distance(a, b, paired, subsets=400)
        assert abs(mean - expected) < 4 * spread / 400**0.5
    assert kernel_distance(a, a, paired=True)[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 4"):
        kernel_distance(a[:3], b)


def test_inception_score_of_known_mixtures():
    classes = torch.eye(5, dtype=torch.float64)
    sure = classes.repeat(4, 1)
    assert inception_score(sure)[0] == pytest.approx(5)  # sure and balanced: the class count
    assert inception_score(sure.flip(0))[0] == pytest.approx(5)
    assert inception_score(torch.full((7, 5), 0.2))[0] == pytest.approx(1)  # never sure
    assert inception_score(classes[:1].repeat(9, 1))[0] == pytest.approx(1)  # always the same
    # p(y|x) = 0.9 on the own class of two, 0.1 on the other: log IS = log 2 − H(0.9)
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(10, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert inception_score(p)[0] == pytest.approx(2 / math.exp(entropy), rel=1e-6)
    halves = torch.cat((classes[:1].repeat(10, 1), sure[:10]))
    assert inception_score(halves, splits=2) == pytest.approx((3, 2))  # 1 and 5
    with pytest.raises(ValueError, match="splits"):
        inception_score(sure, 21)
    for wrong in (2 * sure, sure - 0.1, torch.randn(20, 5), sure.log()):
        with pytest.raises(ValueError, match="sum to 1"):
            inception_score(wrong)


def test_ssim_closed_forms():
    x = torch.linspace(-0.9, 0.9, 20).expand(2, 3, 16, 20)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    flat, a, b = torch.zeros(2, 3, 16, 20), 0.75, 0.9  # in [0, 1]; only the luminance term is left
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(flat + 0.5, flat + 0.8).tolist() == pytest.approx([expected] * 2)
    assert torch.equal(ssim(flat, flat + 9), ssim(flat, flat + 1))  # clipped
    with pytest.raises(ValueError, match="11x11"):
        ssim(x[..., :8], x[..., :8])


def test_ssim_is_the_formula_with_the_whole_window_at_once():
    """One window, as weighted moments of 11 x 11 pixels."""
    x, y = (draw(3 * 11, 11, seed).view(1, 3, 11, 11).clamp(-1, 1) for seed in (5, 6))
    line = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / 4.5)
    weight = torch.outer(line, line) / line.sum() ** 2
    values = []
    for p, q in zip((x[0] + 1) / 2, (y[0] + 1) / 2):
        mp, mq = (weight * p).sum(), (weight * q).sum()
        vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
        cov = (weight * (p - mp) * (q - mq)).sum()
        values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                      / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-10)
    assert ssim(x, -x).item() < -0.5  # opposite structure
