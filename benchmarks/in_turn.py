"""Seeds one after another in one program, which starts and compiles once."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mnist_fast import datasets, provenance, records, steps
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding, keep_for_training, read_all
from mnist_fast.errors import InputError, RunError
from mnist_fast.evaluate import evaluate
from mnist_fast.model import build_network, count_parameters
from mnist_fast.records import Evaluation, Record
from mnist_fast.runtime import Runtime
from mnist_fast.schedule import learning_rate
from mnist_fast.steps import Settings, TrainState

Pair = tuple[Tensor, Tensor]  # images uint8 (n, 1, 28, 28) and labels int64 (n,)
OnEpoch = Callable[[Record], None]


class Trainer:
    """Trains one seed after another in the same step.

    Args:
        config: the choices of a run; its seed is not used, its run_dir neither.
        runtime: of one process.
        train: the training images, on the device.
    """

    def __init__(self, config: Config, runtime: Runtime, train: Pair):
        self.config, self.runtime, self.train = config, runtime, train
        self.sharding = Sharding(len(train[1]), config.batch_size, config.drop_last)
        network = build_network(config.network, config.dropout)
        self.plan = steps.plan(config, network, runtime, self.sharding)
        runtime.set_precision(self.plan.job.precision)
        self.state = TrainState(config, network, runtime.device)
        self.step = self.plan.build(self.state, runtime)
        self.start(config.seed)
        self.step.warm_up(self.feed.example())

    def start(self, seed: int) -> None:
        """Gives the step a seed's fresh weights, orders and generators."""
        self.config = dataclasses.replace(self.config, seed=seed)
        self.state.start_over(seed, self.runtime, self.step.optimizer_state)
        self.step.parameters_changed()
        self.feed = ResidentFeed(*self.train, self.sharding, seed)

    def take_steps(self, epoch: int) -> None:
        """Takes an epoch's steps; does not wait for the device."""
        settings, count = Settings.of_epoch(self.config, epoch), self.sharding.steps
        for number, batch in enumerate(self.feed.epoch(epoch), start=epoch * count):
            self.step.run(batch, settings.at(learning_rate(self.config, number, count)))

    def train_epoch(self, epoch: int) -> tuple[Evaluation, float]:
        """Trains an epoch; loss and accuracy of its training images, and seconds."""
        begun = time.perf_counter()
        self.state.totals.zero_()
        self.take_steps(epoch)
        loss, hits, count = self.state.totals.tolist()  # waits for the device
        return Evaluation(loss / count, 100 * hits / count, int(count)), time.perf_counter() - begun

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Evaluates the best network on images that are on the device."""
        return evaluate(self.state.best_network(), images, labels, self.runtime, len(labels))

    def train_seed(self, seed: int, evaluation: Pair, on_epoch: OnEpoch) -> list[Record]:
        """Trains all epochs of a seed; their records.

        Raises:
            RunError: the loss is not finite.
        """
        self.start(seed)
        found = []
        for epoch in range(self.config.epochs):
            train, seconds = self.train_epoch(epoch)
            if not math.isfinite(train.loss):
                raise RunError(f"the loss is {train.loss} in epoch {epoch + 1}")
            split, held_out = records.split_of(self.config), self.evaluate(*evaluation)
            record = records.epoch_record(epoch + 1, train, split, held_out, seconds, seed=seed)
            found.append(record)
            on_epoch(record)
        return found


def train_in_turn(
    config: Config, seeds: Sequence[int], on_epoch: OnEpoch = lambda record: None
) -> Iterator[dict[str, Any]]:
    """Trains one network per seed, one after another.

    Args:
        config: the choices of a run; its seed is not used, its run_dir neither.
        seeds: one per network.
        on_epoch: is called after every epoch with its record; what it raises ends the training.

    Yields:
        Each seed's summary when it is trained, with the keys of `summary.json` that apply, and its
        records.

    Raises:
        InputError: bad configuration or data; several processes; tta.
        RunError: some seeds' loss was not finite; the others are trained.
    """
    started = time.perf_counter()
    runtime = Runtime(config)
    if runtime.world_size > 1 or config.tta:
        raise InputError("seeds in one program support neither several processes nor tta")
    train, evaluation, dataset = read_data(config, runtime)
    trainer = Trainer(config, runtime, train)
    facts = shared_facts(trainer, dataset)
    lost: list[int] = []
    for seed in seeds:
        startup = time.perf_counter() - started
        try:
            found = trainer.train_seed(seed, evaluation, on_epoch)
        except RunError:
            lost.append(seed)
            continue
        images = len(evaluation[1])
        more = facts | {"startup_seconds": startup, "records": found}
        yield records.summary(trainer.config, found, images, **more)
        started = time.perf_counter()
    if lost:
        names = ", ".join(map(str, lost))
        raise RunError(f"the loss is not finite with seed {names}: lower --learning_rate")


def shared_facts(trainer: Trainer, dataset: str) -> dict[str, Any]:
    """What is the same in the summaries of all seeds."""
    return {
        "dataset": dataset,
        "device": provenance.device_name(trainer.runtime.device),
        "precision": trainer.plan.job.precision,
        "step": trainer.plan.mode.name,
        "parameters": count_parameters(trainer.state.network),
        "git_commit": provenance.git_commit(),
        "versions": provenance.versions(),
    }


def read_data(config: Config, runtime: Runtime) -> tuple[Pair, Pair, str]:
    """Training and evaluation images on the device, and the data set's name."""
    manifest, folder = datasets.open_betons(config, runtime)
    kept = keep_for_training(manifest.train.samples, config.validation_split)
    train = read_all(folder / manifest.train.file, range(kept), runtime.device)
    held_out = datasets.open_evaluation_set(config, manifest, folder, runtime)
    return train, held_out.part, manifest.dataset
