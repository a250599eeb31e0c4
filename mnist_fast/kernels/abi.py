"""Structs that Python shares with the compiled kernels, and the description of a network.

The fields of each struct are those of the struct of the same name in cpu.cpp, hopper.cu or
augment.h, in the same order.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnist_fast.config import Config
from mnist_fast.model import IMAGE_SIZE, Network

POOLS = {nn.MaxPool2d: 1, nn.AvgPool2d: 2}  # values of the enum Pool
LARGEST_WINDOW = 16  # cpu.cpp's MOST_WINDOW

Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
Key, Position = ctypes.c_uint64, ctypes.c_int64


class UnsupportedNetwork(ValueError):
    """A network with a layer that the kernels do not support; the message names it."""


def fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """A struct's fields from pairs of a type and names, separated by spaces."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Ranges(ctypes.Structure):
    """Strengths of the augmentation: radians, pixels, factors, and a pixel value in 0..1."""

    _fields_ = fields(
        (Float, "rotation angle shear scale_min scale_max translate elastic"),
        (Float, "brightness contrast fill"),
    )


# Of a convolution and what follows it, as both kernels take it
LAYER_SHAPE = fields(
    (Int, "inputs outputs kernel padding input_size"),
    (Int, "normalises relu_before relu_after pool window"),
    (Float, "epsilon momentum dropout"),
)


class Layer(ctypes.Structure):
    """One convolution and what follows it, with its tensors."""

    _fields_ = LAYER_SHAPE + fields(
        (Pointer, "weight scale shift weight_gradient scale_gradient shift_gradient"),
        (Pointer, "running_mean running_variance"),
    )


class TrainArguments(ctypes.Structure):
    """Arguments of `train` in cpu.cpp."""

    _fields_ = fields(
        (Pointer, "layers images labels totals"),
        (Key, "dropout_key"),
        (Position, "position"),
        (Int, "layer_count batch threads"),
        (Float, "weight smoothing"),
    )


class PredictArguments(ctypes.Structure):
    """Arguments of `predict` in cpu.cpp."""

    _fields_ = fields((Pointer, "layers images logits"), (Int, "layer_count batch threads"))


class AugmentArguments(ctypes.Structure):
    """Arguments of `augment` in cpu.cpp."""

    _fields_ = [
        *fields(
            (Pointer, "images rows basis results"),
            (Key, "augment_key elastic_key"),
            (Position, "position"),
            (Int, "batch threads"),
        ),
        ("ranges", Ranges),
    ]


# Memory that hopper.cu's step keeps from launch to launch
HOPPER_BUFFERS = (
    *("basis", "parameters", "momenta", "gradients", "statistics", "counters", "totals"),
    *("partial", "losses", "packed", "places", "words"),
)


class HopperArguments(ctypes.Structure):
    """Arguments of `train` and `pack` in hopper.cu."""

    _fields_ = [
        *fields(
            (Pointer, "images labels rows inputs"),
            (Pointer, " ".join(HOPPER_BUFFERS)),
            (Key, "augment_key elastic_key dropout_key"),
            (Position, "position"),
            (Float, "rate momentum weight_decay weight smoothing"),
            (ctypes.c_uint32, "ticket"),
            (Int, "augmented nesterov muon"),
        ),
        ("ranges", Ranges),
    ]


def find_ranges(config: Config) -> Ranges:
    """A recipe's strengths in the kernels' units."""
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


def describe(network: Network) -> "ctypes.Array[Layer]":
    """The network as the kernels take it: an array of its convolutions.

    It points to the network's parameters and running statistics, and to the parameters' gradients
    where there are some.

    Raises:
        UnsupportedNetwork: a layer is not supported, or a tensor is not contiguous float32 on the
            CPU.
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
            raise UnsupportedNetwork(f"the network has an unsupported layer {module}")
    return (Layer * len(found))(*found)


def _convolution(module: nn.Conv2d, size: int) -> Layer:
    kernel, padding = module.kernel_size[0], int(module.padding[0])
    plain = nn.Conv2d(
        module.in_channels, module.out_channels, kernel, padding=padding, bias=False, device="meta"
    )
    if repr(plain) != repr(module) or kernel not in (1, 3) or padding >= kernel:
        raise UnsupportedNetwork(f"the network has an unsupported convolution {module}")
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
    """Adds a module that follows the convolution; returns the size of its outputs."""
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
        raise UnsupportedNetwork(f"the network has an unsupported layer {module}")
    return size


def _divides(pooling: Any, size: int) -> bool:
    side = pooling.kernel_size
    fits = isinstance(side, int) and 1 < side <= LARGEST_WINDOW and size % side == 0
    return fits and pooling.stride == side and not pooling.padding and not pooling.ceil_mode


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.dtype != torch.float32 or tensor.is_cuda:
        raise UnsupportedNetwork("tensors must be contiguous float32 on the CPU")
    return tensor.data_ptr()


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a tensor of one dimension, one behind the other, shaped and laid out as others.

    Args:
        flat: (sum of the others' sizes,).
        like: dense tensors.
    """
    found, place = [], flat.storage_offset()
    for tensor in like:
        found.append(flat.as_strided(tensor.shape, tensor.stride(), place))
        place += tensor.numel()
    return found
