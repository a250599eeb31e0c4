"""Many seeds in one program on one device: side by side, or one after another.

A network this small leaves most of a GPU idle, unless its steps are fused. Side by side the N
networks become one with N groups of channels: every convolution is grouped, and BatchNorm, pooling
and SGD work per channel or per weight anyway. So no network sees another, and each does what a run
of its seed alone does: the same initial weights, order and augmentation, the same updates within
rounding. Dropout alone draws other masks. All that changes from step to step lies in device memory,
so that one CUDA graph holds the whole step.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding, epoch_order, keep_for_training, read_all
from mnist_fast.errors import InputError, RunError
from mnist_fast.evaluate import BATCH, evaluate
from mnist_fast.loop import git_commit, open_betons, versions
from mnist_fast.model import CLASSES, Network, build_network, count_parameters
from mnist_fast.runtime import Runtime, device_name, may_fuse, resolve_precision
from mnist_fast.schedule import learning_rate
from mnist_fast.step import CudaGraph, TrainingStep, build_optimizer, floats

Pair = tuple[Tensor, Tensor]  # images uint8 (n, 1, 28, 28) and labels int64 (n,)
Records = list[dict[str, Any]]


class WideNetwork(nn.Module):
    """N networks as one: images (batch, N, 28, 28) to log-probabilities (batch, N, 10).

    Image n of a row goes through network n. A layer's channels are those of network 0, of network
    1 and so on; its parameters and statistics are theirs, one behind the other.
    """

    def __init__(self, networks: Sequence[Network]):
        super().__init__()
        self.count = len(networks)
        layers = zip(*(network.layers for network in networks), strict=True)
        self.layers = nn.Sequential(*(widen(same) for same in layers))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities in float32."""
        logits = self.layers(images).reshape(len(images), self.count, CLASSES)
        return logits.float().log_softmax(dim=2)

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The state dict of one of the networks, as `Network` names and shapes it."""
        return {
            name: tensor.chunk(self.count)[index] if tensor.dim() else tensor
            for name, tensor in self.state_dict().items()
        }


def widen(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer that applies each of N like layers to its own group of channels.

    Raises:
        TypeError: a layer with parameters that is neither a convolution nor a BatchNorm.
    """
    first, count = layers[0], len(layers)
    wide: nn.Module
    if isinstance(first, nn.Conv2d):
        wide = nn.Conv2d(
            first.in_channels * count,
            first.out_channels * count,
            first.kernel_size,  # type: ignore[arg-type]
            stride=first.stride,  # type: ignore[arg-type]
            padding=first.padding,  # type: ignore[arg-type]
            groups=count * first.groups,
            bias=first.bias is not None,
        )
    elif isinstance(first, nn.BatchNorm2d):
        wide = nn.BatchNorm2d(first.num_features * count, first.eps, first.momentum)
    elif first.state_dict():
        raise TypeError(f"{type(first).__name__} cannot be widened: only Conv2d and BatchNorm2d")
    else:
        return copy.deepcopy(first)
    states = [layer.state_dict() for layer in layers]
    wide.load_state_dict(
        {
            name: torch.cat([state[name] for state in states]) if tensor.dim() else tensor
            for name, tensor in states[0].items()
        }
    )
    return wide


class SideBySide:
    """Trains one network per seed, all of them in every step.

    Attributes:
        network: the wide network.
        averaged: its exponential moving average, or None.
        totals: float64 (N, 2) on the device: each network's sum of losses and correct predictions
            in the current epoch.
        captures: whether whole steps are captured in a graph: on GPUs.
    """

    graph_type: Any = CudaGraph

    def __init__(self, config: Config, seeds: Sequence[int], runtime: Runtime, train: Pair):
        self.config, self.seeds, self.runtime = config, list(seeds), runtime
        self.images, self.labels = train
        self.sharding = Sharding(len(self.labels), config.batch_size, config.drop_last)
        device = runtime.device
        network = WideNetwork([self._build(seed) for seed in self.seeds])
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).eval() if config.ema_decay else None
        self.optimizer = build_optimizer(config, self.network, len(self.seeds))
        self._rate = torch.zeros((), device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate
        steps = self.sharding.steps
        rates = [learning_rate(config, step, steps) for step in range(config.epochs * steps)]
        self._rates = torch.tensor(rates, device=device)
        count = len(self.seeds)
        self._step_number = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._keys = torch.zeros(count, dtype=torch.int64, device=device)
        self._order = torch.zeros(count, len(self.labels), dtype=torch.int64, device=device)
        self.totals = torch.zeros(count, 2, dtype=torch.float64, device=device)
        self._augmented = True
        self._forward = self._forward_rest = self._losses
        self._graphs: dict[bool, Any] = {}
        if device.type == "cuda":
            self._forward = torch.compile(self._losses, dynamic=False)
        self.captures = device.type == "cuda"

    def _build(self, seed: int) -> Network:
        self.runtime.seed(seed)
        return build_network(self.config.network, self.config.dropout)

    def orders(self, epoch: int) -> Tensor:
        """The shuffled order of an epoch for every seed, int64 (N, samples), on the host."""
        return torch.stack([epoch_order(s, epoch, len(self.labels)) for s in self.seeds])

    def train_epoch(self, epoch: int, orders: Tensor) -> None:
        """Queues the steps of an epoch; `totals` then hold its losses and hits."""
        self._order.copy_(orders)
        self._keys.copy_(torch.tensor([derive_key(s, epoch, "augment") for s in self.seeds]))
        self._augmented = epoch < self.config.epochs - self.config.plain_epochs
        self._position.zero_()
        self.totals.zero_()
        self.network.train()
        full, rest = divmod(self.sharding.samples, self.config.batch_size)
        step = self._captured() if self.captures else self._step
        for _ in range(full):
            step()
        if rest and not self.config.drop_last:
            self._step(rest)

    def _step(self, size: int = 0) -> None:
        """One step of every network; what it reads and writes stays at its address.

        Args:
            size: images of each network, 0 is a whole batch.
        """
        whole = not size
        size = size or self.config.batch_size
        positions = self._position + torch.arange(size, device=self._position.device)
        # the steps before a capture may run over the end of a short epoch
        rows = self._order.index_select(1, positions % len(self.labels))
        forward = self._forward if whole else self._forward_rest
        losses, hits = forward(self._inputs(rows, positions), self.labels[rows].t())
        (losses.sum() / size).backward()  # no network's weights touch another's loss
        self._rate.copy_(self._rates.index_select(0, self._step_number % len(self._rates))[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.totals += torch.stack([losses.detach(), hits], dim=1)
        self._step_number += 1
        self._position += size
        if self.averaged is not None:
            theirs, ours = floats(self.averaged), floats(self.network)
            torch._foreach_lerp_(theirs, ours, 1 - self.config.ema_decay)

    def _inputs(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Augmented inputs (batch, N, 28, 28) of the images that `rows` (N, batch) names."""
        count, size = rows.shape
        images = self.images[rows.flatten()]
        if self._augmented:
            keys = self._keys.repeat_interleave(size)[:, None]  # each image has its seed's key
            inputs = augment(self.config, images, positions.repeat(count), keys)
        else:
            inputs = normalise(scale_pixels(images))
        wide = inputs.view(count, size, *images.shape[-2:]).transpose(0, 1)
        return wide.contiguous(memory_format=torch.channels_last)

    def _losses(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each network's sum of losses and correct predictions, both (N,)."""
        with self.runtime.autocast():
            scores = self.network(inputs)
        smoothing = self.config.label_smoothing
        losses = F.cross_entropy(
            scores.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
        )
        hits = (scores.argmax(2) == labels).sum(0)
        return losses.view_as(labels).sum(0), hits

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph, captured at its first use; with or without augmentation."""
        if self._augmented not in self._graphs:
            with self._nothing_happened():  # to the weights: a capture is preceded by real steps
                self._graphs[self._augmented] = self.graph_type(self._step)
        return self._graphs[self._augmented].replay

    @contextlib.contextmanager
    def _nothing_happened(self) -> Iterator[None]:
        """Undoes the steps taken within; the optimiser's tensors that came to be are then 0."""
        averaged = self.averaged.state_dict() if self.averaged else {}
        counters = [self.totals, self._step_number, self._position]
        tensors = [*self.network.state_dict().values(), *averaged.values(), *counters]
        kept = [tensor.clone() for tensor in [*tensors, *self._optimizer_tensors().values()]]
        before = len(self._optimizer_tensors())
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield
        after = list(self._optimizer_tensors().values())
        with torch.no_grad():
            torch._foreach_copy_([*tensors, *after[:before]], kept)
            for tensor in after[before:]:
                tensor.zero_()

    def _optimizer_tensors(self) -> dict[tuple[int, str], Tensor]:
        """Momentum buffers and the like, by parameter and name."""
        return {
            (index, name): value
            for index, state in enumerate(self.optimizer.state.values())
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    @torch.inference_mode()
    def evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        """Each network's sum of losses and correct predictions, float64 (N, 2), in float32.

        Args:
            images: uint8 (n, 1, 28, 28).
            labels: int64 (n,).
        """
        network = (self.network if self.averaged is None else self.averaged).eval()
        totals = torch.zeros_like(self.totals)
        size = max(1, 8 * BATCH // len(self.seeds))
        for part, truth in zip(images.split(size), labels.split(size), strict=True):
            same = normalise(scale_pixels(part)).expand(-1, len(self.seeds), -1, -1)
            scores = network(same.contiguous(memory_format=torch.channels_last))
            losses = -scores.gather(2, truth[:, None, None].expand(-1, len(self.seeds), 1))
            hits = scores.argmax(2) == truth[:, None]
            totals += torch.stack([losses.double().sum((0, 2)), hits.sum(0)], dim=1)
        return totals

    def state_of(self, index: int) -> dict[str, Tensor]:
        """Weights and statistics of one network as they are evaluated, for `Network`."""
        return (self.network if self.averaged is None else self.averaged).state_of(index)


def train_many(
    config: Config,
    seeds: Sequence[int],
    on_epoch: Callable[[int, Records], None] | None = None,
) -> tuple[Records, SideBySide]:
    """Trains one network per seed, side by side, in one process on one device.

    Args:
        config: one run's choices; its seed is not used, its run_dir neither.
        seeds: one per network.
        on_epoch: is called after every epoch with its number from 1 and one record per seed; what
            it raises ends the training.

    Returns:
        One summary per seed, with the keys of a single run's `summary.json` that apply, and the
        trained networks. `train_seconds` are those of all seeds together.

    Raises:
        InputError: bad configuration or data; several processes; fp16; tta.
        RunError: no network has a finite loss left.
    """
    runtime = Runtime(dataclasses.replace(config, step="captured"))
    if runtime.world_size > 1 or runtime.precision == "fp16":
        raise InputError("seeds side by side train in one process and in bf16 or float32")
    if config.tta:
        raise InputError("--tta is not there for seeds side by side: --side_by_side false")
    started = time.perf_counter()
    train, evaluation, dataset = read_data(config, runtime)
    together = SideBySide(config, seeds, runtime, train)
    torch.manual_seed(derive_key(together.seeds[0], 0, "process"))  # dropout
    history: list[Records] = []
    begun = time.perf_counter()
    orders = together.orders(0)
    for epoch in range(1, config.epochs + 1):
        together.train_epoch(epoch - 1, orders)
        measured = together.evaluate(*evaluation)
        if epoch < config.epochs:
            orders = together.orders(epoch)  # while the device is still at work
        given = (config, together.sharding, together.seeds, together.totals, measured)
        history.append(make_records(*given, epoch, len(evaluation[1])))
        if on_epoch is not None:
            on_epoch(epoch, history[-1])
    seconds = {"train_seconds": time.perf_counter() - begun, "startup_seconds": begun - started}
    parameters = count_parameters(together.network) // len(together.seeds)
    facts = shared_facts(config, runtime, dataset, parameters)
    facts["side_by_side"] = len(together.seeds)
    return [summarise(config, seed, facts | seconds, history) for seed in together.seeds], together


def fuses(config: Config) -> bool:
    """Whether steps are to be fused, so that seeds are best trained one after another."""
    may = may_fuse(config)
    return may and not config.tta and resolve_precision(config.precision, may) == "no"


def train_in_turn(
    config: Config,
    seeds: Sequence[int],
    on_epoch: Callable[[int, Records], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains one network per seed, one after another, in the same compiled step.

    A fused step leaves no multiprocessor idle, so that nothing is gained side by side; but a
    program starts and compiles once.

    Args:
        config: one run's choices; its seed is not used, its run_dir neither.
        seeds: one per network.
        on_epoch: as for `train_many`, with the one record of the seed that is trained.

    Yields:
        Each seed's summary when it is trained, with the keys of `train_many`'s.

    Raises:
        InputError: bad configuration or data.
        RunError: some seeds' loss was not finite; the others are trained.
    """
    started = time.perf_counter()
    runtime = Runtime(config)
    train, evaluation, dataset = read_data(config, runtime)
    sharding = Sharding(len(train[1]), config.batch_size, config.drop_last)
    network = build_network(config.network, config.dropout)
    step = TrainingStep(config, network, runtime, sharding)
    step.warm_up(ResidentFeed(*train, sharding, config.seed).example())
    facts = shared_facts(config, runtime, dataset, count_parameters(network))
    facts["step"] = step.mode
    lost: list[int] = []
    for seed in seeds:
        begun = time.perf_counter()
        step.start_over(seed)
        feed = ResidentFeed(*train, sharding, seed)
        try:
            history, seconds = train_seed(step, feed, evaluation, on_epoch)
        except RunError:
            lost.append(seed)
            continue
        times = {"train_seconds": seconds, "startup_seconds": begun - started}
        yield summarise(config, seed, facts | times, history)
        started = time.perf_counter()
    if lost:
        names = ", ".join(map(str, lost))
        raise RunError(f"the loss is not finite with seed {names}: lower --learning_rate")


def train_seed(
    step: TrainingStep,
    feed: ResidentFeed,
    evaluation: Pair,
    on_epoch: Callable[[int, Records], None] | None,
) -> tuple[list[Records], float]:
    """Trains all epochs of the step's seed; its records by epoch, and seconds of training."""
    config, count = step.config, len(evaluation[1])
    history: list[Records] = []
    seconds = 0.0
    for epoch in range(1, config.epochs + 1):
        totals, taken = train_epoch(step, feed, epoch - 1)
        seconds += taken
        found = evaluate(step.best_network(), *evaluation, step.runtime, count)
        hits = round(found.accuracy / 100 * count)
        measured = torch.tensor([[found.loss * count, hits]], dtype=torch.float64)
        given = (config, feed.sharding, [config.seed], totals, measured)
        history.append(make_records(*given, epoch, count))
        if on_epoch is not None:
            on_epoch(epoch, history[-1])
    return history, seconds


def train_epoch(step: TrainingStep, feed: ResidentFeed, epoch: int) -> tuple[Tensor, float]:
    """Trains an epoch; sum of losses and correct predictions (1, 2) on the CPU, and seconds."""
    begun = time.perf_counter()
    step.reset_totals()
    take_steps(step, feed, epoch)
    totals = step.totals[None, :2].cpu()  # waits for the device
    return totals, time.perf_counter() - begun


def take_steps(step: TrainingStep, feed: ResidentFeed, epoch: int) -> None:
    """Takes an epoch's steps; does not wait for the device."""
    steps = feed.sharding.steps
    step.start_epoch(epoch)
    for number, batch in enumerate(feed.epoch(epoch), start=epoch * steps):
        step(batch, learning_rate(step.config, number, steps))


def shared_facts(config: Config, runtime: Runtime, dataset: str, parameters: int) -> dict[str, Any]:
    """What is the same in the summaries of all seeds."""
    return {
        "dataset": dataset,
        "device": device_name(runtime.device),
        "precision": runtime.precision,
        "parameters": parameters,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def read_data(config: Config, runtime: Runtime) -> tuple[Pair, Pair, str]:
    """Training and evaluation images on the device, and the data set's name."""
    manifest, folder = open_betons(config, runtime)
    total, held_out = manifest.train.samples, config.validation_split
    kept = keep_for_training(total, held_out)
    file, rows = manifest.test.file, range(manifest.test.samples)
    if held_out:  # the test images are not even opened
        file, rows = manifest.train.file, range(kept, total)
    train = read_all(folder / manifest.train.file, range(kept), runtime.device)
    return train, read_all(folder / file, rows, runtime.device), manifest.dataset


def evaluated_on(config: Config) -> str:
    """What a run is evaluated on, as its records name it: test or validation."""
    return "validation" if config.validation_split else "test"


def make_records(
    config: Config,
    trained: Sharding,
    seeds: Sequence[int],
    totals: Tensor,
    measured: Tensor,
    epoch: int,
    images: int,
) -> Records:
    """One record of an epoch per seed, named as in `metrics.jsonl`.

    Args:
        config: the runs' choices.
        trained: what an epoch trains on.
        seeds: one per network.
        totals: sum of losses and correct predictions in training, float64 (N, 2).
        measured: the same in evaluation.
        epoch: its number, from 1.
        images: that were evaluated.

    Raises:
        RunError: no loss is finite.
    """
    count = min(trained.samples, trained.steps * trained.batch_size)
    name = evaluated_on(config)
    pairs = zip(totals.tolist(), measured.tolist(), strict=True)
    records = [
        {
            "epoch": epoch,
            "seed": seed,
            "train_loss": loss / count,
            "train_accuracy": 100 * hits / count,
            f"{name}_loss": test_loss / images,
            f"{name}_accuracy": 100 * test_hits / images,
        }
        for seed, ((loss, hits), (test_loss, test_hits)) in zip(seeds, pairs, strict=True)
    ]
    if not any(math.isfinite(record["train_loss"]) for record in records):
        raise RunError(f"no loss is finite in epoch {epoch}, of any seed: lower --learning_rate")
    return records


def summarise(
    config: Config, seed: int, facts: dict[str, Any], history: list[Records]
) -> dict[str, Any]:
    """A seed's summary, named as in `summary.json`."""
    mine = [record for records in history for record in records if record["seed"] == seed]
    name = evaluated_on(config)
    best = max(mine, key=lambda record: record[f"{name}_accuracy"])
    return facts | {
        "recipe": config.recipe,
        "seed": seed,
        "epochs": config.epochs,
        f"{name}_accuracy": mine[-1][f"{name}_accuracy"],
        f"{name}_loss": mine[-1][f"{name}_loss"],
        f"best_{name}_accuracy": best[f"{name}_accuracy"],
        "best_epoch": best["epoch"],
        "records": mine,
    }
