"""One training step: augment, forward, loss, backward, gradient reduction, SGD."""

import copy
import shutil

import torch
from torch import Tensor, nn

from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.data import Batch, Sharding
from mnist_fast.model import Network
from mnist_fast.runtime import Runtime

COMPILE_FROM_IMAGES = (
    400_000  # fewer than this over the run, and compiling costs more than it gives
)


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


def build_optimizer(config: Config, network: nn.Module) -> torch.optim.SGD:
    """SGD over all parameters, in one fused kernel."""
    return torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def resolve_mode(config: Config, precision: str, images_per_epoch: int) -> str:
    """The step mode: compiled where that pays and a compiler is at hand, else eager.

    fp16 is always eager: its loss scaling decides on the host whether a step is taken.
    """
    if precision == "fp16":
        return "eager"
    if config.step != "auto":
        return config.step
    pays = config.epochs * images_per_epoch >= COMPILE_FROM_IMAGES
    able = torch.cuda.is_available() or any(map(shutil.which, ("g++", "c++", "clang++")))
    return "compiled" if pays and able else "eager"


class TrainingStep:
    """Trains the network on one batch per call.

    Attributes:
        network: the bare network, on the device.
        averaged: its exponential moving average, or None.
        totals: float64 (3,) on the device: sum of losses, correct predictions and images of this
            process since `reset_totals`. Reading it is the only thing that waits for the device.
    """

    def __init__(self, config: Config, network: Network, runtime: Runtime, sharding: Sharding):
        self.config, self.runtime, self.sharding = config, runtime, sharding
        self.mode = resolve_mode(config, runtime.precision, sharding.samples)
        network = network.to(runtime.device).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(network).eval() if config.ema_decay else None
        self.optimizer = build_optimizer(config, network)
        if self.mode == "eager":
            self._forward_network, self._stepper = runtime.prepare(network, self.optimizer)
        else:
            self._forward_network, self._stepper = network, self.optimizer
        self.network = network
        self.totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
        self._one = torch.ones((), dtype=torch.float64, device=runtime.device)
        self._key = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self._augmented = True
        self._augment, self._forward = augment, self._forward_rest
        if self.mode == "compiled":
            self._forward = torch.compile(self._forward_rest, dynamic=False)
            if runtime.device.type == "cuda":  # on CPUs the eager kernels are the faster ones
                self._augment = torch.compile(augment, dynamic=False)

    def start_epoch(self, epoch: int) -> None:
        """Sets the epoch whose augmentation is drawn."""
        self._key.fill_(derive_key(self.config.seed, epoch, "augment"))
        self._augmented = epoch < self.config.epochs - self.config.plain_epochs
        self._forward_network.train()

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Trains on this process's part of a global batch.

        The loss is the global batch's mean: each process's sum is weighted so that the mean of
        the gradients over the processes is exact, also where the parts differ in size.
        """
        weight = self.runtime.world_size / batch.global_size
        images, labels = batch.gather()
        forward = self._forward if len(batch) == self.sharding.local_size else self._forward_rest
        self._stepper.zero_grad()  # not behind the step: `gradient_norm` reads the last ones
        loss, hits = forward(self._prepare_inputs(images, batch.position), labels)
        self.runtime.backward(loss * weight)
        if self.mode != "eager":
            self.runtime.average_gradients(self.network)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._stepper.step()
        self.totals += torch.stack([loss.detach().double(), hits.double(), self._one * len(batch)])
        self._average()

    def _prepare_inputs(self, images: Tensor, position: int) -> Tensor:
        """Augmented and normalised inputs; `position` is that of the first image in the epoch."""
        if not self._augmented:
            return normalise(scale_pixels(images))
        positions = torch.arange(position, position + len(images), device=images.device)
        return self._augment(self.config, images, positions, self._key)

    def _forward_rest(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses and number of correct predictions; never compiled, for any batch size."""
        with self.runtime.autocast():
            log_probabilities = self._forward_network(inputs)
        loss = sum_of_losses(log_probabilities, labels, self.config.label_smoothing)
        return loss, (log_probabilities.argmax(1) == labels).sum()

    def _average(self) -> None:
        """Moves the averaged weights and statistics one step towards the network's."""
        if self.averaged is not None:
            theirs, ours = floats(self.averaged), floats(self.network)
            torch._foreach_lerp_(theirs, ours, 1 - self.config.ema_decay)

    def warm_up(self) -> None:
        """Compiles on a blank batch; weights, statistics and generators stay as they were."""
        if self.mode == "eager":
            return
        state = [*self.network.parameters(), *self.network.buffers()]
        kept = [tensor.detach().clone() for tensor in state]
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            size = self.sharding.local_size
            images = torch.zeros(size, 1, 28, 28, dtype=torch.uint8, device=self.runtime.device)
            labels = torch.zeros(size, dtype=torch.int64, device=self.runtime.device)
            self._forward(self._prepare_inputs(images, 0), labels)[0].backward()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(state, kept)

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics, momentum and averages by name, copied to the CPU."""
        found = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        if self.averaged is not None:
            found |= {f"averaged/{k}": v for k, v in self.averaged.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters()):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                found[f"momentum/{index}"] = momentum
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
        for index, parameter in enumerate(self.network.parameters()):
            if f"momentum/{index}" in tensors:
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum/{index}"])
                self.optimizer.state[parameter]["momentum_buffer"] = momentum

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
