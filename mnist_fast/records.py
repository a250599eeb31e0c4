"""One epoch's record and the run's summary: their keys are defined here, and read everywhere.

Accuracies are percentages, times are seconds. A run is evaluated on one split, `test` or
`validation`, which is part of the keys: `test_accuracy`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mnist_fast.config import Config

Split = Literal["test", "validation"]
Record = dict[str, Any]
METRICS = ("loss", "accuracy")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean negative log-likelihood, accuracy in percent, and the images that were counted."""

    loss: float
    accuracy: float
    images: int


def split_of(config: Config) -> Split:
    """The split that a run is evaluated on: held-out training images where it has some."""
    return "validation" if config.validation_split else "test"


def split_in(record: Mapping[str, Any]) -> Split:
    """The split in a record, or in a summary."""
    return "test" if "test_accuracy" in record else "validation"


def accuracy_in(record: Mapping[str, Any]) -> float:
    """The accuracy of the split that the run was evaluated on, in percent."""
    return record[f"{split_in(record)}_accuracy"]


def epoch_record(
    epoch: int,
    train: Evaluation,
    split: Split,
    evaluation: Evaluation,
    seconds: float,
    **more: Any,
) -> Record:
    """One epoch's line of `metrics.jsonl`.

    Args:
        epoch: its number, from 1.
        train: of the training images, while the network learned.
        split: what was evaluated.
        evaluation: of the split, at the epoch's end.
        seconds: of training.
        more: other fields, by name.
    """
    return {
        "epoch": epoch,
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        f"{split}_loss": evaluation.loss,
        f"{split}_accuracy": evaluation.accuracy,
        "epoch_seconds": seconds,
        "images_per_second": train.images / seconds,
        **more,
    }


def check_record(record: Any, epoch: int) -> None:
    """Raises ValueError unless a record is one that a run could have written for an epoch."""
    if not isinstance(record, dict) or record.get("epoch") != epoch:
        raise ValueError("its records do not match its epochs")
    split = split_in(record)
    numbers = [f"{name}_{metric}" for name in ("train", split) for metric in METRICS]
    if (
        not all(is_duration(record.get(key)) for key in ("epoch_seconds", "images_per_second"))
        or not all(isinstance(record.get(key), int | float) for key in numbers)
        or not all(isinstance(value, str | int | float | None) for value in record.values())
    ):
        raise ValueError("its records do not match its epochs")


def is_duration(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def summary(
    config: Config,
    records: Sequence[Record],
    images: int,
    translated: Evaluation | None = None,
    /,
    **more: Any,
) -> Record:
    """The run's `summary.json`.

    Args:
        config: the run's choices.
        records: of all epochs, at least one.
        images: that were evaluated.
        translated: with test-time translations, which get names of their own.
        more: other fields, by name.
    """
    split, last = split_of(config), records[-1]
    best = max(records, key=accuracy_in)
    train_seconds = sum(record["epoch_seconds"] for record in records)
    trained = sum(record["epoch_seconds"] * record["images_per_second"] for record in records)
    if translated is not None:
        more |= {f"{split}_accuracy_tta": translated.accuracy, f"{split}_loss_tta": translated.loss}
    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "epochs": config.epochs,
        f"{split}_accuracy": last[f"{split}_accuracy"],
        f"{split}_loss": last[f"{split}_loss"],
        f"best_{split}_accuracy": best[f"{split}_accuracy"],
        "best_epoch": best["epoch"],
        f"{split}_images": images,
        "train_seconds": train_seconds,
        "images_per_second": trained / train_seconds,
        **more,
    }


def describe(record: Record, epochs: int) -> str:
    """An epoch's record as one line."""
    split = split_in(record)
    return (
        f"epoch {record['epoch']:>2}/{epochs}"
        f"  train {record['train_accuracy']:.2f} % ({record['train_loss']:.4f})"
        f"  {split} {record[f'{split}_accuracy']:.2f} % ({record[f'{split}_loss']:.4f})"
        f"  {record['epoch_seconds']:.2f} s  {record['images_per_second']:,.0f} images/s"
    )
