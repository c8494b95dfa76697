"""Rotary position embedding."""

import pytest
import torch

from equimini.rope import rope_tables, rotate


def test_dot_products_depend_on_the_difference_of_positions_only():
    q, k = torch.randn(1, 1, 2, 16, dtype=torch.float64), torch.randn(1, 1, 2, 16).double()

    def dot(m, n):
        turned = [rotate(x, rope_tables(torch.tensor([p]), 16)) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(dot(9, 4), dot(1005, 1000), rtol=0, atol=1e-4)  # float32 tables
    assert (dot(9, 4) - dot(9, 5)).abs().max() > 1e-3


def test_ten_thousand_columns_out_float32_is_as_exact_as_at_the_start():
    """Tables are rounded once, at most 2⁻²⁵ off, wherever they are; sums of 64 products too."""
    q, k = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 4, 64)
    for m in (3, 10_003, 1_000_003):
        tables = [rope_tables(torch.tensor([p]), 64) for p in (m, m - 3)]
        turned = [rotate(x, table) for x, table in zip((q, k), tables)]
        exact = [rotate(x.double(), rope_tables(torch.tensor([p]), 64))
                 for x, p in ((q, 3), (k, 0))]
        error = (turned[0] * turned[1]).sum(-1) - (exact[0] * exact[1]).sum(-1)
        assert error.abs().max() < 64 * 4 * 2 ** -23


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
