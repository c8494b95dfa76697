"""Rotary position embedding."""

import pytest
import torch

from equimini.rope import rope_tables, rotate


def test_dot_products_depend_on_the_difference_of_positions_only():
    """Tables are rounded once, at most 2⁻²⁵ off, wherever they are; sums of 64 products too: ten
    thousand columns out, float32 is as exact as at the start."""
    def dot(q, k, m, n):
        turned = [rotate(x, rope_tables(torch.tensor([p]), 64)) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum(-1)

    q, k = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 64)
    exact = dot(q.double(), k.double(), 3, 0)
    for m in (3, 10_003, 1_000_003):
        assert (dot(q, k, m, m - 3) - exact).abs().max() < 64 * 4 * 2 ** -23
    assert (dot(q, k, 3, 1) - exact).abs().max() > 1e-3


def test_pairs_are_interleaved_and_turn_at_the_stated_frequencies():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 2] = 1.0  # first half of pair 1
    angle = 5 * 10000 ** (-2 / 8)
    y = rotate(x, rope_tables(torch.tensor([5]), 8)).flatten()
    expected = torch.zeros(8)
    expected[2], expected[3] = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    torch.testing.assert_close(y, expected)


def test_position_zero_changes_nothing_and_far_positions_stay_exact():
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(rotate(x, rope_tables(torch.tensor([0]), 8)), x)
    cos, _ = rope_tables(torch.tensor([10**6 + 1]), 8)
    assert cos[0, 0].item() == pytest.approx(torch.tensor(1e6 + 1).double().cos().item(), abs=1e-7)
    with pytest.raises(ValueError, match="head_dim"):
        rope_tables(torch.arange(3), 7)
