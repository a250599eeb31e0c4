"""The whole compiled step as one CUDA graph: a step is one launch."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mnist_fast.data import Batch
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import Job, Settings, TrainState, unchanged
from mnist_fast.steps.compiled import CompiledStep

WARM_UPS = 11  # runs before a capture: DDP's and NCCL's set-up takes up to 11 iterations


class CudaGraph:
    """Work on the GPU, recorded once; `replay` repeats it with a single launch.

    Dropout draws anew in every replay: torch registers the device's default generator, the only
    one that the step uses, with each graph.

    Args:
        work: reads and writes tensors at fixed addresses and never waits for the device.
    """

    def __init__(self, work: Callable[[], None]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, creates what libraries create at first use
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, another thread, may go on querying its events
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Repeats the work."""
        self._graph.replay()

    def close(self) -> None:
        """Releases the graph after the device has finished all replays."""
        torch.cuda.synchronize()
        self._graph.reset()


class Recording:
    """A step on a batch whose tensors stay in place, as a graph.

    Args:
        body: one step on a batch.
        batch: tensors that the graph reads; later batches are copied into them, except for a
            resident feed's pool of images, which is the same in every batch.
        parameters: whose gradients the graph writes.
        graph_type: `CudaGraph`, or its substitute in tests.
    """

    def __init__(
        self,
        body: Callable[[Batch], None],
        batch: Batch,
        parameters: list[nn.Parameter],
        graph_type: Any,
    ):
        self.batch, self._parameters = batch, parameters
        self.graph = graph_type(lambda: body(batch))
        self._gradients = [parameter.grad for parameter in parameters]

    def run(self, batch: Batch) -> None:
        """Trains on a batch of the same size."""
        for mine, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            if mine is not None and new is not None and mine is not new:
                mine.copy_(new, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a step outside the graph may have left its own


def _tensors(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.images, batch.labels, batch.rows


class CapturedStep(CompiledStep):
    """Whole batches are replays of a graph; a smaller last one is not."""

    name: ClassVar[str] = "captured"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    graph_type: ClassVar[Any] = CudaGraph

    def __init__(self, job: Job, state: TrainState, runtime: Runtime):
        super().__init__(job, state, runtime)
        self._recordings: dict[bool, Recording] = {}  # by whether images are augmented

    def warm_up(self, example: Batch) -> None:
        """Compiles and captures a step with augmentation, and one without where a run has both."""
        for augmented in {
            Settings.of_epoch(self.config, e).augmented for e in range(self.config.epochs)
        }:
            if augmented in self._recordings:
                continue
            with unchanged(self.state, self.optimizer_state):
                self.write_settings(example, Settings(0.0, 0, 0, augmented))
                self._recordings[augmented] = Recording(
                    self.body, example, self._parameters, self.graph_type
                )
        self.clear_gradients()

    def run(self, batch: Batch, settings: Settings) -> None:
        """Trains on this process's part of a global batch; does not wait for the device."""
        self.write_settings(batch, settings)
        recording = self._recordings.get(settings.augmented)
        # by the global size: where that is smaller, a process's part may still be whole
        if recording is not None and batch.global_size == self.job.sharding.batch_size:
            recording.run(batch)
        else:
            self.body(batch)

    def close(self) -> None:
        """Releases the graphs: they hold NCCL's communicator, whose end waits for them."""
        for recording in self._recordings.values():
            recording.graph.close()
        self._recordings.clear()
