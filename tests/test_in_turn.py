"""Seeds trained one after another in one program do what each of them does alone."""

import dataclasses

import pytest
import torch

from benchmarks import in_turn
from benchmarks.in_turn import train_in_turn
from mnist_fast.config import Config
from mnist_fast.errors import InputError, RunError
from mnist_fast.loop import Run

SEEDS = [3, 1, 2]
FAST = Config(  # every part that a step has, in float32: a rest batch, EMA, a plain last epoch
    dataset="digits",
    validation_split=1181,  # leaves 256 images to train on
    epochs=2,
    batch_size=96,
    learning_rate=0.01,
    schedule="onecycle",
    nesterov=True,
    weight_decay=1e-3,
    dropout=0.0,
    label_smoothing=0.1,
    affine_rotation=10,
    shear=5,
    translate=0.09,
    scale_min=0.9,
    scale_max=1.1,
    elastic=1.0,
    brightness=0.2,
    contrast=0.2,
    resampling="bilinear",
    plain_epochs=1,
    precision="no",
    step="eager",
    feed="resident",
    wandb="disabled",
    checkpoint_every=0,
)


def train_alone(config):
    """A single run's losses and accuracies by epoch."""
    training = Run(config)
    records = []
    for _ in range(config.epochs):
        records.append((training.train_epoch(), training.evaluate()))
        training.progress.epoch, training.progress.step = training.progress.epoch + 1, 0
        training.state.totals.zero_()
    return records


def test_in_turn_equals_single_runs(small_betons, in_process, tmp_path):
    """Exactly: a seed finds nothing of the one before."""
    config = dataclasses.replace(FAST, data_dir=str(small_betons), dropout=0.1, ema_decay=0.5)
    for summary in train_in_turn(config, SEEDS[:2]):
        seed = summary["seed"]
        run_dir = str(tmp_path / str(seed))
        records = train_alone(dataclasses.replace(config, seed=seed, run_dir=run_dir))
        for mine, (train, held_out) in zip(summary["records"], records, strict=True):
            assert mine["train_loss"] == train.loss
            assert mine["validation_loss"] == pytest.approx(held_out.loss, rel=1e-12)
            assert mine["train_accuracy"] == train.accuracy
            assert mine["validation_accuracy"] == held_out.accuracy
        assert summary["validation_accuracy"] == records[-1][1].accuracy


def test_divergence_is_told(small_betons, in_process):
    config = dataclasses.replace(
        FAST, data_dir=str(small_betons), learning_rate=1e3, schedule="constant", weight_decay=1.0
    )
    with pytest.raises(RunError, match="the loss is not finite with seed 1: lower"):
        list(train_in_turn(dataclasses.replace(config, batch_size=8), [1]))


def test_a_lost_seed_does_not_end_the_others(small_betons, in_process, monkeypatch):
    config = dataclasses.replace(FAST, data_dir=str(small_betons), epochs=1)
    start = in_turn.Trainer.start

    def spoil(trainer, seed):
        start(trainer, seed)
        if seed == 1:
            next(trainer.state.network.parameters()).data.fill_(torch.inf)

    monkeypatch.setattr(in_turn.Trainer, "start", spoil)
    summaries = []
    with pytest.raises(RunError, match="the loss is not finite with seed 1: lower"):
        summaries.extend(train_in_turn(config, SEEDS))
    # `extend` keeps what came before the end
    assert [summary["seed"] for summary in summaries] == [3, 2]


def test_translations_are_refused(small_betons, in_process):
    config = dataclasses.replace(FAST, data_dir=str(small_betons), tta=1)
    with pytest.raises(InputError, match="tta"):
        list(train_in_turn(config, [1]))
