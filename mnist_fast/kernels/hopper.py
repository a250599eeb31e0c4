"""A whole training step on NVIDIA GPUs as one kernel (hopper.cu), in float32.

Every image of a batch has a multiprocessor to itself, and all are at work at the same time: it
takes a GPU with as many multiprocessors as a batch has images, and with their shared memory large
enough for all activations of an image, as Hopper's (132 of them, 227 KB) and later data-centre
GPUs have. The file is compiled for the network at its first use, and kept in the user's cache.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from mnist_fast.kernels import abi, build
from mnist_fast.model import Network

SOURCE, SHARED = (Path(__file__).with_name(name) for name in ("hopper.cu", "augment.h"))
THREADS = 512  # of a block: with more, registers are short
MOST_CHANNELS = 64  # hopper.cu's


def unsupported_gpu(device: torch.device, images: int, floats: int) -> str | None:
    """Why a GPU, or this Python, cannot run the kernel; None where no reason is known.

    Args:
        device: the GPU.
        images: of a batch.
        floats: activations of one image, see `count_activations`.
    """
    if not _has_bindings():
        return "the package cuda-bindings is missing"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.multi_processor_count < images:
        return f"this GPU has {gpu.multi_processor_count} multiprocessors for {images} images"
    if shared_memory(device) < 4 * floats:
        return "this GPU's multiprocessors have too little shared memory"
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on a GPU."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def count_activations(network: Network) -> int:
    """Numbers that a block keeps of one image: what convolutions take, and what they give.

    Raises:
        UnsupportedNetwork: a layer is not supported.
    """
    return sum(
        layer.inputs * (layer.input_size + 2 * layer.padding) ** 2
        + layer.outputs * (layer.input_size + 2 * layer.padding - layer.kernel + 1) ** 2
        for layer in abi.describe(network)
    )


def _has_bindings() -> bool:
    """Whether Python can call CUDA; torch for Linux brings what it takes since CUDA 13."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


def prelude(network: Network, images: int, threads: int = THREADS) -> str:
    """The definitions that hopper.cu is compiled with.

    Args:
        network: on the CPU.
        images: the most that a batch has.
        threads: of a block.

    Raises:
        UnsupportedNetwork: a layer is not supported.
    """
    layers = list(abi.describe(network))
    if [bool(layer.normalises) for layer in layers] != [True] * (len(layers) - 1) + [False]:
        raise abi.UnsupportedNetwork("only the network's last layer may lack BatchNorm")
    if max(layer.outputs for layer in layers) > MOST_CHANNELS:
        raise abi.UnsupportedNetwork(f"the network has more than {MOST_CHANNELS} channels")
    names = [name for name, _ in abi.LAYER_SHAPE]
    rows = ("{" + ", ".join(_number(getattr(layer, f)) for f in names) + "}" for layer in layers)
    values = {"NETWORK": ", ".join(rows), "THREADS": threads, "BLOCKS": images}
    defined = "".join(f"#define {name} {value}\n" for name, value in values.items())
    return defined + SHARED.read_text()


def _number(value: float) -> str:
    return f"{value!r}f" if isinstance(value, float) else str(value)


def try_kernel(network: Network, images: int) -> tuple[Any, str]:
    """The compiled kernel, or None and the reason why there is none.

    Args:
        network: on the CPU.
        images: the most that a batch has.
    """
    try:
        return _load(prelude(network, images), images)
    except abi.UnsupportedNetwork as error:
        return None, str(error)


@functools.cache
def _load(head: str, images: int) -> tuple[Any, str]:
    try:
        return Kernel(head + SOURCE.read_text(), images), ""
    except (ImportError, OSError, RuntimeError, build.BuildError) as error:
        return None, f"the kernel cannot be compiled: {str(error).strip().splitlines()[0]}"


class Kernel:
    """The kernel for a network and a number of images, on the current GPU.

    Args:
        text: the program.
        images: the most that a batch has.

    Attributes:
        images: as given.
        packed: floats of the packed weights.
    """

    def __init__(self, text: str, images: int):
        from cuda.bindings import driver

        self._driver, self.images = driver, images
        torch.zeros(1, device="cuda")  # makes torch's context the current one
        self._module = build.load_cuda(text)
        self._train = build.call_cuda(driver.cuModuleGetFunction(self._module, b"train"))
        self._pack = build.call_cuda(driver.cuModuleGetFunction(self._module, b"pack"))
        self._shared, self.packed = (self._constant(n) for n in (b"shared_bytes", b"packed_floats"))
        if self._shared > (there := shared_memory(torch.device("cuda"))):
            raise build.BuildError(f"it needs {self._shared} bytes of shared memory, not {there}")
        kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        build.call_cuda(driver.cuFuncSetAttribute(self._train, kind, self._shared))

    def _constant(self, name: bytes) -> int:
        address, _ = build.call_cuda(self._driver.cuModuleGetGlobal(self._module, name))
        value = ctypes.c_int32()
        build.call_cuda(self._driver.cuMemcpyDtoH(ctypes.addressof(value), address, 4))
        return value.value

    def train(self, pointers: Any, images: int) -> None:
        """Starts a step on the current stream; a ctypes array points to its `HopperArguments`."""
        launch = self._driver.cuLaunchCooperativeKernel
        shape = (images, 1, 1, THREADS, 1, 1, self._shared, _stream())
        build.call_cuda(launch(self._train, *shape, ctypes.addressof(pointers)))

    def pack(self, pointers: Any) -> None:
        """Starts the packing of the weights on the current stream; arguments as for `train`."""
        shape = (1, 1, 1, THREADS, 1, 1, 0, _stream())
        build.call_cuda(
            self._driver.cuLaunchKernel(self._pack, *shape, ctypes.addressof(pointers), 0)
        )


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
