"""The stream feed trains from a beton far larger than what it keeps in memory."""

import json
import shutil
import sys
import threading

import helpers
import numpy as np
import pytest

COPIES = 4_176  # of the 1,437 digits: 6,000,912 images, 4.7 GB
STEPS = 300
LIMIT = 1e9  # bytes

# A program of its own, so that nothing of another test is counted: trains a few steps from the
# small beton, then from the large one, and watches its anonymous memory (not the page cache).
PROGRAM = """
import json, pathlib, sys, threading, time
import torch
from mnist_fast.config import Config
from mnist_fast.data import Sharding, StreamFeed
from mnist_fast.model import build_network
from mnist_fast.runtime import Runtime
from stepping import Trained

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

highest = 0
def watch():
    global highest
    while True:
        highest = max(highest, anonymous())
        time.sleep(0.02)

def train(path, samples, steps):
    config = Config(step="eager", precision="no", dropout=0.0)
    runtime, sharding = Runtime(config), Sharding(samples, 128, drop_last=False)
    feed = StreamFeed(pathlib.Path(path), sharding, 1, runtime.device)
    step = Trained(config, build_network(), runtime, sharding)
    step.start_epoch(0)
    batches = feed.epoch(0)
    for _ in range(steps):
        step(next(batches), 0.01)
    loss, _, images = step.totals.tolist()
    batches.close()
    return loss / images

small, large, samples, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
train(small, 1437, 5)
before = highest = anonymous()
threading.Thread(target=watch, daemon=True).start()
loss = train(large, samples, steps)
print(json.dumps({"growth": highest - before, "loss": loss}))
"""


def repeat_beton(source, target, copies):
    """Writes a beton that holds a beton's samples over and over; returns their number.

    A beton is a header, the fields' descriptions, one entry per sample, the samples' bytes, and
    the table of where these lie; entries and table hold addresses, which move with each copy.
    """
    from ffcv.reader import Reader
    from ffcv.types import FieldDescType, HeaderType

    reader = Reader(str(source))
    table, entries, header = reader.alloc_table, reader.metadata, reader.header.copy()
    start, stop = int(table["ptr"].min()), int((table["ptr"] + table["size"]).max())
    samples = int(reader.num_samples) * copies
    head = HeaderType.itemsize + FieldDescType.itemsize * int(reader.num_fields)
    first = head + entries.dtype.itemsize * samples  # address of the first copy
    moves = np.repeat(first - start + np.arange(copies) * (stop - start), len(entries))
    moves = moves.astype(np.uint64)  # those backwards wrap around, and so do the sums
    entries, table = np.tile(entries, copies), np.tile(table, copies)
    assert np.array_equal(reader.metadata["f0"], reader.alloc_table["ptr"])  # the images' addresses
    entries["f0"] += moves
    table["ptr"] += moves
    table["sample_id"] = np.arange(samples)
    header["num_samples"] = samples
    header["alloc_table_ptr"] = head + entries.nbytes + (stop - start) * copies
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(HeaderType.itemsize)
        new.write(header.tobytes() + old.read(head - HeaderType.itemsize))
        entries.tofile(new)
        old.seek(start)
        block = old.read(stop - start)
        for _ in range(copies):
            new.write(block)
        table.tofile(new)
    return samples


def read_first(path, count):
    """Images and labels of the first samples, in order."""
    import torch

    from mnist_fast.data import read_all

    return read_all(path, range(count), torch.device("cpu"))


def test_a_repeated_beton_holds_the_samples_again(small_betons, tmp_path):
    small = small_betons / "train.beton"
    images, labels = read_first(small, 1437)
    samples = repeat_beton(small, tmp_path / "large.beton", 3)
    more_images, more_labels = read_first(tmp_path / "large.beton", samples)
    assert samples == 3 * 1437
    assert (more_images == images.repeat(3, 1, 1, 1)).all()
    assert (more_labels == labels.repeat(3)).all()


@pytest.mark.timeout(240)
def test_leaving_a_long_epoch_does_not_read_the_rest_of_it(small_betons, tmp_path, monkeypatch):
    """The loader's thread ends with the batch it is at, not with the 5,000 that follow."""
    import torch
    from ffcv.loader.epoch_iterator import EpochIterator

    from mnist_fast.data import Sharding, StreamFeed

    read, batches_read = EpochIterator.run_pipeline, []

    def count(self, batch, *rest):
        batches_read.append(batch)
        return read(self, batch, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", count)
    samples = repeat_beton(small_betons / "train.beton", tmp_path / "large.beton", 28)
    sharding = Sharding(samples, 8, drop_last=True)
    feed = StreamFeed(tmp_path / "large.beton", sharding, 1, torch.device("cpu"))
    batches = feed.epoch(0)
    next(batches)
    threads = [t for t in threading.enumerate() if hasattr(t, "iter_ixes")]
    assert len(threads) == 1
    batches.close()
    assert not threads[0].is_alive()
    assert len(batches_read) < 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_six_million_images_take_less_than_a_gigabyte(small_betons, tmp_path):
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of free disk for a beton of 6 million images")
    small, large = small_betons / "train.beton", tmp_path / "large.beton"
    try:
        samples = repeat_beton(small, large, COPIES)
        assert samples > 6e6
        assert large.stat().st_size > 4.7e9
        arguments = ("-c", PROGRAM, small, large, samples, STEPS)
        done = helpers.launch(
            *(sys.executable, *arguments),
            cwd=helpers.ROOT,
            timeout=600,
            environment=helpers.TESTS_ON_PATH,
        )
    finally:
        large.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["growth"] < LIMIT
    assert found["loss"] < 2.3  # it did learn
