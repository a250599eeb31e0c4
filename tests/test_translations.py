"""Test-time translations: what they average, and that they are told apart."""

import dataclasses

import pytest
import torch
from torchvision.transforms import functional

from mnist_fast.config import Config
from mnist_fast.evaluate import evaluate, predict, predict_translated
from mnist_fast.loop import Run
from mnist_fast.model import build_network


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_network("notebook")


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)


def test_mean_over_torchvisions_translations(network, images):
    probabilities = [
        predict(network, functional.affine(images, 0.0, [x, y], 1.0, [0.0])).exp()
        for x in (-1, 0, 1)
        for y in (-1, 0, 1)
    ]
    expected = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(predict_translated(network, images, 1).exp(), expected)


def test_no_translation_is_the_plain_pass(network, images, runtime):
    labels = torch.zeros(5, dtype=torch.int64)
    plain = evaluate(network, images, labels, runtime, 5)
    assert evaluate(network, images, labels, runtime, 5, translations=0) == plain
    assert evaluate(network, images, labels, runtime, 5, translations=2).loss != plain.loss


def test_a_summary_tells_them_apart(small_betons, in_process, tmp_path):
    config = Config(
        data_dir=str(small_betons),
        run_dir=str(tmp_path / "run"),
        dataset="digits",
        epochs=1,
        validation_split=1181,
        batch_size=64,
        precision="no",
        step="eager",
        wandb="disabled",
        tta=1,
    )
    training = Run(config)
    record = {"epoch": 1, "validation_accuracy": 1.0, "validation_loss": 2.0}
    record |= {"epoch_seconds": 1.0, "images_per_second": 1.0}
    training.progress.records.append(record)
    summary = training.summarise()
    held_out, network = training.data.evaluation_set, training.state.best_network()
    expected = evaluate(network, *held_out.part, training.runtime, held_out.total, 1)
    assert summary["validation_accuracy_tta"] == expected.accuracy
    assert summary["validation_loss_tta"] == expected.loss
    assert summary["validation_accuracy"] == 1.0  # the plain pass's, untouched
    training.config = dataclasses.replace(config, tta=0)
    assert "validation_accuracy_tta" not in training.summarise()
