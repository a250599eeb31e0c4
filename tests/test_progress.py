"""The bar: batches pass through it unchanged, and it waits for the device once a second at most."""

import itertools
import time
from types import SimpleNamespace

import pytest

from mnist_fast import progress


def batches(count, seconds=0.0):
    for _ in range(count):
        time.sleep(seconds)
        yield SimpleNamespace(global_size=50)


def test_it_shows_loss_accuracy_speed_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    given = list(batches(4))
    shown = progress.show(given, "epoch 1/3", range(6, 10), 20, lambda: [30.0, 80.0, 100.0, 0.0])
    assert list(shown) == given
    text = capsys.readouterr().err
    assert "epoch 1/3: loss 0.3000, accuracy 80.00 %, " in text
    assert "images/s, " in text
    assert "00:00 left" in text
    assert "100 % |" in text


def test_it_reads_the_totals_at_most_once_per_interval(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.2)
    reads = []

    def read():
        reads.append(time.monotonic())
        return [1.0, 1.0, 1.0]

    list(progress.show(batches(100, 0.01), "x", range(100), 0, read))
    assert len(reads) > 1
    gaps = [after - before for before, after in itertools.pairwise(reads)]
    assert all(gap >= 0.2 for gap in gaps)


@pytest.mark.parametrize("left, text", [(59.0, "00:59 left"), (4000.0, "1:06:40 left")])
def test_time_left(left, text):
    assert text in progress.describe([1.0, 5.0, 10.0], 12_345.6, left)
    assert "12,346 images/s" in progress.describe([1.0, 5.0, 10.0], 12_345.6, left)


def test_nothing_counted_yet_shows_no_accuracy():
    assert progress.describe([0.0, 0.0, 0.0], 1.0, 1.0) == "1 images/s, 00:01 left"
