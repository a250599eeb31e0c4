"""One training step: augment, forward, loss, backward, gradient reduction, SGD, Muon or AdamW.

It runs in one of five modes that compute the same training:

- eager: kernel by kernel, through Accelerate's wrappers.
- native: forward and backward pass in C++ of our own, on CPUs in float32.
- compiled: augmentation (on GPUs), forward and backward pass are compiled.
- captured: the whole compiled step is recorded as one CUDA graph, and a step is one launch.
- fused: the whole step is one kernel of our own, on large GPUs in float32.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mnist_fast import fused, native
from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.data import Batch, Sharding
from mnist_fast.errors import InputError
from mnist_fast.files import say
from mnist_fast.model import Network, build_network
from mnist_fast.muon import Muon
from mnist_fast.runtime import Runtime

# Fewer images than this over the run, and compiling costs more than it gives
COMPILE_FROM_IMAGES = 400_000
NATIVE_FROM_IMAGES = 50_000  # the same for our own code
WARM_UPS = 11  # runs before a capture: DDP's and NCCL's set-up takes up to 11 iterations


def sum_of_losses(log_probabilities: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Sum of the negative log-likelihoods of a batch, with label smoothing.

    Args:
        log_probabilities: (batch, classes).
        labels: int64 (batch,).
        smoothing: mass spread evenly over all classes (Szegedy et al., 2016).
    """
    likelihood = log_probabilities.gather(1, labels[:, None]).sum()
    if smoothing:
        likelihood = (1 - smoothing) * likelihood + smoothing * log_probabilities.mean(1).sum()
    return -likelihood


def build_optimizer(config: Config, network: nn.Module, networks: int = 1) -> torch.optim.Optimizer:
    """The optimiser of all parameters.

    Args:
        config: rule and its numbers.
        network: what is trained.
        networks: that its weights hold, one behind the other.
    """
    parameters = network.parameters()
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        betas = (config.momentum, config.beta2)
        return torch.optim.AdamW(parameters, betas=betas, fused=True, **common)
    common |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.optimizer == "muon":
        return Muon(parameters, networks=networks, **common)
    return torch.optim.SGD(parameters, fused=True, **common)


def first_state(config: Config, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimiser keeps of a parameter, as it would create it in its first step."""
    if config.optimizer == "adamw":
        step = torch.zeros((), device=parameter.device)
        moments = [torch.zeros_like(parameter, requires_grad=False) for _ in range(2)]
        return {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    if config.momentum or config.optimizer == "muon":
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    return {}


class FlatSGD:
    """SGD, as `torch.optim.SGD` has it, of parameters that lie in one tensor.

    Torch's has more to do for many small ones, and imports torch's compiler, which takes seconds.

    Args:
        config: momentum, Nesterov's or not, and weight decay.
        network: whose weights are trained.
        rate: learning rate, of no dimension.
    """

    def __init__(self, config: Config, network: native.NativeNetwork, rate: Tensor):
        self.config, self.network, self.rate = config, network, rate
        self.momentum = torch.zeros_like(network.weights)

    def step(self) -> None:
        """One step against the network's gradient."""
        config, weights, gradient = self.config, self.network.weights, self.network.gradient
        if config.weight_decay:
            gradient = gradient.add(weights, alpha=config.weight_decay)
        update = gradient
        if config.momentum:
            update = self.momentum.mul_(config.momentum).add_(gradient)
        if config.nesterov:
            update = gradient.add(update, alpha=config.momentum)
        weights.addcmul_(update, self.rate, value=-1)


def resolve_mode(config: Config, precision: str, sharding: Sharding) -> str:
    """The step mode; `auto` is fused or captured on GPUs and native on CPUs, or what comes next.

    Native steps compute a multiple of their lanes of images; a smaller last batch may be another.

    fp16 is always eager: its loss scaling decides on the host whether a step is taken.

    Raises:
        InputError: what is asked for cannot be had on this machine or in this precision.
    """
    on_gpu = torch.cuda.is_available()
    if config.step == "captured" and not on_gpu:
        raise InputError("--step captured needs a GPU: use native, eager or auto", shared=True)
    if config.step == "native":
        _check_native(precision, on_gpu, sharding)
    if config.step == "fused":
        _check_fused(config, precision, sharding)
    if precision == "fp16":
        return "eager"
    if config.step != "auto":
        return config.step
    images = config.epochs * sharding.samples
    if precision == "no" and images >= NATIVE_FROM_IMAGES:
        if on_gpu and not _missing_for_fused(config, precision, sharding):
            return "fused"
        library = None if on_gpu else native.load_library()
        if library and sharding.local_size % library.lanes() == 0:
            return "native"
    if on_gpu:
        return "captured" if images >= COMPILE_FROM_IMAGES else "eager"
    return "compiled" if images >= COMPILE_FROM_IMAGES and native.compiler() else "eager"


def _check_native(precision: str, on_gpu: bool, sharding: Sharding) -> None:
    if on_gpu:
        raise InputError("--step native is for CPUs: use captured, compiled or auto", shared=True)
    if precision != "no":
        raise InputError(
            f"--step native computes in float32: leave out --precision {precision}", shared=True
        )
    library, images = native.load_library(), sharding.local_size
    if not library:
        fault = "--step native needs a C++ 20 compiler that takes native.cpp: use eager or auto"
        raise InputError(fault, shared=True)
    if images % library.lanes():
        fault = f"--step native computes multiples of {library.lanes()} images, not {images}"
        remedy = "choose another --batch_size, or eager or auto"
        raise InputError(f"{fault} per process: {remedy}")  # another node may have other lanes


def _check_fused(config: Config, precision: str, sharding: Sharding) -> None:
    if missing := _missing_for_fused(config, precision, sharding):
        other = "captured" if torch.cuda.is_available() else "native"
        raise InputError(f"--step fused: {missing}: use {other}, eager or auto", shared=True)


def _missing_for_fused(config: Config, precision: str, sharding: Sharding) -> str:
    """Why steps cannot be fused; empty where they can."""
    if reason := fused.obstacle(config, sharding.local_size, sharding.world_size):
        return reason
    if precision != "no":
        return "it computes in float32, as --precision no"
    kernel = fused.load_kernel(config.network, config.dropout, sharding.local_size)
    return "" if kernel else "the kernel cannot be compiled here"


def keep_compiled_kernels() -> None:
    """Keeps them in the user's cache folder: /tmp, torch's choice, often ends with a cluster's job.

    Where there is no such folder, or TORCHINDUCTOR_CACHE_DIR is set, nothing is changed.
    """
    with contextlib.suppress(OSError, RuntimeError):
        folder = native.cache_folder("inductor")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


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


class CapturedStep:
    """A training step on a batch whose tensors stay in place.

    Args:
        train: one step on a batch.
        batch: tensors that the graph reads; later batches are copied into them, except for a
            resident feed's pool of images, which is the same in every batch.
        network: whose gradients the graph writes.
        graph_type: `CudaGraph`, or what tests put in its place.
    """

    def __init__(
        self, train: Callable[[Batch], None], batch: Batch, network: nn.Module, graph_type: Any
    ):
        self._batch = batch
        self._parameters = list(network.parameters())
        self._graph = graph_type(lambda: train(batch))
        self._gradients = [parameter.grad for parameter in self._parameters]

    def __call__(self, batch: Batch) -> None:
        """Trains on a batch of the same size."""
        theirs = (batch.images, batch.labels, batch.rows)
        for mine, new in zip(
            (self._batch.images, self._batch.labels, self._batch.rows), theirs, strict=True
        ):
            if mine is not None and new is not None and mine is not new:
                mine.copy_(new, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a step outside the graph may have left its own


class TrainingStep:
    """Trains the network on one batch per call.

    Attributes:
        network: the bare network, on the device.
        averaged: its exponential moving average, or None.
        optimizer: torch's, where it is that which takes the steps; else None.
        totals: float64 (3,) on the device: sum of losses, correct predictions and images of this
            process since `reset_totals`. Reading it is the only thing that waits for the device.
    """

    graph_type: Any = CudaGraph

    def __init__(self, config: Config, network: Network, runtime: Runtime, sharding: Sharding):
        self.config, self.runtime, self.sharding = config, runtime, sharding
        modes = set(runtime.gather(resolve_mode(config, runtime.precision, sharding)))
        # a node without a compiler: the processes reduce gradients differently from mode to mode
        self.mode = modes.pop() if len(modes) == 1 else "eager"
        if self.mode == "eager" and config.step not in ("auto", "eager") and runtime.is_main:
            say("step: eager, because fp16's loss scaling waits for the host in every step")
        device = runtime.device
        network = network.to(device)
        averaged = copy.deepcopy(network).eval() if config.ema_decay else None
        self._native: native.NativeNetwork | None = None
        self._native_augment: native.Augmentation | None = None
        if self.mode == "native":
            torch.set_num_threads(1)  # what is left to torch is small; its threads would spin
            network = self._native = native.NativeNetwork(network, runtime.threads)
            if averaged:
                averaged = native.NativeNetwork(averaged, runtime.threads).eval()
        elif self.mode != "fused":
            network = network.to(memory_format=torch.channels_last)
            averaged = averaged.to(memory_format=torch.channels_last) if averaged else None
        self.network, self.averaged = network, averaged
        self._learned = list(network.parameters())  # to walk through the modules takes 0.1 ms
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        # what changes from step to step lies in tensors, where a captured step reads it
        self._rate = torch.zeros((), device=device)
        self._key = torch.zeros((), dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(sharding.local_size, device=device)
        self._fused: fused.FusedStep | None = None
        if self.mode == "fused":
            kernel = fused.load_kernel(config.network, config.dropout, sharding.local_size)
            self._fused = fused.FusedStep(config, network, kernel, self.totals)
        self._forward_network: nn.Module = network
        self.optimizer: torch.optim.Optimizer | None = None
        self._kept = self._set_up_optimizer()
        self._augmented, self._augment_key, self._dropout_key = True, 0, 0
        self._captured: dict[bool, CapturedStep] = {}  # by whether images are augmented
        self._choose_functions()

    def _choose_functions(self) -> None:
        """Sets what augments and what goes forward, compiled where the mode has it so."""
        self._augment, self._forward = augment, self._forward_rest
        if self.mode == "native" and self.config.resampling == "nearest":
            self._native_augment = native.Augmentation(self.config, self.runtime.threads)
        inputs_alone = self._fused is not None and not self._fused.augments
        if self.mode not in ("compiled", "captured") and not inputs_alone:
            return  # and torch's compiler is not even imported
        keep_compiled_kernels()
        if self._fused is None:
            self._forward = torch.compile(self._forward_rest, dynamic=False)
        if self.runtime.device.type == "cuda":  # on CPUs the eager kernels are the faster ones
            self._augment = torch.compile(augment, dynamic=False)

    def _set_up_optimizer(self) -> list[dict[str, Tensor]]:
        """Sets what takes the steps; returns what it keeps of each parameter."""
        if self._fused is not None:
            momenta = self._fused.momenta
        elif self._native is not None and self.config.optimizer == "sgd":
            sgd = FlatSGD(self.config, self._native, self._rate)
            self._take_step, momenta = sgd.step, native.views(sgd.momentum, self._learned)
        else:
            return self._set_up_torchs_optimizer()
        return [dict.fromkeys(first_state(self.config, room), room) for room in momenta]

    def _set_up_torchs_optimizer(self) -> list[dict[str, Tensor]]:
        """The same, with what the first step would create there already."""
        self.optimizer = optimizer = stepper = build_optimizer(self.config, self.network)
        if self.mode == "eager":
            self._forward_network, stepper = self.runtime.prepare(self.network, optimizer)
        self._take_step = stepper.step
        for group in optimizer.param_groups:  # after `prepare`, which would copy the tensor
            group["lr"] = self._rate
        for parameter in self._learned:
            optimizer.state[parameter].update(first_state(self.config, parameter))
        return [optimizer.state[parameter] for parameter in self._learned]

    def _optimizer_state(self) -> dict[str, Tensor]:
        """What the optimiser keeps, by name."""
        return {
            f"optimizer/{index}/{name}": tensor
            for index, kept in enumerate(self._kept)
            for name, tensor in kept.items()
            if tensor is not None
        }

    def start_epoch(self, epoch: int) -> None:
        """Sets the epoch whose augmentation is drawn."""
        self._augment_key = derive_key(self.config.seed, epoch, "augment")
        self._key.fill_(self._augment_key)
        self._dropout_key = derive_key(self.config.seed, epoch, "dropout")
        self._augmented = epoch < self.config.epochs - self.config.plain_epochs
        self._forward_network.train()

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Trains on this process's part of a global batch; does not wait for the device."""
        if self._fused is not None:
            self._train_fused(batch, learning_rate)
            return
        self._rate.fill_(learning_rate)
        self._position.fill_(batch.position)
        whole = len(batch) == self.sharding.local_size
        train = self._captured.get(self._augmented, self._train) if whole else self._train
        train(batch)

    def _train(self, batch: Batch) -> None:
        """One step, at the position and learning rate that stand in their tensors.

        The loss is the global batch's mean: each process's sum is weighted so that the mean of
        the gradients over the processes is exact, also where the parts differ in size.
        """
        weight = self.runtime.world_size / batch.global_size
        inputs, labels = self._prepare_inputs(batch), batch.gather_labels()
        if self._native is not None and len(batch) % self._native.lanes == 0:
            place = (self._dropout_key, batch.position)
            smoothing = self.config.label_smoothing
            loss_sum, hits = self._native.backpropagate(inputs, labels, weight, smoothing, place)
            counts = self.totals.new_tensor([loss_sum, hits, len(batch)])
        else:
            self._reset_gradients()
            whole = len(batch) == self.sharding.local_size
            loss, counts = (self._forward if whole else self._forward_rest)(inputs, labels)
            self.runtime.backward(loss * weight)
        if self._native is not None:
            self.runtime.average([self._native.gradient])  # one piece: nothing to copy
        elif self.mode != "eager":
            self.runtime.average([p.grad for p in self._learned if p.grad is not None])
        self._take_step()
        self.totals += counts
        self._average()

    def _reset_gradients(self) -> None:
        """Called before a backward pass, not behind a step: `gradient_norm` reads the last ones."""
        if self._native is not None:
            self._native.hand_over_gradients()
            self._native.gradient.zero_()
            return
        for parameter in self._learned:
            parameter.grad = None

    def _train_fused(self, batch: Batch, learning_rate: float) -> None:
        """One step of the fused kernel."""
        assert self._fused is not None
        inputs = None
        if self._augmented and not self._fused.augments:
            self._position.fill_(batch.position)
            inputs = self._prepare_inputs(batch)
        keys = (self._augment_key, self._dropout_key)
        self._fused(batch, inputs, learning_rate, keys, self._augmented)

    def _prepare_inputs(self, batch: Batch) -> Tensor:
        """Augmented and normalised inputs."""
        if self._augmented and self._native_augment:
            place = (batch.position, self._augment_key)
            return self._native_augment(batch.images, batch.rows, *place)
        images = batch.gather_images()
        if not self._augmented:
            return normalise(scale_pixels(images))
        positions = self._position + self._offsets[: len(images)]
        return self._augment(self.config, images, positions, self._key)

    def _forward_rest(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses; what to add to `totals`. Never compiled, for any batch size."""
        with self.runtime.autocast():
            log_probabilities = self._forward_network(inputs)
        loss = sum_of_losses(log_probabilities, labels, self.config.label_smoothing)
        hits = (log_probabilities.argmax(1) == labels).sum()
        count = torch.full_like(hits, len(labels))
        return loss, torch.stack([loss.detach().double(), hits.double(), count.double()])

    def _average(self) -> None:
        """Moves the averaged weights and statistics one step towards the network's."""
        if self.averaged is not None:
            theirs, ours = floats(self.averaged), floats(self.network)
            torch._foreach_lerp_(theirs, ours, 1 - self.config.ema_decay)

    def warm_up(self, example: Batch) -> None:
        """Compiles and captures; nothing that training depends on is changed by it.

        Call it while no other thread uses the GPU: CUDA forbids that during a capture.

        Args:
            example: a whole batch in the feed's form, with any content. A captured step keeps its
                tensors.
        """
        if self.mode in ("eager", "native"):
            return
        if self._fused is not None:
            if not self._fused.augments:
                self._prepare_inputs(example)
            return
        with self._unchanged():
            if self.mode == "compiled":
                self._train(example)
            else:
                for epoch in range(self.config.epochs):
                    self.start_epoch(epoch)
                    if self._augmented not in self._captured:
                        self._captured[self._augmented] = CapturedStep(
                            self._train, example, self.network, self.graph_type
                        )
        self._reset_gradients()

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Puts weights, statistics, averages, optimiser, totals and generators back afterwards."""
        networks = [self.network] if self.averaged is None else [self.network, self.averaged]
        state = [
            *(t.data for network in networks for t in network.parameters()),
            *(t for network in networks for t in network.buffers()),
            *self._optimizer_state().values(),
            self.totals,
        ]
        kept = [tensor.clone() for tensor in state]
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)

    def start_over(self, seed: int) -> None:
        """Gives the step a seed's fresh weights, statistics and generators, in place."""
        self.runtime.seed(seed)
        fresh = build_network(self.config.network, self.config.dropout).state_dict()
        blank = {name: torch.zeros_like(value) for name, value in self._optimizer_state().items()}
        kinds = ("network", "averaged")
        self.load_state({f"{kind}/{k}": v for k, v in fresh.items() for kind in kinds} | blank)
        self.reset_totals()
        self.runtime.seed_process(seed)
        self.config = dataclasses.replace(self.config, seed=seed)

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics, averages and the optimiser's state by name, copied to the CPU."""
        found = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        if self.averaged is not None:
            found |= {f"averaged/{k}": v for k, v in self.averaged.state_dict().items()}
        found |= self._optimizer_state()
        return {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in found.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Sets what `state` returned."""
        networks = {"network/": self.network, "averaged/": self.averaged}
        for prefix, network in networks.items():
            if network is not None:
                part = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
                network.load_state_dict(part)
        for name, tensor in self._optimizer_state().items():
            tensor.copy_(tensors[name])  # in place: a captured step knows the address
        if self._fused is not None:
            self._fused.pack()

    def gradient_norm(self) -> float | None:
        """Euclidean norm of the last step's gradient; it waits for the device.

        None before the first step, and in fp16, whose gradients are scaled.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if not gradients or self.runtime.precision == "fp16":
            return None
        return torch.stack(torch._foreach_norm(gradients)).norm().item()

    def reset_totals(self) -> None:
        """Starts counting anew."""
        self.totals.zero_()

    def best_network(self) -> Network:
        """The network to evaluate and keep: the averaged one where there is one."""
        return self.network if self.averaged is None else self.averaged


def floats(network: nn.Module) -> list[Tensor]:
    """Parameters and floating-point buffers."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    return [parameter.data for parameter in network.parameters()] + buffers
