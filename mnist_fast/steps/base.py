"""Inputs and state that all step modes share, and a step by backpropagation."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.data import Batch, Sharding
from mnist_fast.kernels import build
from mnist_fast.model import Network, build_network
from mnist_fast.optim import build_optimizer, first_state
from mnist_fast.runtime import Runtime

OptimizerState = list[dict[str, Tensor]]  # of each parameter, by name


@dataclasses.dataclass(frozen=True)
class Job:
    """The facts about a run that its steps need.

    Attributes:
        config: the run's choices.
        network: as it was built, on the CPU.
        device: that the run computes on.
        precision: no, bf16 or fp16.
        sharding: how an epoch is cut into batches and parts.
    """

    config: Config
    network: Network
    device: torch.device
    precision: str
    sharding: Sharding


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values that change from step to step.

    Attributes:
        learning_rate: of the step.
        augment_key, dropout_key: of the epoch's draws, from `augment.derive_key`.
        augmented: whether images are augmented.
    """

    learning_rate: float
    augment_key: int
    dropout_key: int
    augmented: bool

    @classmethod
    def of_epoch(cls, config: Config, epoch: int) -> "Settings":
        """An epoch's settings, at a learning rate of 0."""
        return cls(
            learning_rate=0.0,
            augment_key=derive_key(config.seed, epoch, "augment"),
            dropout_key=derive_key(config.seed, epoch, "dropout"),
            augmented=epoch < config.epochs - config.plain_epochs,
        )

    def at(self, learning_rate: float) -> "Settings":
        """The same at a learning rate."""
        return dataclasses.replace(self, learning_rate=learning_rate)


class TrainState:
    """All that training changes, except the optimiser's state.

    Attributes:
        network: the bare network, on the device. A mode may put its own form in its place.
        averaged: its exponential moving average, or None.
        totals: float64 (3,) on the device: sum of losses, correct predictions and images of this
            process since they were last set to 0. Reading it waits for the device.
    """

    def __init__(self, config: Config, network: Network, device: torch.device):
        self.config = config
        self.network = network.to(device)
        self.averaged = copy.deepcopy(self.network).eval() if config.ema_decay else None
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)

    def networks(self) -> Iterator[tuple[str, Network]]:
        """The network and its average, where there is one, by name."""
        yield "network", self.network
        if self.averaged is not None:
            yield "averaged", self.averaged

    def best_network(self) -> Network:
        """The network to evaluate and keep: the averaged one where there is one."""
        return self.network if self.averaged is None else self.averaged

    def move_average(self) -> None:
        """Moves the averaged weights and statistics one step towards the network's."""
        if self.averaged is not None:
            theirs, ours = floats(self.averaged), floats(self.network)
            torch._foreach_lerp_(theirs, ours, 1 - self.config.ema_decay)

    def gradient_norm(self) -> float | None:
        """Euclidean norm of the last step's gradient; it waits for the device.

        None before the first step.
        """
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else None

    def save(self, optimizer_state: OptimizerState) -> dict[str, Tensor]:
        """Weights, statistics, averages and the optimiser's state by name, copied to the CPU."""
        found = {
            f"{kind}/{name}": tensor
            for kind, network in self.networks()
            for name, tensor in network.state_dict().items()
        }
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in (found | tensors_by_name(optimizer_state)).items()
        }

    def load(self, tensors: dict[str, Tensor], optimizer_state: OptimizerState) -> None:
        """Sets, in place, what `save` returned; the step must be told by `parameters_changed`."""
        for kind, network in self.networks():
            prefix = f"{kind}/"
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            network.load_state_dict(own)
        for name, tensor in tensors_by_name(optimizer_state).items():
            tensor.copy_(tensors[name])  # in place: a captured step knows the address

    def start_over(self, seed: int, runtime: Runtime, optimizer_state: OptimizerState) -> None:
        """Sets a seed's fresh weights, statistics and generators, in place, as `load` does."""
        runtime.seed(seed)
        fresh = build_network(self.config.network, self.config.dropout).state_dict()
        blank = {name: torch.zeros_like(t) for name, t in tensors_by_name(optimizer_state).items()}
        kinds = [kind for kind, _ in self.networks()]
        named = {f"{kind}/{name}": t for name, t in fresh.items() for kind in kinds}
        self.load(named | blank, optimizer_state)
        self.totals.zero_()
        runtime.seed_process(seed)


def floats(network: nn.Module) -> list[Tensor]:
    """Parameters and floating-point buffers."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    return [parameter.data for parameter in network.parameters()] + buffers


def tensors_by_name(optimizer_state: OptimizerState) -> dict[str, Tensor]:
    """The optimiser's tensors by name."""
    return {
        f"optimizer/{index}/{name}": tensor
        for index, kept in enumerate(optimizer_state)
        for name, tensor in kept.items()
        if tensor is not None
    }


@contextlib.contextmanager
def unchanged(state: TrainState, optimizer_state: OptimizerState) -> Iterator[None]:
    """Restores all that training changes, and the generators, at the end of the block."""
    tensors = [
        *(t.data for _, network in state.networks() for t in network.parameters()),
        *(t for _, network in state.networks() for t in network.buffers()),
        *tensors_by_name(optimizer_state).values(),
        state.totals,
    ]
    kept = [tensor.clone() for tensor in tensors]
    device = state.totals.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)


class Step(Protocol):
    """A step mode: one way to run a training step.

    Attributes:
        name: as `--step` names it.
        devices: types of the devices that it runs on.
        precisions: that it supports.
        min_images: with fewer in a run, setting the mode up costs more than it saves.
        threads_change_no_bit: whether the result is the same for any number of CPU threads.
        optimizer_state: what the optimiser keeps of each parameter.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]]
    precisions: ClassVar[frozenset[str]]
    min_images: ClassVar[int]
    threads_change_no_bit: ClassVar[bool]
    optimizer_state: OptimizerState

    @staticmethod
    def unsupported_reason(job: Job) -> str | None:
        """Why the mode cannot run the job, in words; None where it can.

        Device type and precision have been checked.
        """

    def __init__(self, job: Job, state: TrainState, runtime: Runtime) -> None:
        """Sets the mode up for a job; it trains the state."""

    def warm_up(self, example: Batch) -> None:
        """Compiles and captures; changes nothing that training depends on.

        Call it while no other thread uses the GPU: CUDA forbids that during a capture.

        Args:
            example: a whole batch in the feed's form, with any content. The step may keep its
                tensors.
        """

    def run(self, batch: Batch, settings: Settings) -> None:
        """Trains on this process's part of a global batch; does not wait for the device."""

    def parameters_changed(self) -> None:
        """Call it after the parameters were changed from outside."""

    def close(self) -> None:
        """Releases graphs and modules; call it before the process group is destroyed."""


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


class Augmentation:
    """Makes inputs of images, with one epoch's draws.

    What differs from step to step lies in tensors, whose addresses a CUDA graph can hold.

    Args:
        job: of the run.
        compiled: whether whole batches go through compiled code on a GPU. A smaller last one does
            not, and on CPUs the eager kernels are the faster ones.
    """

    def __init__(self, job: Job, compiled: bool = False):
        self._config, self._size = job.config, job.sharding.local_size
        self._key = torch.zeros((), dtype=torch.int64, device=job.device)
        self._position = torch.zeros((), dtype=torch.int64, device=job.device)
        self._offsets = torch.arange(self._size, device=job.device)
        self._key_written = 0
        self._augment_whole = augment
        if compiled and job.device.type == "cuda":
            build.prepare_inductor(job.device.type)
            self._augment_whole = torch.compile(augment, dynamic=False)

    def set(self, position: int, key: int) -> None:
        """Sets the place of the next batch in its epoch, and the key of the epoch's draws."""
        self._position.fill_(position)
        if key != self._key_written:
            self._key.fill_(key)
            self._key_written = key

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented and normalised images, float32 (n, 1, 28, 28), of uint8 ones."""
        positions = self._position + self._offsets[: len(images)]
        function = self._augment_whole if len(images) == self._size else augment
        return function(self._config, images, positions, self._key)


class BackpropStep:
    """A step by torch's backpropagation, of which modes replace parts.

    `run` writes the settings to where `body` reads them. What differs from step to step lies in
    tensors, whose addresses a CUDA graph can hold.

    Attributes:
        compiled: whether the mode lets torch compile the augmentation.
    """

    compiled: ClassVar[bool] = False

    def __init__(self, job: Job, state: TrainState, runtime: Runtime):
        self.job, self.state, self.runtime = job, state, runtime
        self.config = job.config
        self.place_networks()
        self._parameters = list(state.network.parameters())  # a walk through modules takes 0.1 ms
        self._settings = Settings(0.0, 0, 0, augmented=True)
        self._rate = torch.zeros((), device=job.device)
        self._augmentation = Augmentation(job, self.compiled)
        self.optimizer_state = self.set_up_optimizer()

    def place_networks(self) -> None:
        """Puts the networks into the form that the mode computes with."""
        for _, network in self.state.networks():
            network.to(memory_format=torch.channels_last)

    def set_up_optimizer(self) -> OptimizerState:
        """Builds the optimiser, with the state that its first step would create."""
        self.optimizer = build_optimizer(self.config, self._parameters)
        self.wrap()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        for parameter in self._parameters:
            self.optimizer.state[parameter].update(first_state(self.config, parameter))
        return [self.optimizer.state[parameter] for parameter in self._parameters]

    def wrap(self) -> None:
        """Wraps network and optimiser where a mode needs it, before rate and state are set."""

    def warm_up(self, example: Batch) -> None:
        """Does nothing: there is nothing to compile."""

    def run(self, batch: Batch, settings: Settings) -> None:
        """Trains on this process's part of a global batch; does not wait for the device."""
        self.write_settings(batch, settings)
        self.body(batch)

    def write_settings(self, batch: Batch, settings: Settings) -> None:
        """Writes the settings into the tensors that the next step reads."""
        self._rate.fill_(settings.learning_rate)
        self._augmentation.set(batch.position, settings.augment_key)
        self._settings = settings

    def body(self, batch: Batch) -> None:
        """One step with the settings that were written."""
        inputs, labels = self.inputs(batch), batch.gather_labels()
        counts = self.gradients(inputs, labels, batch)
        self.reduce()
        self.update()
        self.state.totals += counts
        self.state.move_average()

    def inputs(self, batch: Batch) -> Tensor:
        """Augmented and normalised images, float32 (batch, 1, 28, 28)."""
        images = batch.gather_images()
        if not self._settings.augmented:
            return normalise(scale_pixels(images))
        return self._augmentation(images)

    def gradients(self, inputs: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Computes the parameters' gradients; returns the numbers to add to the totals.

        The loss is the global batch's mean: each process's sum is weighted so that the mean of
        the gradients over the processes is exact, also where the parts differ in size.
        """
        self.clear_gradients()
        loss, counts = self.forward(inputs, labels)
        self.runtime.backward(loss * (self.runtime.world_size / batch.global_size))
        return counts

    def clear_gradients(self) -> None:
        """Clears the gradients before a backward pass; until then the last ones can be read."""
        for parameter in self._parameters:
            parameter.grad = None

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses, and the numbers to add to the totals."""
        with self.runtime.autocast():
            log_probabilities = self.predict(inputs)
        loss = sum_of_losses(log_probabilities, labels, self.config.label_smoothing)
        hits = (log_probabilities.argmax(1) == labels).sum()
        count = torch.full_like(hits, len(labels))
        return loss, torch.stack([loss.detach().double(), hits.double(), count.double()])

    def predict(self, inputs: Tensor) -> Tensor:
        """Log-probabilities (batch, classes)."""
        return self.state.network(inputs)

    def reduce(self) -> None:
        """Averages the gradients over the processes."""
        self.runtime.average([p.grad for p in self._parameters if p.grad is not None])

    def update(self) -> None:
        """Takes the optimiser's step."""
        self.optimizer.step()

    def parameters_changed(self) -> None:
        """Does nothing: parameters are read in place."""

    def close(self) -> None:
        """Does nothing: there is nothing to release."""
