"""Learning rate as a pure function of the step."""

import math

from mnist_fast.config import Config

START_FACTOR = 25.0  # onecycle starts at peak / 25 and ends at peak / 25 / 10,000, as torch's does
END_FACTOR = 1e4


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step.

    Args:
        config: peak rate, schedule, epochs.
        step: optimiser step since the start of the run, from 0.
        steps_per_epoch: steps of one epoch.
    """
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        decays = step // (steps_per_epoch * config.step_epochs)
        return config.learning_rate * config.step_gamma**decays
    return one_cycle(
        step, config.epochs * steps_per_epoch, config.learning_rate, config.warmup_fraction
    )


def one_cycle(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """One-cycle policy with cosine annealing (Smith, Topin: Super-Convergence, 2017).

    Rises from peak / 25 over the warm-up, then falls to nearly 0 at the last step; equal to
    `torch.optim.lr_scheduler.OneCycleLR`.
    """
    start, end = peak / START_FACTOR, peak / START_FACTOR / END_FACTOR
    top = warmup_fraction * steps - 1
    if step <= top and top > 0:
        return _cosine(start, peak, step / top)
    # warm-up may round to nothing in very short runs: then the rate only falls
    top = max(top, -1.0)
    return _cosine(peak, end, (step - top) / (steps - 1 - top) if steps - 1 > top else 1.0)


def _cosine(start: float, end: float, fraction: float) -> float:
    """From start (fraction 0) to end (fraction 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
