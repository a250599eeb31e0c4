"""Forward and backward pass compiled by torch.compile."""

from typing import ClassVar

import torch
from torch import Tensor

from mnist_fast.data import Batch
from mnist_fast.kernels import abi, build
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import BackpropStep, Job, TrainState, unchanged


class CompiledStep(BackpropStep):
    """Whole batches go through compiled code; a smaller last one does not."""

    name: ClassVar[str] = "compiled"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    precisions: ClassVar[frozenset[str]] = frozenset({"no", "bf16"})
    min_images: ClassVar[int] = 400_000
    threads_change_no_bit: ClassVar[bool] = False
    compiled: ClassVar[bool] = True

    @staticmethod
    def unsupported_reason(job: Job) -> str | None:
        """Needs the compilers that Inductor uses."""
        return build.why_no_inductor(job.device.type)

    def __init__(self, job: Job, state: TrainState, runtime: Runtime):
        super().__init__(job, state, runtime)
        build.prepare_inductor(job.device.type)
        self._forward_whole = torch.compile(super().forward, dynamic=False)
        self._gradient: Tensor | None = None
        if runtime.world_size > 1:  # exchanged as it is: nothing is copied
            self._gradient = torch.zeros(
                sum(p.numel() for p in self._parameters), device=job.device
            )
            self._gradient_views = abi.views(self._gradient, self._parameters)

    def warm_up(self, example: Batch) -> None:
        """Compiles, by a step that changes nothing."""
        with unchanged(self.state, self.optimizer_state):
            self.body(example)
        self.clear_gradients()

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses, and the numbers to add to the totals."""
        whole = len(labels) == self.job.sharding.local_size
        return (self._forward_whole if whole else super().forward)(inputs, labels)

    def clear_gradients(self) -> None:
        """Zeroes the tensor that all gradients are parts of, where there is one."""
        if self._gradient is None:
            return super().clear_gradients()
        self._gradient.zero_()
        for parameter, view in zip(self._parameters, self._gradient_views, strict=True):
            parameter.grad = view
        return None

    def reduce(self) -> None:
        """Averages the gradients over the processes, as one piece."""
        if self._gradient is not None:
            self.runtime.average([self._gradient])
