"""Learning rates, step by step, against torch's schedulers."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from mnist_fast.config import Config
from mnist_fast.schedule import learning_rate, one_cycle


def rates_of(scheduler_type, steps, peak, **options):
    """The rates a torch scheduler gives to each of `steps` optimiser steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser itself never steps
        scheduler = scheduler_type(optimizer, **options)
        for step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            if step + 1 < steps:
                scheduler.step()
    return rates


# torch divides by zero where warmup * steps is 1
CYCLES = [
    (w, n) for w in (0.0, 0.1, 0.3, 0.5, 1.0) for n in (1, 2, 3, 5, 10, 33, 165) if w * n != 1
]


@pytest.mark.parametrize(("warmup", "steps"), CYCLES)
def test_one_cycle_is_torchs(warmup, steps):
    theirs = rates_of(OneCycleLR, steps, 0.1, max_lr=0.1, total_steps=steps, pct_start=warmup)
    ours = [one_cycle(step, steps, 0.1, warmup) for step in range(steps)]
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("warmup", "steps"), [(0.5, 2), (0.1, 10), (1.0, 1)])
def test_one_cycle_needs_no_special_length(warmup, steps):
    rates = [one_cycle(step, steps, 0.1, warmup) for step in range(steps)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1 / 25 / 1e4)
    assert max(rates) <= 0.1


def test_onecycle_spans_the_whole_run():
    config = Config(schedule="onecycle", learning_rate=0.2, epochs=4, warmup_fraction=0.3)
    theirs = rates_of(OneCycleLR, 44, 0.2, max_lr=0.2, total_steps=44, pct_start=0.3)
    ours = [learning_rate(config, step, steps_per_epoch=11) for step in range(44)]
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert max(ours) == pytest.approx(0.2, rel=1e-2)
    assert ours[-1] == pytest.approx(0.2 / 25 / 1e4)


@pytest.mark.parametrize("step_epochs", [1, 2, 6])
def test_step_is_torchs(step_epochs):
    config = Config(schedule="step", learning_rate=0.1, step_epochs=step_epochs, step_gamma=0.3)
    theirs = rates_of(StepLR, 10 * 7, 0.1, step_size=step_epochs * 7, gamma=0.3)
    ours = [learning_rate(config, step, steps_per_epoch=7) for step in range(10 * 7)]
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(set(ours)) == -(-10 // step_epochs)


def test_constant_is_constant():
    config = Config(schedule="constant", learning_rate=0.07, epochs=3)
    assert {learning_rate(config, step, steps_per_epoch=5) for step in range(15)} == {0.07}
