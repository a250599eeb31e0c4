"""Kernel by kernel, through Accelerate's wrappers: every device, precision and network."""

from typing import ClassVar

from torch import Tensor

from mnist_fast.steps.base import BackpropStep, Job


class EagerStep(BackpropStep):
    """Backpropagation as torch runs it; DDP averages the gradients, fp16's scaler scales them."""

    name: ClassVar[str] = "eager"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    precisions: ClassVar[frozenset[str]] = frozenset({"no", "bf16", "fp16"})
    min_images: ClassVar[int] = 0
    threads_change_no_bit: ClassVar[bool] = False

    @staticmethod
    def unsupported_reason(job: Job) -> str | None:
        """Supports every job."""
        return None

    def wrap(self) -> None:
        """Wraps network and optimiser in Accelerate's own, which may copy rate and state."""
        self._wrapped, self._stepper = self.runtime.prepare(self.state.network, self.optimizer)

    def predict(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (batch, classes), through DDP where there are several processes."""
        return self._wrapped(inputs)

    def reduce(self) -> None:
        """Does nothing: DDP has averaged the gradients in the backward pass."""

    def update(self) -> None:
        """Takes the optimiser's step; fp16's scaler skips it where gradients overflowed."""
        self._stepper.step()
