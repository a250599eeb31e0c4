"""A training step as tests drive it: planned, built and fed by epoch and learning rate."""

from types import SimpleNamespace

import torch

from mnist_fast import steps
from mnist_fast.steps import Job, Settings, TrainState


def alone(device="cpu"):
    """What `steps.plan` asks of the runtime of a single process."""
    return SimpleNamespace(device=torch.device(device), gather=lambda value: [value])


def plan_of(config, sharding, device="cpu", network=None):
    """The plan of a single process."""
    return steps.plan(config, network, alone(device), sharding)


class Trained:
    """A step and what it trains.

    With `mode` the plan is left out, and that class is taken as if it supported everything.
    """

    def __init__(self, config, network, runtime, sharding, mode=None):
        self.config, self.runtime, self.sharding = config, runtime, sharding
        if mode is None:
            self.plan = steps.plan(config, network, runtime, sharding)
        else:
            precision = "no" if config.precision == "auto" else config.precision
            job = Job(config, network, runtime.device, precision, sharding)
            self.plan = steps.Plan(mode, job, {})
        runtime.set_precision(self.plan.job.precision)
        self.train_state = TrainState(config, network, runtime.device)
        self.step = self.plan.build(self.train_state, runtime)
        self.mode = self.step.name
        self.start_epoch(0)

    network = property(lambda self: self.train_state.network)
    averaged = property(lambda self: self.train_state.averaged)
    totals = property(lambda self: self.train_state.totals)

    def start_epoch(self, epoch):
        self.settings = Settings.of_epoch(self.config, epoch)

    def __call__(self, batch, learning_rate):
        self.step.run(batch, self.settings.at(learning_rate))

    def warm_up(self, example):
        self.step.warm_up(example)

    def reset_totals(self):
        self.totals.zero_()

    def best_network(self):
        return self.train_state.best_network()

    def gradient_norm(self):
        return self.train_state.gradient_norm()

    def state(self):
        return self.train_state.save(self.step.optimizer_state)

    def load_state(self, tensors):
        self.train_state.load(tensors, self.step.optimizer_state)
        self.step.parameters_changed()

    def start_over(self, seed):
        self.train_state.start_over(seed, self.runtime, self.step.optimizer_state)
        self.step.parameters_changed()
