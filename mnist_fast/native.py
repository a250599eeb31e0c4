"""Training and inference on CPUs by compiled C++ (native.cpp), faster than kernel by kernel.

The file is compiled for this machine's processor at its first use, and kept in the user's cache
folder. All arithmetic is float32.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_fast.augment import ELASTIC, interpolation_basis
from mnist_fast.config import Config
from mnist_fast.files import say
from mnist_fast.model import CLASSES, IMAGE_SIZE, Network

SOURCE, SHARED = (Path(__file__).with_name(name) for name in ("native.cpp", "augment.h"))
OPTIONS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
COMPILE_TIMEOUT = 300.0  # seconds
POOLS = {nn.MaxPool2d: 1, nn.AvgPool2d: 2}  # native.cpp's names for them
LARGEST_WINDOW = 16  # native.cpp's MOST_WINDOW
PREDICTED_AT_ONCE = 128  # images whose activations fit into the processor's caches


class Ranges(ctypes.Structure):
    """Strengths of the augmentation; the same fields stand in augment.h."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("rotation", "angle", "shear", "scale_min")),
        *((name, ctypes.c_float) for name in ("scale_max", "translate", "elastic")),
        *((name, ctypes.c_float) for name in ("brightness", "contrast", "fill")),
    ]


def find_ranges(config: Config) -> Ranges:
    """A recipe's strengths in the compiled code's units."""
    return Ranges(
        rotation=math.radians(config.rotation),
        angle=math.radians(config.affine_rotation),
        shear=math.radians(config.shear),
        scale_min=config.scale_min,
        scale_max=config.scale_max,
        translate=config.translate * IMAGE_SIZE,
        elastic=config.elastic,
        brightness=config.brightness,
        contrast=config.contrast,
        fill=config.fill / 255,
    )


class Layer(ctypes.Structure):
    """One convolution and what follows it; the same fields stand in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("inputs", "outputs", "kernel", "padding")),
        *((name, ctypes.c_int32) for name in ("input_size", "normalises", "relu_before")),
        *((name, ctypes.c_int32) for name in ("relu_after", "pool", "window")),
        *((name, ctypes.c_float) for name in ("epsilon", "momentum", "dropout")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "shift", "weight_gradient")),
        *((name, ctypes.c_void_p) for name in ("scale_gradient", "shift_gradient")),
        *((name, ctypes.c_void_p) for name in ("running_mean", "running_variance")),
    ]


def cache_folder(name: str) -> Path:
    """A folder for compiled code below the user's cache folder, created.

    Raises:
        OSError: it cannot be created.
        RuntimeError: the user has no home.
    """
    folder = Path.home() / ".cache" / "mnist_fast" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is installed."""
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled, which is then said once."""
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        # the compiler's warnings may stand before
        reason = next((line for line in lines if ": error" in line), lines[0])
        say(f"step: no native code on this machine: {reason}")
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    library.train.argtypes = [
        *(pointer, integer, pointer, pointer, integer, ctypes.c_float, ctypes.c_float),
        *(number, number, integer, pointer),
    ]
    library.predict.argtypes = [pointer, integer, pointer, integer, integer, pointer]
    library.augment.argtypes = [
        *(pointer, pointer, integer, pointer, number, number, ctypes.c_int64),
        *(pointer, integer, pointer),
    ]
    library.train.restype = library.predict.restype = library.augment.restype = None
    return library


def _compile() -> Path:
    """Path of the library, compiled unless it is in the cache.

    Its name tells source, compiler and processor apart: a cluster's nodes may share the folder.
    """
    program = compiler()
    if program is None:
        raise RuntimeError("there is no C++ compiler (g++, clang++ or $CXX)")
    sources = [SOURCE.read_bytes(), SHARED.read_bytes()]
    made_from = [*sources, program.encode(), " ".join(OPTIONS).encode(), _processor()]
    name = f"{hashlib.sha256(b'/'.join(made_from)).hexdigest()[:16]}.so"
    try:
        path = cache_folder("native") / name
        if path.exists():
            return path
        folder = path.parent
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="mnist_fast-"))
        path = folder / name
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two processes may compile at once
        made = Path(scratch) / name
        command = [program, *OPTIONS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
        made.replace(path)
    return path


def _processor() -> bytes:
    """What tells processors with other instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features"))}))


def describe(network: Network) -> "ctypes.Array[Layer]":
    """The network as native.cpp takes it, as a ctypes array.

    It points to the network's parameters and running statistics, and to the parameters' gradients
    where there are some.

    Raises:
        ValueError: the network holds what native.cpp does not know.
    """
    found: list[Layer] = []
    size = IMAGE_SIZE
    for module in network.layers:
        if isinstance(module, nn.Conv2d):
            found.append(_convolution(module, size))
            size += 2 * found[-1].padding - found[-1].kernel + 1
        elif found and not found[-1].pool:
            size = _add(found[-1], module, size)
        else:
            raise ValueError(f"native code: {module} has no place there")
    return (Layer * len(found))(*found)


def _convolution(module: nn.Conv2d, size: int) -> Layer:
    kernel, padding = module.kernel_size[0], int(module.padding[0])
    plain = nn.Conv2d(
        module.in_channels, module.out_channels, kernel, padding=padding, bias=False, device="meta"
    )
    if repr(plain) != repr(module) or kernel not in (1, 3) or padding >= kernel:
        raise ValueError(f"native code: {module} is not among the convolutions it knows")
    return Layer(
        inputs=module.in_channels,
        outputs=module.out_channels,
        kernel=kernel,
        padding=padding,
        input_size=size,
        window=1,
        weight=_address(module.weight),
        weight_gradient=_address(module.weight.grad),
    )


def _add(layer: Layer, module: nn.Module, size: int) -> int:
    """Adds what follows the convolution; returns the size of the images behind it."""
    if isinstance(module, nn.BatchNorm2d) and not layer.normalises:
        layer.normalises, layer.epsilon, layer.momentum = 1, module.eps, module.momentum or 0.0
        layer.scale, layer.shift = _address(module.weight), _address(module.bias)
        layer.scale_gradient = _address(module.weight.grad)
        layer.shift_gradient = _address(module.bias.grad)
        layer.running_mean = _address(module.running_mean)
        layer.running_variance = _address(module.running_var)
    elif isinstance(module, nn.ReLU):
        layer.relu_before, layer.relu_after = not layer.normalises, layer.normalises
    elif isinstance(module, nn.Dropout) and layer.normalises:
        layer.dropout = module.p
    elif type(module) in POOLS and layer.normalises and _divides(module, size):
        layer.pool, layer.window = POOLS[type(module)], int(module.kernel_size)  # type: ignore[arg-type]
        size //= layer.window
    else:
        raise ValueError(f"native code: {module} has no place there")
    return size


def _divides(pooling: Any, size: int) -> bool:
    side = pooling.kernel_size
    fits = isinstance(side, int) and 1 < side <= LARGEST_WINDOW and size % side == 0
    return fits and pooling.stride == side and not pooling.padding and not pooling.ceil_mode


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.dtype != torch.float32 or tensor.is_cuda:
        raise ValueError("native code: tensors must be contiguous float32 on the CPU")
    return tensor.data_ptr()


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a tensor of one dimension in the shapes of others, one behind the other."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class Augmentation:
    """`augment.augment` in native code, for nearest resampling; it gathers the images, too.

    Args:
        config: strengths.
        threads: of the native code; the result does not depend on it.
    """

    def __init__(self, config: Config, threads: int = 1):
        library = load_library()
        if library is None or config.resampling != "nearest":
            raise RuntimeError("native augmentation is not available")
        self._augment, self._threads = library.augment, threads
        self._ranges = find_ranges(config)
        self._basis = interpolation_basis(IMAGE_SIZE, torch.device("cpu")).contiguous()

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
        self._augment(
            *(images.data_ptr(), None if rows is None else rows.data_ptr(), number),
            *(ctypes.byref(self._ranges), key, key ^ ELASTIC, position),
            *(self._basis.data_ptr(), self._threads, results.data_ptr()),
        )
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
        library = load_library()
        if library is None:
            raise RuntimeError("native code is not available")
        self._library, self._threads = library, threads
        self.lanes: int = library.lanes()
        self._counters = [b for name, b in self.named_buffers() if "num_batches" in name]
        self._learned = list(self.parameters())  # to walk through the modules takes 0.1 ms
        self.weights = torch.cat([parameter.detach().flatten() for parameter in self._learned])
        for parameter, view in zip(self._learned, views(self.weights, self._learned), strict=True):
            parameter.data = view
        self.gradient = torch.zeros_like(self.weights)
        self._gradients = views(self.gradient, self._learned)
        self._layers = describe(self)

    def hand_over_gradients(self) -> None:
        """Lets the parameters have their parts of `gradient`."""
        if self._learned[0].grad is not self._gradients[0]:
            for parameter, gradient in zip(self._learned, self._gradients, strict=True):
                parameter.grad = gradient
            self._layers = describe(self)

    def backpropagate(
        self,
        inputs: Tensor,
        labels: Tensor,
        weight: float,
        smoothing: float,
        place: tuple[int, int],
    ) -> tuple[float, float]:
        """Writes the parameters' gradients and moves the running statistics.

        Args:
            inputs: float32 (batch, 1, 28, 28); the batch is a multiple of `lanes`.
            labels: int64 (batch,).
            weight: factor of the sum of losses.
            smoothing: of the labels, see `step.sum_of_losses`.
            place: key of dropout's draws, and position of the first image in the epoch.

        Returns:
            Sum of losses, without the factor, and number of correct predictions.
        """
        if len(inputs) % self.lanes:
            raise ValueError(f"native code: {len(inputs)} is no multiple of {self.lanes} images")
        self.hand_over_gradients()
        inputs, labels = inputs.contiguous(), labels.contiguous()
        totals = (ctypes.c_double * 2)()
        self._library.train(
            *(self._layers, len(self._layers), inputs.data_ptr(), labels.data_ptr()),
            *(len(inputs), weight, smoothing, *place, self._threads, totals),
        )
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
        self._library.predict(
            *(self._layers, len(self._layers), padded.data_ptr(), len(padded)),
            *(self._threads, logits.data_ptr()),
        )
        return logits[: len(images)]
