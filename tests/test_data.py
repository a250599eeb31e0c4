"""From betons to batches: how an epoch is cut and shared, and that both feeds agree."""

import itertools
import threading
import time

import pytest
import torch
from ffcv.loader.epoch_iterator import EpochIterator
from numba.core.dispatcher import Dispatcher

from data_prep.sources import load_digits
from mnist_fast import data
from mnist_fast.data import (
    ResidentFeed,
    Sharding,
    StreamFeed,
    epoch_order,
    open_loader,
    read_all,
    read_batches,
    share,
)
from mnist_fast.errors import InputError, RunError

CPU = torch.device("cpu")
SAMPLES = 1_437  # of the digits to train on


def shardings(samples, batch_size, drop_last, world_size):
    return [Sharding(samples, batch_size, drop_last, r, world_size) for r in range(world_size)]


@pytest.fixture(scope="module")
def digits():
    """The images and labels that were written, uint8 (1437, 1, 28, 28) and int64 (1437,)."""
    source = load_digits()
    images = torch.from_numpy(source.train_images).unsqueeze(1)
    return images, torch.from_numpy(source.train_labels).long()


# How an epoch is cut


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("samples", [96, 100, 117, 1_000, 1_437, 60_000])
def test_the_shares_of_a_step_are_the_global_batch_in_order(samples, world_size, drop_last):
    for batch_size in (16, 24, 96):
        if batch_size % world_size:
            continue
        try:
            ranks = shardings(samples, batch_size, drop_last, world_size)
        except InputError:
            assert not drop_last
            assert 0 < samples % batch_size < 2 * world_size
            continue
        taken = []
        for step in range(ranks[0].steps):
            parts = [sharding.part(step) for sharding in ranks]
            (size,) = {size for _, _, size in parts}
            positions = [i for start, stop, _ in parts for i in range(start, stop)]
            assert positions == list(range(step * batch_size, step * batch_size + size))
            sizes = [stop - start for start, stop, _ in parts]
            last = step == ranks[0].steps - 1
            assert max(sizes) - min(sizes) <= (1 if last else 0)
            assert min(sizes) >= 2
            assert last or set(sizes) == {ranks[0].local_size}
            taken += positions
        expected = samples - samples % batch_size if drop_last else samples
        assert taken == list(range(expected))  # all of them, once, nothing padded


@pytest.mark.parametrize("size", [0, 1, 2, 7, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
def test_shares_are_disjoint_and_complete(size, world_size):
    shares = [share(size, rank, world_size) for rank in range(world_size)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(size))
    sizes = {stop - start for start, stop in shares}
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match="batch_size 128 is not divisible by 3 processes"):
        Sharding(1_000, 128, True, rank=0, world_size=3)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match="batch_size 128 is larger than the 100 training images"):
        Sharding(100, 128, drop_last=True)
    assert Sharding(100, 128, drop_last=False).steps == 1


@pytest.mark.parametrize(
    ("rest", "world_size", "refused"),
    [(1, 1, True), (2, 1, False), (3, 2, True), (4, 2, False), (7, 4, True), (8, 4, False)],
)
def test_a_last_batch_too_small_to_normalise_is_refused(rest, world_size, refused):
    def cut(drop_last):
        return shardings(256 + rest, 128, drop_last, world_size)

    if refused:
        with pytest.raises(InputError, match=f"the last batch of {rest} images .* drop_last"):
            cut(drop_last=False)
    else:
        assert cut(drop_last=False)[0].steps == 3
    assert cut(drop_last=True)[0].steps == 2


def test_the_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1_000) for seed in (1, 2) for epoch in (0, 1)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(1_000))
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).float().mean() < 0.02


def test_the_order_is_pure():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_order(3, 4, 1_000)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(epoch_order(3, 4, 1_000), first)
    assert first[:5].tolist() == [356, 865, 141, 351, 770]


# The feeds


@pytest.fixture
def feeds(small_betons, digits):
    """Makes both feeds of one process."""

    def make(sharding):
        images, labels = (tensor[: sharding.samples] for tensor in digits)
        resident = ResidentFeed(images, labels, sharding, seed=1)
        return resident, StreamFeed(small_betons / "train.beton", sharding, seed=1, device=CPU)

    return make


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_both_feeds_give_the_global_batches_of_one_process(feeds, digits, world_size):
    """Epochs 0 and 3, all ranks in turn: positions, images and labels in global order."""
    images, labels = digits
    ranks = shardings(SAMPLES, 96, False, world_size)
    both = [feeds(sharding) for sharding in ranks]
    for epoch, kind in itertools.product((0, 3), (0, 1)):
        order = epoch_order(1, epoch, SAMPLES)
        steps = list(zip(*(pair[kind].epoch(epoch) for pair in both), strict=True))
        assert len(steps) == 15
        for step, parts in enumerate(steps):
            expected = order[step * 96 : (step + 1) * 96]
            got_images, got_labels = (
                torch.cat(parts) for parts in zip(*(part.gather() for part in parts), strict=True)
            )
            assert torch.equal(got_images, images[expected])
            assert torch.equal(got_labels, labels[expected])
            assert {part.global_size for part in parts} == {len(expected)}
            assert sum(map(len, parts)) == len(expected)
            assert parts[0].position == step * 96
            for one, following in itertools.pairwise(parts):
                assert one.position + len(one) == following.position


def test_batches_are_bytes_and_labels_are_integers(feeds):
    for feed in feeds(Sharding(SAMPLES, 128, True)):
        images, labels = next(iter(feed.epoch(0))).gather()
        assert (images.dtype, images.shape) == (torch.uint8, (128, 1, 28, 28))
        assert (labels.dtype, labels.shape) == (torch.int64, (128,))


def test_an_epoch_can_be_entered_at_any_step(feeds):
    both = feeds(Sharding(SAMPLES, 128, drop_last=False))
    for feed, first_step in itertools.product(both, (1, 7, 11, 12)):
        whole = [(b.position, *b.gather()) for b in feed.epoch(2)]
        rest = [(b.position, *b.gather()) for b in feed.epoch(2, first_step)]
        assert len(rest) == 12 - first_step
        for (p, images, labels), (q, others, other_labels) in zip(
            rest, whole[first_step:], strict=True
        ):
            assert p == q
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_a_smaller_training_set_leaves_the_end_out(feeds, digits):
    """What is held out for validation never comes in a batch."""
    sharding = Sharding(1_000, 100, drop_last=False)
    for feed in feeds(sharding):
        images = torch.cat([batch.gather()[0] for batch in feed.epoch(0)])
        assert torch.equal(images, digits[0][epoch_order(1, 0, 1_000)])


def test_a_streamed_batch_is_not_overwritten_later(small_betons, digits):
    sharding = Sharding(SAMPLES, 64, drop_last=False)  # 23 batches: far more than FFCV's buffers
    stream = StreamFeed(small_betons / "train.beton", sharding, seed=1, device=CPU)
    kept = list(stream.epoch(0)) + list(stream.epoch(1))
    orders = [epoch_order(1, epoch, SAMPLES) for epoch in (0, 1)]
    assert torch.equal(torch.cat([batch.images for batch in kept]), digits[0][torch.cat(orders)])


def test_the_same_feed_can_be_entered_again(feeds):
    stream = feeds(Sharding(SAMPLES, 128, drop_last=True))[1]
    first, again, other = (
        torch.cat([batch.images for batch in stream.epoch(e)]) for e in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rows", [range(SAMPLES), range(1_000, 1_437), range(7, 8), range(5, 5)])
def test_read_all_reads_the_rows_it_is_asked_for(small_betons, digits, rows):
    images, labels = read_all(small_betons / "train.beton", rows, CPU)
    assert torch.equal(images, digits[0][rows.start : rows.stop])
    assert torch.equal(labels, digits[1][rows.start : rows.stop])
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


# FFCV's habits


def loader_threads():
    return [
        thread
        for thread in threading.enumerate()
        if isinstance(thread, EpochIterator) and thread.is_alive()
    ]


def test_the_number_of_torchs_threads_stays(feeds):
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            _, stream = feeds(Sharding(SAMPLES, 128, drop_last=True))
            assert torch.get_num_threads() == threads
            for _ in stream.epoch(0):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.timeout(120)
def test_leaving_an_epoch_early_leaves_no_thread_and_costs_no_time(feeds):
    """Also where the loader has just read its last batch and waits to say so."""
    stream = feeds(Sharding(SAMPLES, 128, drop_last=True))[1]
    for taken in range(stream.sharding.steps + 1):
        epoch = stream.epoch(0)
        for _ in range(taken):
            next(epoch)
        time.sleep(0.1)  # the loader runs ahead as far as it can
        started = time.monotonic()
        epoch.close()
        assert time.monotonic() - started < 15, f"after {taken} batches"
        assert loader_threads() == [], f"after {taken} batches"


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("failing_batch", [0, 2, 10])
def test_a_loader_that_raises_ends_the_epoch_with_an_error(feeds, monkeypatch, failing_batch):
    read = EpochIterator.run_pipeline

    def fail(self, batch, *rest):
        if batch == failing_batch:
            raise OSError("the disk is gone")
        return read(self, batch, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    stream = feeds(Sharding(SAMPLES, 128, drop_last=True))[1]
    epoch = stream.epoch(0)
    for _ in range(failing_batch):
        next(epoch)
    with pytest.raises(RunError, match=r"train\.beton: FFCV's loader thread died"):
        next(epoch)
    assert loader_threads() == []


@pytest.mark.timeout(120)
def test_a_loader_that_hangs_ends_the_epoch_with_an_error(feeds, monkeypatch):
    stream = feeds(Sharding(SAMPLES, 128, drop_last=True))[1]
    release = threading.Event()
    read = EpochIterator.run_pipeline

    def hang(self, batch, *rest):
        if batch == 3:
            release.wait(150)
        return read(self, batch, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", hang)
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 1.0)
    with pytest.raises(RunError, match=r"train\.beton: FFCV gave no batch for 1 s"):
        list(stream.epoch(0))
    release.set()


def test_a_batch_of_one_keeps_its_shape(small_betons, digits):
    loader = open_loader(small_betons / "train.beton", 4, CPU)
    shapes = [(images.shape, labels.shape) for images, labels in read_batches(loader, range(5))]
    assert shapes == [((4, 1, 28, 28), (4,)), ((1, 1, 28, 28), (1,))]


def compiled_versions(loader):
    """How often each of a loader's decoders was compiled, each for other types of arguments."""
    decode, _ = loader.code[0][0]
    functions = decode.__globals__.values()
    return [len(f.signatures) for f in functions if isinstance(f, Dispatcher)]


def test_an_epoch_compiles_nothing(feeds):
    """All is compiled when the loader is open, for the arguments that the epochs have."""
    stream = feeds(Sharding(SAMPLES, 128, drop_last=False))[1]
    assert compiled_versions(stream.loader) == [1, 1]
    assert len(list(stream.epoch(0))) == 12
    assert compiled_versions(stream.loader) == [1, 1]


@pytest.mark.timeout(120)
def test_the_loader_is_opened_in_the_background(small_betons, digits, monkeypatch):
    release = threading.Event()

    def wait_and_open(*arguments):
        assert release.wait(30)
        return open_loader(*arguments)

    monkeypatch.setattr(data, "open_loader", wait_and_open)
    sharding = Sharding(SAMPLES, 128, drop_last=True)
    stream = StreamFeed(small_betons / "train.beton", sharding, seed=1, device=CPU)
    assert stream.example().images.shape == (128, 1, 28, 28)  # needs no loader
    release.set()
    images = torch.cat([batch.images for batch in stream.epoch(0)])
    assert torch.equal(images, digits[0][epoch_order(1, 0, SAMPLES)[: len(images)]])


@pytest.mark.timeout(120)
def test_a_loader_that_cannot_be_opened_ends_the_epoch_with_its_error(small_betons, monkeypatch):
    def fail(*_):
        raise RunError("no memory")

    monkeypatch.setattr(data, "open_loader", fail)
    sharding = Sharding(SAMPLES, 128, drop_last=True)
    stream = StreamFeed(small_betons / "train.beton", sharding, seed=1, device=CPU)
    with pytest.raises(RunError, match="no memory"):
        next(stream.epoch(0))
