"""Augmentation, training and inference on CPUs by compiled C++ (cpu.cpp), in float32.

The file is compiled for this machine's processor at its first use, and kept in the user's cache.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_fast.augment import ELASTIC, interpolation_basis
from mnist_fast.config import Config
from mnist_fast.kernels import abi, build
from mnist_fast.model import CLASSES, IMAGE_SIZE, Network

SOURCE, SHARED = (Path(__file__).with_name(name) for name in ("cpu.cpp", "augment.h"))
PREDICTED_AT_ONCE = 128  # images whose activations fit into the processor's caches


@functools.cache
def try_library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled code, or None and the reason why there is none."""
    try:
        library = build.load_cpp(SOURCE, [SHARED])
    except build.BuildError as error:
        return None, str(error)
    for function in (library.train, library.predict, library.augment):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    return library, ""


def load_library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        BuildError: there is none on this machine.
    """
    library, reason = try_library()
    if library is None:
        raise build.BuildError(reason)
    return library


class NativeAugmentation:
    """`augment.augment` in native code, for nearest resampling; it gathers the images, too.

    Args:
        config: strengths.
        threads: of the native code; the result does not depend on it.
    """

    def __init__(self, config: Config, threads: int = 1):
        if config.resampling != "nearest":
            raise ValueError(f"native augmentation does not support {config.resampling} resampling")
        self._augment = load_library().augment
        self._basis = interpolation_basis(IMAGE_SIZE, torch.device("cpu")).contiguous()
        self._arguments = abi.AugmentArguments(
            basis=self._basis.data_ptr(), threads=threads, ranges=abi.find_ranges(config)
        )

    def __call__(self, images: Tensor, rows: Tensor | None, position: int, key: int) -> Tensor:
        """Augmented and normalised images, float32 (batch, 1, 28, 28).

        Args:
            images: uint8 (pool, 1, 28, 28) on the CPU, contiguous.
            rows: int64 (batch,), the pool's rows that make up the batch; None: the whole pool.
            position: of the first image in the epoch.
            key: from `augment.derive_key`.
        """
        number = len(images if rows is None else rows)
        results = torch.empty(number, *images.shape[1:])
        a = self._arguments
        a.images, a.rows = images.data_ptr(), None if rows is None else rows.data_ptr()
        a.results, a.batch, a.position = results.data_ptr(), number, position
        a.augment_key, a.elastic_key = key, key ^ ELASTIC
        self._augment(ctypes.byref(a))
        return results


class NativeNetwork(Network):
    """A network whose logits, in evaluation, and gradients come from native code.

    Args:
        network: on the CPU, contiguous, float32; its layers are shared. Its parameters become views
            of one tensor. All tensors must stay where they are then.
        threads: of the native code; the result does not depend on it.

    Attributes:
        lanes: images that are computed at once.
        weights: float32 (parameters,), all of them, one behind the other.
        gradient: likewise, as the native code wrote it last.
    """

    def __init__(self, network: Network, threads: int = 1):
        super().__init__([*network.layers])
        self._library, self.threads = load_library(), threads
        self.lanes: int = self._library.lanes()
        self._counters = [b for name, b in self.named_buffers() if "num_batches" in name]
        self._learned = list(self.parameters())  # to walk through the modules takes 0.1 ms
        self.weights = torch.cat([parameter.detach().flatten() for parameter in self._learned])
        parameter_views = abi.views(self.weights, self._learned)
        for parameter, view in zip(self._learned, parameter_views, strict=True):
            parameter.data = view
        self.gradient = torch.zeros_like(self.weights)
        self._gradients = abi.views(self.gradient, self._learned)
        self._layers = abi.describe(self)

    def hand_over_gradients(self) -> None:
        """Makes the parameters' gradients views of `gradient`."""
        if self._learned[0].grad is not self._gradients[0]:
            for parameter, gradient in zip(self._learned, self._gradients, strict=True):
                parameter.grad = gradient
            self._layers = abi.describe(self)

    def backpropagate(
        self,
        inputs: Tensor,
        labels: Tensor,
        weight: float,
        smoothing: float,
        dropout_key: int,
        position: int,
    ) -> tuple[float, float]:
        """Writes the parameters' gradients and moves the running statistics.

        Args:
            inputs: float32 (batch, 1, 28, 28); the batch is a multiple of `lanes`.
            labels: int64 (batch,).
            weight: factor of the sum of losses.
            smoothing: of the labels, see `steps.base.sum_of_losses`.
            dropout_key: of dropout's draws.
            position: of the first image in the epoch.

        Returns:
            Sum of losses, without the factor, and number of correct predictions.
        """
        if len(inputs) % self.lanes:
            raise ValueError(f"native code: {len(inputs)} is no multiple of {self.lanes} images")
        self.hand_over_gradients()
        inputs, labels = inputs.contiguous(), labels.contiguous()
        totals = (ctypes.c_double * 2)()
        arguments = abi.TrainArguments(
            layers=ctypes.addressof(self._layers),
            images=inputs.data_ptr(),
            labels=labels.data_ptr(),
            totals=ctypes.addressof(totals),
            dropout_key=dropout_key,
            position=position,
            layer_count=len(self._layers),
            batch=len(inputs),
            threads=self.threads,
            weight=weight,
            smoothing=smoothing,
        )
        self._library.train(ctypes.byref(arguments))
        torch._foreach_add_(self._counters, 1)
        return totals[0], totals[1]

    def logits(self, images: Tensor) -> Tensor:
        """As `Network.logits`; in evaluation float32 images on the CPU go through native code."""
        if self.training:
            return super().logits(images)
        return torch.cat([self._predict(part) for part in images.split(PREDICTED_AT_ONCE)])

    def _predict(self, images: Tensor) -> Tensor:
        missing = -len(images) % self.lanes
        padded = F.pad(images, (0, 0) * 3 + (0, missing)).contiguous()
        logits = torch.empty(len(padded), CLASSES)
        arguments = abi.PredictArguments(
            layers=ctypes.addressof(self._layers),
            images=padded.data_ptr(),
            logits=logits.data_ptr(),
            layer_count=len(self._layers),
            batch=len(padded),
            threads=self.threads,
        )
        self._library.predict(ctypes.byref(arguments))
        return logits[: len(images)]
