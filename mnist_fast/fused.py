"""Training steps on NVIDIA GPUs as one kernel each (fused.cu).

Every image of a batch has a multiprocessor to itself, and all are at work at the same time: it
takes a GPU with as many multiprocessors as a batch has images, and with their shared memory large
enough for all activations of an image, as Hopper's (132 of them, 227 KB) and later data-centre
GPUs have. All arithmetic is float32. The file is compiled for the network at its first use, and
kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mnist_fast import native
from mnist_fast.augment import ELASTIC, interpolation_basis, warps
from mnist_fast.config import Config
from mnist_fast.files import say, write_atomically
from mnist_fast.model import IMAGE_SIZE, Network, build_network

if TYPE_CHECKING:
    from mnist_fast.data import Batch

SOURCE = Path(__file__).with_name("fused.cu")
THREADS = 512  # of a block: with more, registers are short
MOST_CHANNELS = 64  # fused.cu's
SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor, of which the larger network takes 223 KB
# fused.cu's Layer
FIELDS = [
    *("inputs", "outputs", "kernel", "padding", "input_size", "normalises", "relu_before"),
    *("relu_after", "pool", "window", "epsilon", "momentum", "dropout"),
]
TRUE = ("1", "true", "yes", "on", "t", "y")  # words that accelerate takes for it
OPTIONS = ("-std=c++20", "-default-device", "-diag-suppress=128,177")


# Memory that a step keeps, in the order of fused.cu's Arguments
ROOMS = [
    *("basis", "parameters", "momenta", "gradients", "statistics", "counters", "totals"),
    *("partial", "losses", "packed", "places", "words"),
]


class Arguments(ctypes.Structure):
    """What the kernel takes; the same fields stand in fused.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("images", "labels", "rows", "inputs", *ROOMS)),
        *((name, ctypes.c_uint64) for name in ("augment_key", "elastic_key", "dropout_key")),
        ("position", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("rate", "momentum", "weight_decay", "weight")),
        *(("smoothing", ctypes.c_float), ("ticket", ctypes.c_uint32)),
        *((name, ctypes.c_int32) for name in ("augmented", "nesterov", "muon")),
        ("ranges", native.Ranges),
    ]


def obstacle(config: Config, images: int, world_size: int) -> str:
    """Why a run cannot have fused steps, in words; empty where nothing is known against it.

    Args:
        config: the run's choices.
        images: in each batch of a process.
        world_size: number of processes.
    """
    # `accelerate launch` sets the variable in any case
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE
    if on_cpu or not torch.cuda.is_available():
        return "it needs a GPU"
    if not _has_bindings():
        return "it needs the package cuda-bindings"
    if config.optimizer not in ("sgd", "muon") or config.ema_decay:
        return "it has SGD and Muon alone, without averages of weights"
    if world_size > 1:
        return "it has one process alone"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if gpu.multi_processor_count < images:
        return f"this GPU has {gpu.multi_processor_count} multiprocessors for {images} images"
    if getattr(gpu, "shared_memory_per_block_optin", 0) < SHARED_MEMORY:
        return "this GPU's multiprocessors have too little shared memory"
    return ""


def _has_bindings() -> bool:
    """Whether Python can call CUDA; what torch brings for Linux since CUDA 13."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec("cuda.bindings") is not None
    return False


def prelude(network: Network, images: int, threads: int = THREADS) -> str:
    """What fused.cu needs before it, for a network on the CPU, images and threads of a block.

    Raises:
        ValueError: the network holds what fused.cu does not know.
    """
    layers = list(native.describe(network))
    if [bool(layer.normalises) for layer in layers] != [True] * (len(layers) - 1) + [False]:
        raise ValueError("fused steps: all layers but the last one need a BatchNorm")
    if max(layer.outputs for layer in layers) > MOST_CHANNELS:
        raise ValueError(f"fused steps: more than {MOST_CHANNELS} channels")
    rows = ("{" + ", ".join(_number(getattr(layer, f)) for f in FIELDS) + "}" for layer in layers)
    values = {"NETWORK": ", ".join(rows), "THREADS": threads, "BLOCKS": images}
    defined = "".join(f"#define {name} {value}\n" for name, value in values.items())
    return defined + native.SHARED.read_text()


def _number(value: float) -> str:
    return f"{value!r}f" if isinstance(value, float) else str(value)


@functools.cache
def load_kernel(name: str, dropout: float, images: int) -> Any:
    """The compiled kernel; None where it cannot be compiled, which is then said once."""
    try:
        with torch.random.fork_rng(devices=[]):
            network = build_network(name, dropout)
        return Kernel(network, images)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"step: no fused kernel on this machine: {str(error).strip().splitlines()[0]}")
        return None


class Kernel:
    """The kernel for a network and a number of images, on the current GPU.

    Args:
        network: on the CPU.
        images: the most that a batch has.

    Attributes:
        images: as given.
        packed: floats of the packed weights.
    """

    def __init__(self, network: Network, images: int):
        from cuda.bindings import driver

        self._driver, self.images = driver, images
        torch.zeros(1, device="cuda")  # makes torch's context the current one
        text = prelude(network, images) + SOURCE.read_text()
        try:
            self._module = _call(driver.cuModuleLoadData(compile_source(text)))
        except RuntimeError:  # what the cache had may be damaged
            self._module = _call(driver.cuModuleLoadData(compile_source(text, anew=True)))
        self._train = _call(driver.cuModuleGetFunction(self._module, b"train"))
        self._pack = _call(driver.cuModuleGetFunction(self._module, b"pack"))
        self._shared, self.packed = (self._constant(n) for n in (b"shared_bytes", b"packed_floats"))
        kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute(self._train, kind, self._shared))

    def _constant(self, name: bytes) -> int:
        address, _ = _call(self._driver.cuModuleGetGlobal(self._module, name))
        value = ctypes.c_int32()
        _call(self._driver.cuMemcpyDtoH(ctypes.addressof(value), address, 4))
        return value.value

    def train(self, pointers: Any, images: int) -> None:
        """Starts a step on the current stream; a ctypes array points to its `Arguments`."""
        launch = self._driver.cuLaunchCooperativeKernel
        shape = (images, 1, 1, THREADS, 1, 1, self._shared, _stream())
        _call(launch(self._train, *shape, ctypes.addressof(pointers)))

    def pack(self, pointers: Any) -> None:
        """Starts the packing of the weights on the current stream; arguments as for `train`."""
        shape = (1, 1, 1, THREADS, 1, 1, 0, _stream())
        _call(self._driver.cuLaunchKernel(self._pack, *shape, ctypes.addressof(pointers), 0))


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _call(answer: tuple[Any, ...]) -> Any:
    """What a function of CUDA gave besides its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else values


def compile_source(text: str, anew: bool = False) -> bytes:
    """Machine code for the current GPU, from the cache where it is there.

    Args:
        text: the program.
        anew: whether not to look into the cache.

    Raises:
        RuntimeError: the compiler refused it; its words are in it.
    """
    major, minor = torch.cuda.get_device_capability()
    options = (*OPTIONS, f"-arch=sm_{major}{minor}")
    key = hashlib.sha256("/".join([text, *options, str(torch.version.cuda)]).encode()).hexdigest()
    path = None
    with contextlib.suppress(OSError, RuntimeError):
        path = native.cache_folder("fused") / f"{key[:16]}.cubin"
        if not anew:
            return path.read_bytes()
    code = _compile(text, options)
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk, say: the code is there all the same
            write_atomically(path, code)
    return code


def _compile(text: str, options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    program = _call(nvrtc.nvrtcCreateProgram(text.encode(), b"fused.cu", 0, [], []))
    given = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    if status.value:
        log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode(errors="replace").strip("\0 \n") or status.name)
    code = bytearray(_call(nvrtc.nvrtcGetCUBINSize(program)))
    nvrtc.nvrtcGetCUBIN(program, code)
    return bytes(code)


class FusedStep:
    """A network's training step in the kernel.

    The network's parameters, gradients and statistics become views of one tensor each, where the
    kernel has them; they must stay there.

    Args:
        config: the run's choices.
        network: contiguous, float32, on the GPU.
        kernel: `load_kernel`'s for that network.
        totals: float64 (3,) on the GPU, to which sum of losses, correct predictions and images
            are added.

    Attributes:
        momenta: the parameters' momentum buffers.
        augments: whether the kernel augments images itself; it wants their inputs otherwise.
    """

    def __init__(self, config: Config, network: Network, kernel: Any, totals: Tensor):
        self._kernel, images = kernel, kernel.images
        self._parameters = parameters = list(network.parameters())
        device = totals.device
        flat = torch.cat([p.detach().flatten() for p in parameters])
        rooms = [flat, torch.zeros_like(flat), torch.zeros_like(flat)]
        views = [native.views(room, parameters) for room in rooms]
        for parameter, view in zip(parameters, views[0], strict=True):
            parameter.data = view
        self.momenta, self._gradients = views[1:]
        norms = [m for m in network.layers if isinstance(m, nn.BatchNorm2d)]
        names = ("running_mean", "running_var")
        buffers = [getattr(norm, name) for norm in norms for name in names]
        statistics = torch.cat(buffers)
        counters = torch.stack([norm.num_batches_tracked for norm in norms])  # type: ignore[misc]
        for index, view in enumerate(native.views(statistics, buffers)):
            setattr(norms[index // 2], names[index % 2], view)
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = counter
        layers = sum(isinstance(m, nn.Conv2d) for m in network.layers)
        work = [
            torch.empty(images, len(flat), device=device),
            torch.empty(images, 2, device=device),
            torch.zeros(kernel.packed, device=device),
            torch.empty(2, len(flat), dtype=torch.int32, device=device),
            torch.zeros(2 * layers + 2, MOST_CHANNELS, images, 4, device=device),
        ]
        basis = interpolation_basis(IMAGE_SIZE, device).contiguous()
        self._rooms = [basis, *rooms, statistics, counters, totals, *work]
        self.augments = config.resampling == "nearest"
        self._arguments = Arguments(
            **dict(zip(ROOMS, (room.data_ptr() for room in self._rooms), strict=True)),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            smoothing=config.label_smoothing,
            nesterov=config.nesterov,
            muon=config.optimizer == "muon",
            ranges=native.find_ranges(config),
        )
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self.pack()
        self._moves = bool(warps(config) or config.brightness or config.contrast)

    def __call__(
        self,
        batch: Batch,
        inputs: Tensor | None,
        rate: float,
        keys: tuple[int, int],
        augmented: bool,
    ) -> None:
        """Trains on a batch; does not wait for the device.

        Args:
            batch: on the GPU.
            inputs: float32 (batch, 1, 28, 28), or None for those that the kernel makes itself.
            rate: learning rate.
            keys: of the epoch's augmentation and dropout.
            augmented: whether images are.
        """
        a = self._arguments
        if not a.ticket:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        a.images, a.labels = batch.images.data_ptr(), batch.labels.data_ptr()
        a.rows = None if batch.rows is None else batch.rows.data_ptr()
        a.inputs = None if inputs is None else inputs.data_ptr()
        a.augment_key, a.dropout_key = keys
        a.elastic_key = a.augment_key ^ ELASTIC
        a.position, a.rate, a.weight = batch.position, rate, 1 / batch.global_size
        a.augmented = augmented and self._moves
        a.ticket += 1
        self._kernel.train(self._pointers, len(batch))

    def pack(self) -> None:
        """Tells the kernel that others changed the parameters."""
        self._kernel.pack(self._pointers)
