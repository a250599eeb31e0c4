"""Evaluation counts every image once, whatever their number."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data_prep.sources import load_digits
from mnist_fast import evaluate as evaluate_module
from mnist_fast.errors import RunError
from mnist_fast.evaluate import evaluate, inspect, predict
from mnist_fast.model import build_network


@pytest.fixture(scope="module")
def network():
    """A network whose answers differ from image to image, left in training mode."""
    torch.manual_seed(0)
    network = build_network("notebook", dropout=0.5)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network.train()


@pytest.fixture(scope="module")
def digits():
    source = load_digits()
    images = torch.from_numpy(source.train_images[:1_009]).unsqueeze(1)
    return images, torch.from_numpy(source.train_labels[:1_009]).long()


def one_by_one(network, images, labels):
    """Loss and accuracy from a plain loop over single images."""
    network.eval()
    loss = hits = 0.0
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            scores = network.logits((image[None].float() / 255 - 0.1307) / 0.3081)
            loss += F.cross_entropy(scores, label[None]).item()
            hits += scores.argmax().item() == label.item()
    network.train()
    return loss / len(labels), 100 * hits / len(labels)


@pytest.mark.parametrize("batch", [1_000, 64, 7])
def test_the_result_is_that_of_a_plain_loop(runtime, network, digits, monkeypatch, batch):
    """Over 1,009 images, a prime number, so that no size of batch divides it."""
    monkeypatch.setattr(evaluate_module, "BATCH", batch)
    result = evaluate(network, *digits, runtime, expected=1_009)
    loss, accuracy = one_by_one(network, *digits)
    assert result.images == 1_009
    assert result.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert 0 < accuracy < 100


@pytest.mark.parametrize("count", [1, 2, 999, 1_000, 1_001])
def test_every_number_of_images_is_counted(runtime, network, digits, count):
    images, labels = (tensor[:count] for tensor in digits)
    assert evaluate(network, images, labels, runtime, expected=count).images == count


def test_accuracy_is_a_percentage(runtime, network, digits):
    images = digits[0][:40]
    answers = predict(network, images).argmax(1)
    assert evaluate(network, images, answers, runtime, expected=40).accuracy == 100
    wrong = answers.clone()
    wrong[:10] = (answers[:10] + 1) % 10
    assert evaluate(network, images, wrong, runtime, expected=40).accuracy == 75


@pytest.mark.parametrize("expected", [99, 101])
def test_another_number_than_expected_is_an_error(runtime, network, digits, expected):
    images, labels = (tensor[:100] for tensor in digits)
    with pytest.raises(RunError, match=f"evaluated 100 images instead of {expected}"):
        evaluate(network, images, labels, runtime, expected)


def test_a_process_may_have_no_images(runtime, network, digits, monkeypatch):
    """Its part of the sums is 0; the others' are what they are."""
    others = torch.tensor([12.5, 3.0, 5.0], dtype=torch.float64)
    monkeypatch.setattr(runtime, "sum", lambda totals: totals + others)
    images, labels = (tensor[:0] for tensor in digits)
    result = evaluate(network, images, labels, runtime, expected=5)
    assert (result.loss, result.accuracy, result.images) == (2.5, 60, 5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_network_as_it_was(runtime, network, digits, training):
    network.train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    first = evaluate(network, *digits, runtime, expected=1_009)
    assert network.training is training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert evaluate(network, *digits, runtime, expected=1_009) == first


def test_predictions_are_in_float32_under_autocast_too(network, digits):
    plain = predict(network, digits[0][:32])
    assert plain.dtype == torch.float32
    assert plain.shape == (32, 10)
    torch.testing.assert_close(plain.exp().sum(1), torch.ones(32))


def test_the_outcome_is_the_same_from_several_processes():
    torch.manual_seed(0)
    network = build_network()
    images = torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (50,))
    alone = inspect(network, images, labels, SimpleNamespace(gather=lambda value: [value]))
    parts = []
    for start, stop in ((0, 20), (20, 20), (20, 50)):  # one process has no image
        runtime = SimpleNamespace(gather=lambda value: parts.append(value) or [value])
        inspect(network, images[start:stop], labels[start:stop], runtime)
    together = inspect(network, images[:20], labels[:20], SimpleNamespace(gather=lambda _: parts))
    for name in ("labels", "predictions", "misread", "images", "probabilities"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
    assert alone.errors == int((alone.predictions != labels).sum()) > 20
    assert torch.equal(images[alone.misread, 0], alone.images)
    assert alone.probabilities.tolist() == sorted(alone.probabilities.tolist(), reverse=True)
