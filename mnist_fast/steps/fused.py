"""The whole step as one kernel of our own, on large GPUs in float32."""

import ctypes
from typing import ClassVar

import torch
from torch import Tensor, nn

from mnist_fast.augment import ELASTIC, interpolation_basis, warps
from mnist_fast.data import Batch
from mnist_fast.kernels import abi, build, hopper
from mnist_fast.model import IMAGE_SIZE
from mnist_fast.optim import first_state
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import Augmentation, Job, OptimizerState, Settings, TrainState


class FusedStep:
    """A launch of hopper.cu per step.

    The network's parameters, gradients and statistics become views of one tensor each, where the
    kernel has them; they must stay there.
    """

    name: ClassVar[str] = "fused"
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    precisions: ClassVar[frozenset[str]] = frozenset({"no"})
    min_images: ClassVar[int] = 50_000
    threads_change_no_bit: ClassVar[bool] = True

    @staticmethod
    def unsupported_reason(job: Job) -> str | None:
        """Needs SGD or Muon, one process, a large GPU, and a network whose layers it supports."""
        config, images = job.config, job.sharding.local_size
        if config.optimizer not in ("sgd", "muon"):
            return f"it supports SGD and Muon, not {config.optimizer}"
        if config.ema_decay:
            return "it does not average weights (ema_decay)"
        if job.sharding.world_size > 1:
            return "it supports one process alone"
        try:
            floats = hopper.count_activations(job.network)
        except abi.UnsupportedNetwork as error:
            return str(error)
        if reason := hopper.unsupported_gpu(job.device, images, floats):
            return reason
        kernel, reason = hopper.try_kernel(job.network, images)
        return None if kernel else reason

    def __init__(self, job: Job, state: TrainState, runtime: Runtime):
        self.config, self.state = job.config, state
        kernel, reason = hopper.try_kernel(job.network, job.sharding.local_size)
        if kernel is None:
            raise build.BuildError(reason)
        self._kernel = kernel
        # the kernel itself resamples by the nearest pixel alone
        self._augmentation: Augmentation | None = None
        if job.config.resampling != "nearest":
            self._augmentation = Augmentation(job, compiled=True)
        self._moves = bool(warps(job.config) or job.config.brightness or job.config.contrast)
        buffers = self._lay_out(job)
        self._arguments = abi.HopperArguments(
            **{name: tensor.data_ptr() for name, tensor in buffers.items()},
            momentum=job.config.momentum,
            weight_decay=job.config.weight_decay,
            smoothing=job.config.label_smoothing,
            nesterov=job.config.nesterov,
            muon=job.config.optimizer == "muon",
            ranges=abi.find_ranges(job.config),
        )
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self.parameters_changed()

    def _lay_out(self, job: Job) -> dict[str, Tensor]:
        """Allocates and keeps the tensors that the kernel reads and writes."""
        network, device, images = self.state.network, job.device, self._kernel.images
        self._parameters = parameters = list(network.parameters())
        weights = torch.cat([p.detach().flatten() for p in parameters])
        momenta, gradients = torch.zeros_like(weights), torch.zeros_like(weights)
        for parameter, view in zip(parameters, abi.views(weights, parameters), strict=True):
            parameter.data = view
        self._gradients = abi.views(gradients, parameters)
        self.optimizer_state: OptimizerState = [
            dict.fromkeys(first_state(job.config, p), momentum)
            for p, momentum in zip(parameters, abi.views(momenta, parameters), strict=True)
        ]
        statistics, counters = self._lay_out_statistics()
        layers = sum(isinstance(m, nn.Conv2d) for m in network.layers)
        words = torch.zeros(2 * layers + 2, hopper.MOST_CHANNELS, images, 4, device=device)
        self._buffers = {
            "basis": interpolation_basis(IMAGE_SIZE, device).contiguous(),
            "parameters": weights,
            "momenta": momenta,
            "gradients": gradients,
            "statistics": statistics,
            "counters": counters,
            "totals": self.state.totals,
            "partial": torch.empty(images, len(weights), device=device),
            "losses": torch.empty(images, 2, device=device),
            "packed": torch.zeros(self._kernel.packed, device=device),
            "places": torch.empty(2, len(weights), dtype=torch.int32, device=device),
            "words": words,
        }
        return self._buffers

    def _lay_out_statistics(self) -> tuple[Tensor, Tensor]:
        """Each BatchNorm's running means and variances in one tensor, and their counters."""
        norms = [m for m in self.state.network.layers if isinstance(m, nn.BatchNorm2d)]
        names = ("running_mean", "running_var")
        buffers = [getattr(norm, name) for norm in norms for name in names]
        statistics = torch.cat(buffers)
        counters = torch.stack([norm.num_batches_tracked for norm in norms])  # type: ignore[misc]
        for index, view in enumerate(abi.views(statistics, buffers)):
            setattr(norms[index // 2], names[index % 2], view)
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = counter
        return statistics, counters

    def warm_up(self, example: Batch) -> None:
        """Compiles the augmentation that the kernel does not support."""
        if self._augmentation is not None:
            self._augmentation(example.gather_images())

    def run(self, batch: Batch, settings: Settings) -> None:
        """Trains on a batch; does not wait for the device."""
        inputs = None
        if settings.augmented and self._augmentation is not None:
            self._augmentation.set(batch.position, settings.augment_key)
            inputs = self._augmentation(batch.gather_images())
        self.launch(batch, inputs, settings)

    def launch(self, batch: Batch, inputs: Tensor | None, settings: Settings) -> None:
        """Starts the kernel.

        Args:
            batch: on the GPU.
            inputs: float32 (batch, 1, 28, 28), or None for those that the kernel makes itself.
            settings: of the step.
        """
        a = self._arguments
        if not a.ticket:  # the first step: before it there is no gradient
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        a.images, a.labels = batch.images.data_ptr(), batch.labels.data_ptr()
        a.rows = None if batch.rows is None else batch.rows.data_ptr()
        a.inputs = None if inputs is None else inputs.data_ptr()
        a.augment_key, a.dropout_key = settings.augment_key, settings.dropout_key
        a.elastic_key = a.augment_key ^ ELASTIC
        a.position, a.rate, a.weight = batch.position, settings.learning_rate, 1 / batch.global_size
        a.augmented = settings.augmented and self._moves
        a.ticket += 1
        self._kernel.train(self._pointers, len(batch))

    def parameters_changed(self) -> None:
        """Packs the weights for the kernel again."""
        self._kernel.pack(self._pointers)

    def close(self) -> None:
        """Does nothing: the kernel is kept until the process ends."""
