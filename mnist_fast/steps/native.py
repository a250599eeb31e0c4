"""Augmentation, forward and backward pass in C++ of our own, on CPUs in float32."""

from typing import ClassVar

import torch
from torch import Tensor

from mnist_fast.data import Batch
from mnist_fast.kernels import abi, cpu
from mnist_fast.optim import FlatSGD
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import BackpropStep, Job, OptimizerState, TrainState


class NativeStep(BackpropStep):
    """Batches that fill the processor's vectors go through native code, others through torch's."""

    name: ClassVar[str] = "native"
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    precisions: ClassVar[frozenset[str]] = frozenset({"no"})
    min_images: ClassVar[int] = 50_000
    threads_change_no_bit: ClassVar[bool] = True

    @staticmethod
    def unsupported_reason(job: Job) -> str | None:
        """Needs a compiler, a network whose layers it supports, and batches that fill vectors."""
        try:
            abi.describe(job.network)
        except abi.UnsupportedNetwork as error:
            return str(error)
        library, reason = cpu.try_library()
        if library is None:
            return reason
        images = job.sharding.local_size
        if images % library.lanes():
            return f"it computes multiples of {library.lanes()} images, not {images} per process"
        return None

    def __init__(self, job: Job, state: TrainState, runtime: Runtime):
        self._native_augmentation = None
        if job.config.resampling == "nearest":
            self._native_augmentation = cpu.NativeAugmentation(job.config, runtime.threads)
        super().__init__(job, state, runtime)

    def place_networks(self) -> None:
        """Lets native code compute with the networks; torch keeps a single thread."""
        torch.set_num_threads(1)  # what is left to torch is small; its threads would spin
        threads = self.runtime.threads
        self._network = cpu.NativeNetwork(self.state.network, threads)
        self.state.network = self._network
        if self.state.averaged is not None:
            self.state.averaged = cpu.NativeNetwork(self.state.averaged, threads).eval()

    def set_up_optimizer(self) -> OptimizerState:
        """Takes SGD's steps on the flat weights, and leaves the other rules to torch."""
        self._sgd: FlatSGD | None = None
        if self.config.optimizer != "sgd":
            return super().set_up_optimizer()
        network = self._network
        self._sgd = FlatSGD(self.config, network.weights, network.gradient, self._rate)
        momenta = abi.views(self._sgd.momentum, self._parameters)
        return [
            {"momentum_buffer": momentum} if self.config.momentum else {} for momentum in momenta
        ]

    def inputs(self, batch: Batch) -> Tensor:
        """Augmented and normalised images, float32 (batch, 1, 28, 28)."""
        if self._native_augmentation is None or not self._settings.augmented:
            return super().inputs(batch)
        key = self._settings.augment_key
        return self._native_augmentation(batch.images, batch.rows, batch.position, key)

    def gradients(self, inputs: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Computes the parameters' gradients; returns the numbers to add to the totals."""
        if len(batch) % self._network.lanes:
            return super().gradients(inputs, labels, batch)
        loss, hits = self._network.backpropagate(
            inputs,
            labels,
            weight=self.runtime.world_size / batch.global_size,
            smoothing=self.config.label_smoothing,
            dropout_key=self._settings.dropout_key,
            position=batch.position,
        )
        return self.state.totals.new_tensor([loss, hits, len(batch)])

    def clear_gradients(self) -> None:
        """Zeroes the tensor that all gradients are parts of."""
        self._network.hand_over_gradients()
        self._network.gradient.zero_()

    def reduce(self) -> None:
        """Averages the gradients over the processes, as one piece that nothing copies."""
        self.runtime.average([self._network.gradient])

    def update(self) -> None:
        """Takes the optimiser's step."""
        (self._sgd or self.optimizer).step()
