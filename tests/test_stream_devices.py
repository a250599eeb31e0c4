"""Streamed batches are right on the device of the run, however slow it is."""

import gc

import pytest
import simulated_gpu
import torch
from ffcv.loader import epoch_iterator
from simulated_gpu import GPU, address_of

from mnist_fast.beton import Beton
from mnist_fast.data import Sharding, StreamFeed, epoch_order

SAMPLES = 1_437
EPOCHS = (0, 1, 2)


@pytest.fixture(scope="module")
def digits(small_betons):
    """All images and labels of the beton."""
    return Beton(small_betons / "train.beton").read(range(SAMPLES))


@pytest.fixture
def main_stream(monkeypatch):
    """The stream of a simulated GPU that trains."""
    return simulated_gpu.install(monkeypatch)


def stream_feed(folder, device, batch_size=16):
    sharding = Sharding(SAMPLES, batch_size, drop_last=False)
    return StreamFeed(folder / "train.beton", sharding, 1, device)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch_size", [16, 96])
def test_no_batch_holds_another_ones_images_on_the_slowest_gpu(
    small_betons, digits, main_stream, batch_size
):
    """Steps read their batches long after the loader has gone on, and into the next epoch."""
    feed = stream_feed(small_betons, GPU, batch_size)
    seen = []
    for epoch in EPOCHS:
        for batch in feed.epoch(epoch):
            images, labels = address_of(batch.images), address_of(batch.labels)
            main_stream.submit(lambda i=images, n=labels: seen.append((i(), n())))
        del batch, images, labels
        gc.collect()  # the epoch's memory is free, its last steps have not run
    main_stream.synchronize()
    assert len(seen) == len(EPOCHS) * feed.sharding.steps
    order = torch.cat([epoch_order(1, epoch, SAMPLES) for epoch in EPOCHS])
    sizes = [len(labels) for _, labels in seen]
    expected = zip(digits[0][order].split(sizes), digits[1][order].split(sizes), strict=True)
    wrong = [
        step
        for step, ((images, labels), (due, due_labels)) in enumerate(
            zip(seen, expected, strict=True)
        )
        if not (torch.equal(images, due) and torch.equal(labels, due_labels))
    ]
    assert wrong == []


@pytest.mark.usefixtures("main_stream")
def test_batches_on_a_gpu_have_the_strides_of_the_resident_feed(small_betons):
    """Others would have the augmentation compiled once more."""
    batch = next(stream_feed(small_betons, GPU).epoch(0))
    assert batch.images.stride() == (784, 784, 28, 1)


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_leaves_the_gpu_alone(
    small_betons, digits, monkeypatch
):
    touched = []

    def touch(*_arguments, **_options):
        touched.append(True)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(epoch_iterator, "IS_CUDA", True)  # as FFCV sets it there
    for name in ("current_stream", "Stream", "Event", "stream"):
        monkeypatch.setattr(torch.cuda, name, touch)
    monkeypatch.setattr(torch.Tensor, "pin_memory", touch)
    kept = list(stream_feed(small_betons, torch.device("cpu")).epoch(0))
    assert touched == []
    order = epoch_order(1, 0, SAMPLES)
    assert torch.equal(torch.cat([batch.images for batch in kept]), digits[0][order])
    assert torch.equal(torch.cat([batch.labels for batch in kept]), digits[1][order])
