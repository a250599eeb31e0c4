"""A GPU for FFCV's loader that is as slow as can be: it does nothing until somebody waits for it.

Streams keep what they are told to do, in order. Work is done where the host waits for a stream or
an event, with the work of other streams that it depends on. Memory that is free again is given to
the next who asks for as much, at once, as torch's allocator does.
"""

import contextlib
import ctypes
import threading
import weakref
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from ffcv.loader import epoch_iterator
from ffcv.pipeline import allocation_query

GPU = torch.device("cuda", 0)

_order = threading.RLock()
_local = threading.local()


class Stream:
    def __init__(self):
        self.work, self.done = [], 0

    def submit(self, action):
        with _order:
            self.work.append(action)

    def run(self, stop):
        with _order:
            while self.done < stop:
                self.work[self.done]()
                self.work[self.done] = None  # what it held may be free now
                self.done += 1

    def synchronize(self):
        self.run(len(self.work))

    def wait_stream(self, other):
        event = Event()
        event.record(other)
        event.wait(self)


class Event:
    def record(self, stream=None):
        self.stream = stream or current_stream()
        self.place = len(self.stream.work)

    def wait(self, stream=None):
        (stream or current_stream()).submit(self.synchronize)

    def synchronize(self):
        self.stream.run(self.place)


def current_stream(_device=None):
    return getattr(_local, "stream", main_stream)


@contextlib.contextmanager
def use(stream):
    before, _local.stream = current_stream(), stream
    yield
    _local.stream = before


class DeviceTensor(torch.Tensor):
    """Its memory is the host's, but who copies to it only tells the current stream to."""

    @property
    def device(self):
        return GPU

    def copy_(self, source, non_blocking=False):
        target, stream = plain(self), current_stream()
        stream.submit(lambda: target.copy_(source))
        if not non_blocking:
            stream.synchronize()
        return self


def plain(tensor):
    """The same memory as a tensor of the host."""
    return tensor.as_subclass(torch.Tensor)


def address_of(tensor):
    """What a kernel is given: reads the memory that a tensor has now, and does not keep it."""
    size = tensor.numel() * tensor.element_size()
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))
    dtype, shape = tensor.dtype, tuple(tensor.shape)
    return lambda: torch.from_numpy(memory.copy()).view(dtype).view(shape)


main_stream = Stream()


def install(monkeypatch):
    """Puts it in the place of torch's GPU for FFCV; returns the stream of the main thread."""
    global main_stream
    main_stream = Stream()
    free = defaultdict(list)

    def empty(*shape, dtype, device=None):
        if device is None:
            return torch.empty(*shape, dtype=dtype)
        memory = free[shape].pop(0) if free[shape] else torch.empty(*shape, dtype=dtype)
        tensor = memory.as_subclass(DeviceTensor)
        weakref.finalize(tensor, free[shape].append, memory)
        return tensor

    module = SimpleNamespace(dtype=torch.dtype, from_numpy=torch.from_numpy, empty=empty)
    monkeypatch.setattr(allocation_query, "ch", module)
    monkeypatch.setattr(epoch_iterator, "IS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    return main_stream
