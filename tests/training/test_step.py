"""The optimizer step by hand: average of weights, clipping, the learning rate's curve."""

import math

import pytest
import torch

from equimini.training.step import Ema, Stepper, cooldown, warmup_decay_lr
from equimini.utils.errors import UserError


@pytest.mark.parametrize("warmup, decays", ((False, [0.9, 0.9, 0.9]),
                                            (True, [2 / 11, 3 / 12, 4 / 13])))
def test_the_average_moves_by_its_decay_and_copies_buffers(warmup, decays):
    model = torch.nn.BatchNorm1d(2)
    ema, expected = Ema(model, 0.9, warmup), torch.ones(2)
    for k, decay in enumerate(decays):
        with torch.no_grad():
            model.weight.fill_(k + 2.0)
            model.running_mean.fill_(k + 5.0)
        ema.update(model)
        expected = decay * expected + (1 - decay) * (k + 2)
        torch.testing.assert_close(ema.model.weight.data, expected)
        assert torch.equal(ema.model.running_mean, model.running_mean)
    assert model.weight.requires_grad and not ema.model.weight.requires_grad


def test_gradients_are_clipped_and_steps_that_are_not_finite_left_out():
    weight = torch.nn.Parameter(torch.zeros(2))
    stepper = Stepper(torch.optim.SGD([weight], lr=9.0), patience=2)

    def step(gradient):
        (weight * torch.tensor(gradient)).sum().backward()
        return stepper(lr=0.5, clip=1.0)

    assert step([3.0, 4.0]) == pytest.approx(5)  # the norm before clipping
    torch.testing.assert_close(weight.data, -0.5 * torch.tensor([0.6, 0.8]))
    assert step([0.3, 0.4]) == pytest.approx(0.5)  # below the limit, and nothing is left over
    after = -0.5 * torch.tensor([0.9, 1.2])
    torch.testing.assert_close(weight.data, after)
    assert math.isnan(step([math.nan, 0.0])) and stepper.skipped == 1
    torch.testing.assert_close(weight.data, after)
    with pytest.raises(UserError, match="not finite 2 times in a row"):
        step([math.inf, 0.0])


def test_learning_rate_rises_from_0_then_falls_in_steps():
    found = [warmup_decay_lr(k, 8.0, 4, 0.5, 3) for k in range(11)]
    assert found == [0, 2, 4, 6, 8, 8, 8, 4, 4, 4, 2]
    assert warmup_decay_lr(0, 8.0, 0) == warmup_decay_lr(999, 8.0, 0) == 8


def test_cooldown():
    assert [cooldown(k, 10, 0.4) for k in range(5, 11)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])
    assert cooldown(9, 10, 0) == 1
