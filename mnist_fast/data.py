"""FFCV betons to uint8 batches on the device, sharded over the processes without padding."""

import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_fast.augment import derive_key
from mnist_fast.beton import Beton
from mnist_fast.errors import InputError, RunError
from mnist_fast.imports import plain_dictionaries

LOADER_TIMEOUT = 120.0  # seconds without a batch after which a loader counts as hung
_OPENING = threading.Lock()  # FFCV numbers the parts of all loaders by one counter


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    Attributes:
        images: uint8 (pool, 1, 28, 28) on the device.
        labels: int64 (pool,).
        rows: int64 (batch,), the pool's rows that make up the batch; None: the whole pool.
        position: position of the first image in the epoch, over all processes.
        global_size: images in the batch over all processes.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor | None
    position: int
    global_size: int

    def __len__(self) -> int:
        """Images in this process's part."""
        return len(self.labels if self.rows is None else self.rows)

    def gather_images(self) -> Tensor:
        """Images uint8 (batch, 1, 28, 28)."""
        # on CPUs `index_select` is 7 times as fast as indexing with square brackets
        return self.images if self.rows is None else self.images.index_select(0, self.rows)

    def gather_labels(self) -> Tensor:
        """Labels int64 (batch,)."""
        return self.labels if self.rows is None else self.labels.index_select(0, self.rows)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return self.gather_images(), self.gather_labels()


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How an epoch is cut into global batches, and these into one part per process."""

    samples: int
    batch_size: int
    drop_last: bool
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Refuses sizes that some process could not train on."""
        if rest := self.batch_size % self.world_size:
            lower, upper = self.batch_size - rest, self.batch_size - rest + self.world_size
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise InputError(
                f"batch_size {self.batch_size} is not divisible by {self.world_size} processes: "
                f"choose {nearest}, or another --num_processes of the launcher",
                shared=True,
            )
        if not self.steps:
            raise InputError(
                f"batch_size {self.batch_size} is larger than the {self.samples} training images: "
                "lower it, or set drop_last to false",
                shared=True,
            )
        last = self.part(self.steps - 1)[2]
        if last // self.world_size < 2:  # BatchNorm needs two values per channel
            raise InputError(
                f"the last batch of {last} images leaves fewer than 2 to one of "
                f"{self.world_size} processes: set drop_last, or change batch_size",
                shared=True,
            )

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def local_size(self) -> int:
        """Images per process in every batch but a smaller last one."""
        return self.batch_size // self.world_size

    def part(self, step: int) -> tuple[int, int, int]:
        """Positions start and stop of this process's part of a step, and the global batch size."""
        first = step * self.batch_size
        size = min(self.batch_size, self.samples - first)
        start, stop = share(size, self.rank, self.world_size)
        return first + start, first + stop, size


def keep_for_training(total: int, held_out: int) -> int:
    """Training images that are left when some are held out.

    Raises:
        InputError: fewer than 2 are, which BatchNorm needs.
    """
    kept = total - held_out
    if kept < 2:
        fault = f"validation_split {held_out} leaves {max(0, kept)} of {total} training images"
        raise InputError(f"{fault}: hold out fewer", shared=True)
    return kept


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of a process's contiguous share of `size`; shares differ by at most 1."""
    return size * rank // world_size, size * (rank + 1) // world_size


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """The shuffled order of an epoch, int64 (samples,), a pure function of its arguments."""
    generator = torch.Generator().manual_seed(derive_key(seed, epoch, "order"))
    return torch.randperm(samples, generator=generator)


class ResidentFeed:
    """Holds all images in device memory and shuffles there."""

    name = "resident"

    def __init__(self, images: Tensor, labels: Tensor, sharding: Sharding, seed: int):
        self.images, self.labels, self.sharding, self.seed = images, labels, sharding, seed

    def example(self) -> Batch:
        """A whole batch in the form of the epochs' batches."""
        size = self.sharding.local_size
        rows = torch.zeros(size, dtype=torch.int64, device=self.images.device)
        return Batch(self.images, self.labels, rows, 0, self.sharding.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch from a step on."""
        order = epoch_order(self.seed, epoch, self.sharding.samples).to(self.images.device)
        for step in range(first_step, self.sharding.steps):
            start, stop, size = self.sharding.part(step)
            yield Batch(self.images, self.labels, order[start:stop], start, size)


class StreamFeed:
    """Reads each batch from the beton with FFCV while the one before is trained on.

    FFCV's loader is compiled in the background: its first use waits for it.
    """

    name = "stream"

    def __init__(self, path: Path, sharding: Sharding, seed: int, device: torch.device):
        self.sharding, self.seed, self.device = sharding, seed, device
        self.shape = Beton(path).shape
        import_ffcv()
        opener = ThreadPoolExecutor(1, "open-loader")
        self._opened = opener.submit(open_loader, path, sharding.local_size, device)
        opener.shutdown(wait=False)

    @property
    def loader(self) -> Any:
        """FFCV's loader, compiled; raises what opening it raised."""
        return self._opened.result()

    def example(self) -> Batch:
        """A whole blank batch in the form of the epochs' batches."""
        size = self.sharding.local_size
        images = torch.zeros(size, *self.shape, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(size, dtype=torch.int64, device=self.device)
        return Batch(images, labels, None, 0, self.sharding.batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch from a step on; each is valid until the next."""
        order = epoch_order(self.seed, epoch, self.sharding.samples).numpy()
        parts = [self.sharding.part(step) for step in range(first_step, self.sharding.steps)]
        if not parts:
            return
        rows = np.concatenate([order[start:stop] for start, stop, _ in parts])
        batches = read_batches(self.loader, rows)
        for (start, stop, size), (images, labels) in zip(parts, batches, strict=True):
            if len(labels) != stop - start:
                raise RunError(f"FFCV gave {len(labels)} images where {stop - start} were due")
            yield Batch(images, labels, None, start, size)


@functools.cache
def import_ffcv() -> None:
    """Imports FFCV and fits it to a process that does other things beside.

    - FFCV sets torch's number of threads to its own at its import, with each loader and in each
      epoch's thread. It sets numba's alone from here on.
    - Its page manager builds dictionaries of sets for every sample, gigabytes for millions of
      images, that only another manager reads, and its reader keeps a table that nobody reads
      again. Loaders keep about 100 bytes per image without.
    """
    threads = torch.get_num_threads()
    with plain_dictionaries():
        from ffcv.loader import loader
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline import compiler

    torch.set_num_threads(threads)
    compiler.ch = SimpleNamespace(set_num_threads=lambda count: None)

    class LeanManager(OSCacheManager):
        def __init__(self, reader: Any):
            self.reader = reader
            pointers, sizes = reader.alloc_table["ptr"], reader.alloc_table["size"]
            order = slice(None) if np.all(pointers[1:] >= pointers[:-1]) else np.argsort(pointers)
            self.ptrs = np.ascontiguousarray(pointers[order])
            self.sizes = np.ascontiguousarray(sizes[order])
            reader.alloc_table = None
            self.context = OSCacheContext(self)

    loader.OSCacheManager = LeanManager


def open_loader(path: Path, batch_size: int, device: torch.device) -> Any:
    """An FFCV loader of (images, labels) on a device, in an order given later, compiled.

    Nothing here uses a GPU: it may run in a thread while another captures graphs. The loader is
    built for one thread, as its work is a copy of 784 bytes per image.
    """
    import_ffcv()
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption, epoch_iterator
    from ffcv.transforms import Squeeze, ToDevice, ToTensor

    # FFCV asks torch whether there is a GPU; what counts is where the run computes
    epoch_iterator.IS_CUDA = device.type == "cuda"
    # FFCV fills a host buffer again when the device was told to copy it, not when it has: the copy
    # must be over by then. The loader's thread waits for it, on a stream of its own.
    to_device = [ToDevice(device, non_blocking=False)] if device.type != "cpu" else []
    with _OPENING:
        loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={
                "image": [NDArrayDecoder(), ToTensor(), *to_device],
                "label": [IntDecoder(), ToTensor(), *to_device, Squeeze(1)],
            },
        )
    if device.type == "cpu":  # FFCV would pin them, for which it starts a GPU where there is one
        loader.graph.allocate_memory = functools.partial(host_buffers, loader.graph)
    _compile_decoders(loader)
    return loader


def host_buffers(graph: Any, batch_size: int, slots: int) -> dict[str, dict[int, Any]]:
    """What `allocate_memory` of FFCV's graph returns, without the buffers on a GPU, not pinned."""
    return {
        kind: {
            node: np.empty((slots, batch_size, *query.shape), query.dtype)
            if query and isinstance(query.dtype, np.dtype)
            else None
            for node, query in queries.items()
        }
        for kind, queries in graph.collect_requirements()[0].items()
    }


def _compile_decoders(loader: Any) -> None:
    """Decodes one image, for which numba compiles; an epoch would do it at its first batch."""
    arguments = {
        prefix + str(node): None if buffer is None else buffer[0]
        for kind, prefix in (("operation", "memory_"), ("shared", "shared_memory_"))
        for node, buffer in host_buffers(loader.graph, 1, 1)[kind].items()
    }
    decode, _ = loader.code[0][0]
    with loader.memory_manager.schedule_epoch([]) as memory:
        rows = np.zeros(1, dtype=np.uint64)
        metadata = loader.reader.metadata
        decode(batch_indices=rows, metadata=metadata, storage_state=memory.state, **arguments)


def read_batches(loader: Any, rows: Sequence[int] | np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the given rows, in their order; never waits for a loader that died or hangs.

    Raises:
        RunError: the loader's thread ended early, or gave nothing for two minutes.
    """
    from ffcv.loader import epoch_iterator

    if epoch_iterator.IS_CUDA:
        # FFCV's streams do not wait for work that is still under way in the memory they are given
        torch.cuda.current_stream().synchronize()
    iterator = epoch_iterator.EpochIterator(loader, np.asarray(rows, dtype=np.uint64))
    try:
        for _ in range(0, len(rows), loader.batch_size):
            _wait_for_batch(iterator, loader.fname)
            images, labels = next(iterator)
            if images.device.type == "cpu":
                # FFCV reuses its buffers: here nothing else keeps a batch from being overwritten
                yield images.clone(), labels.clone()
            else:
                # FFCV's strides on a GPU, (784, 1, 28, 1), would have the augmentation recompiled
                yield images.flatten(1).view(images.shape), labels
    finally:
        _end(iterator)


def _end(iterator: Any) -> None:
    """Ends a loader's thread; it may be waiting for room in its queue to say that it is done."""
    iterator.iter_ixes = iter(())  # else it decodes the rest of the epoch as its queue is emptied
    iterator.close()
    deadline = time.monotonic() + LOADER_TIMEOUT
    while iterator.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            iterator.output_queue.get_nowait()
        iterator.join(timeout=0.002)


def _wait_for_batch(iterator: Any, name: str) -> None:
    """Returns when the iterator holds a batch, so that its `next` cannot block for ever."""
    results: queue.Queue[Any] = iterator.output_queue
    with results.not_empty:
        waited = 0.0
        while not results.queue:
            if not iterator.is_alive():
                raise RunError(f"{name}: FFCV's loader thread died, its error stands above")
            if waited >= LOADER_TIMEOUT:
                raise RunError(f"{name}: FFCV gave no batch for {LOADER_TIMEOUT:.0f} s")
            results.not_empty.wait(timeout=0.5)
            waited += 0.5


def read_all(path: Path, rows: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reads rows of a beton into device memory: images uint8 (n, 1, 28, 28), labels int64 (n,)."""
    images, labels = Beton(path).read(rows)
    return images.to(device), labels.to(device)
