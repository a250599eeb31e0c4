"""One training step against the same step written out in plain torch; eager against compiled."""

import copy
import dataclasses
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stepping import Trained, plan_of

from data_prep.sources import load_digits
from mnist_fast import steps
from mnist_fast.augment import augment, derive_key, normalise, scale_pixels
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding
from mnist_fast.errors import InputError
from mnist_fast.kernels import build, cpu
from mnist_fast.model import build_network
from mnist_fast.runtime import Runtime
from mnist_fast.steps.base import TrainState, sum_of_losses

SHARDING = Sharding(300, 64, drop_last=False)  # 4 batches of 64 and one of 44
RATES = [0.05, 0.1, 0.02, 0.08, 0.03]
PLAIN = Config(step="eager", precision="no", dropout=0.0, batch_size=64, epochs=4, momentum=0.9)
AUGMENTED = dataclasses.replace(PLAIN, rotation=15, translate=0.1, brightness=0.3, fill=3)


@pytest.fixture(scope="module")
def feed():
    """The first 300 digits, with noise.

    On an even background thousands of activations are the same number, and where that is about 0,
    rounding decides for all of them at once whether ReLU passes their gradients.
    """
    source = load_digits()
    noise = np.random.default_rng(0).integers(0, 60, (300, 28, 28), dtype=np.uint8)
    images = torch.from_numpy(np.maximum(source.train_images[:300], noise)).unsqueeze(1)
    labels = torch.from_numpy(source.train_labels[:300]).long()
    return ResidentFeed(images, labels, SHARDING, seed=1)


def new_step(config, runtime, seed=0):
    torch.manual_seed(seed)
    return Trained(config, build_network("notebook", config.dropout), runtime, SHARDING)


def train_epoch(step, feed, epoch=0, slower=1):
    step.start_epoch(epoch)
    for batch, rate in zip(feed.epoch(epoch), RATES, strict=True):
        step(batch, rate / slower)


def weights(network):
    """Parameters and statistics in one vector."""
    return torch.cat([t.detach().flatten().double() for t in network.state_dict().values()])


class Plain:
    """The training epoch as a text book has it."""

    def __init__(self, config, seed=0):
        torch.manual_seed(seed)
        self.config = config
        # the layout decides how BatchNorm's sums are rounded
        network = build_network("notebook", config.dropout)
        self.network = network.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network)
        parameters, decay = self.network.parameters(), config.weight_decay
        if config.optimizer == "adamw":
            betas = (config.momentum, config.beta2)
            self.optimizer = torch.optim.AdamW(parameters, 1.0, betas, weight_decay=decay)
        else:
            self.optimizer = torch.optim.SGD(
                parameters, 1.0, config.momentum, nesterov=config.nesterov, weight_decay=decay
            )
        self.loss = self.hits = self.images = 0

    def train_epoch(self, feed, epoch=0):
        config = self.config
        self.network.train()
        for batch, rate in zip(feed.epoch(epoch), RATES, strict=True):
            images, labels = batch.gather()
            positions = torch.arange(batch.position, batch.position + len(images))
            key = torch.tensor(derive_key(config.seed, epoch, "augment"))
            logits = self.network.logits(augment(config, images, positions, key))
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss += loss.item() * len(images)
            self.hits += (logits.argmax(1) == labels).sum().item()
            self.images += len(images)
            self._average()

    def _average(self):
        decay = self.config.ema_decay
        pairs = zip(
            self.averaged.state_dict().values(), self.network.state_dict().values(), strict=True
        )
        for mean, value in pairs:
            if mean.is_floating_point():
                mean.copy_(decay * mean + (1 - decay) * value)


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_torchs(smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    ours = sum_of_losses(logits.log_softmax(1), labels, smoothing)
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    if not smoothing:
        theirs = F.nll_loss(logits.log_softmax(1), labels, reduction="sum")
        torch.testing.assert_close(ours, theirs)


# Eager


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True, "weight_decay": 5e-3},
        {"label_smoothing": 0.2},
        {"ema_decay": 0.6},
    ],
    ids=lambda choices: "-".join(choices) or "plain",
)
def test_a_step_is_the_one_of_the_text_book(runtime, feed, choices):
    """Weights, statistics, averages and totals after an epoch, with its smaller last batch."""
    config = dataclasses.replace(AUGMENTED, **choices)
    ours, plain = new_step(config, runtime), Plain(config)
    train_epoch(ours, feed)
    plain.train_epoch(feed)
    torch.testing.assert_close(weights(ours.network), weights(plain.network), rtol=1e-4, atol=1e-5)
    loss, hits, images = ours.totals.tolist()
    assert (hits, images) == (plain.hits, plain.images) == (plain.hits, 300)
    assert loss == pytest.approx(plain.loss, rel=1e-4)
    if config.ema_decay:
        averaged = weights(plain.averaged)
        torch.testing.assert_close(weights(ours.averaged)[:-1], averaged[:-1], rtol=1e-4, atol=1e-5)
        assert ours.best_network() is ours.averaged
        assert not ours.averaged.training
    else:
        assert ours.averaged is None
        assert ours.best_network() is ours.network


def test_without_augmentation_the_inputs_are_only_normalised(runtime, feed):
    """Seen from outside: the step is that on images which were normalised by hand."""
    step, plain = new_step(PLAIN, runtime), Plain(PLAIN)
    train_epoch(step, feed)
    plain.network.train()
    for batch, rate in zip(feed.epoch(0), RATES, strict=True):
        images, labels = batch.gather()
        loss = F.nll_loss(plain.network(normalise(scale_pixels(images))), labels)
        plain.optimizer.param_groups[0]["lr"] = rate
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
    torch.testing.assert_close(weights(step.network), weights(plain.network), rtol=1e-4, atol=1e-5)


def test_totals_start_anew_when_told(runtime, feed):
    step = new_step(PLAIN, runtime)
    train_epoch(step, feed)
    step.reset_totals()
    assert step.totals.tolist() == [0, 0, 0]
    assert step.totals.dtype == torch.float64


def test_the_last_epochs_may_be_without_augmentation(runtime, feed):
    """Of 4 epochs the last 2: epoch 1 is augmented, epoch 2 is not."""
    config = dataclasses.replace(AUGMENTED, plain_epochs=2)
    for epoch, like in ((1, AUGMENTED), (2, PLAIN)):
        ours, other = new_step(config, runtime), new_step(like, runtime)
        train_epoch(ours, feed, epoch)
        train_epoch(other, feed, epoch)
        assert torch.equal(weights(ours.network), weights(other.network))
    differ = new_step(AUGMENTED, runtime)
    train_epoch(differ, feed, 2)
    assert not torch.equal(weights(differ.network), weights(other.network))


def test_dropout_draws_anew_in_each_step_and_repeats_with_the_seed(runtime, feed):
    config = dataclasses.replace(PLAIN, dropout=0.3)

    def run(seed):
        step = new_step(config, runtime)
        runtime.seed_process(seed)
        train_epoch(step, feed)
        return weights(step.network)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_adamw_is_the_one_of_the_text_book(runtime):
    """On gradients that are the same to the bit: it turns the sign of rounding into whole steps."""
    config = dataclasses.replace(PLAIN, optimizer="adamw", weight_decay=0.1, beta2=0.9)
    ours, plain = new_step(config, runtime), Plain(config)
    for rate in RATES:
        for mine, other in zip(ours.network.parameters(), plain.network.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step._rate.fill_(rate)
        plain.optimizer.param_groups[0]["lr"] = rate
        ours.step.optimizer.step()
        plain.optimizer.step()
    torch.testing.assert_close(weights(ours.network), weights(plain.network), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "choices",
    [
        *({"ema_decay": 0.9}, {"momentum": 0.0}, {"nesterov": True}),
        *({"optimizer": "adamw"}, {"optimizer": "muon"}),
    ],
)
def test_the_state_is_all_that_a_step_needs(runtime, feed, choices):
    config = dataclasses.replace(AUGMENTED, **choices)
    whole = new_step(config, runtime)
    train_epoch(whole, feed)
    kept = {name: tensor.clone() for name, tensor in whole.state().items()}
    train_epoch(whole, feed, 1)

    other = new_step(config, runtime, seed=99)
    other.load_state(kept)
    train_epoch(other, feed, 1)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    assert not torch.equal(kept["network/layers.0.weight"], whole.network.layers[0].weight)


def test_bf16_is_the_same_step_in_fewer_digits(in_process, feed):
    config = dataclasses.replace(PLAIN, precision="bf16", ema_decay=0.5)
    step, plain = new_step(config, Runtime(config)), Plain(config)
    train_epoch(step, feed)
    plain.train_epoch(feed)
    assert all(parameter.dtype == torch.float32 for parameter in step.network.parameters())
    difference = (weights(step.network) - weights(plain.network)).abs()
    assert 0 < difference.mean() < 0.05
    assert step.totals[0].item() == pytest.approx(plain.loss, rel=0.05)


@pytest.mark.parametrize(
    ("choice", "precision", "images", "compiler", "expected"),
    [
        ("auto", "no", 60_000, True, "native"),
        ("auto", "bf16", 60_000, True, "compiled"),
        ("auto", "no", 60_000, False, "eager"),
        ("auto", "no", 1_437, True, "eager"),
        ("eager", "no", 60_000, True, "eager"),
        ("compiled", "no", 1_437, True, "compiled"),
    ],
)
def test_the_mode_follows_choice_precision_size_and_compiler(
    monkeypatch, choice, precision, images, compiler, expected
):
    library = SimpleNamespace(lanes=lambda: 8) if compiler else None
    monkeypatch.setattr(build, "cpp_compiler", lambda: "g++" if compiler else None)
    monkeypatch.setattr(cpu, "try_library", lambda: (library, "there is no C++ compiler"))
    config, network = Config(step=choice, epochs=15, precision=precision), build_network()
    found = plan_of(config, Sharding(images, 128, True), network=network)
    assert (found.mode.name, found.job.precision) == (expected, precision)
    if expected == "native":  # its vectors hold 8 images
        other = plan_of(config, Sharding(images, 100, True), network=network)
        assert other.mode.name == "compiled"
        assert "native, because it computes multiples of 8 images, not 100" in other.describe()


def processes(*told):
    """What `steps.plan` asks of the runtime where each process says something of its own."""
    answers = iter(told)
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda value: next(answers)(value))


def test_a_reason_of_one_process_holds_for_all():
    """A node without a compiler: the modes average gradients differently."""
    runtime = processes(
        lambda v: [v, v], lambda v: [v, "there is no C++ compiler"], lambda v: [v] * 2
    )
    found = steps.plan(Config(), build_network(), runtime, Sharding(60_000, 128, True, 0, 2))
    assert found.mode.name == "compiled"
    assert "native, because on process 1, there is no C++ compiler" in found.describe()


def test_processes_started_with_different_precisions_are_refused():
    runtime = processes(lambda v: [v, ("bf16", False)])
    with pytest.raises(InputError, match=r"different precisions \(None, bf16\)"):
        steps.plan(Config(), build_network(), runtime, Sharding(60_000, 128, True, 0, 2))


def test_several_gpus_with_small_shares_are_told_what_pays():
    note = steps.small_shares(Sharding(60_000, 128, True, 0, 8))
    assert "8 processes share each batch of 128 images, 16 each" in note
    assert "--batch_size 1024" in note
    assert steps.small_shares(Sharding(60_000, 1_024, True, 0, 8)) is None
    assert steps.small_shares(Sharding(60_000, 64, True)) is None


def test_a_launchers_bf16_is_left_where_a_gpu_emulates_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    gpu = SimpleNamespace(multi_processor_count=40, shared_memory_per_block_optin=64 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(build, "why_no_inductor", lambda _: None)
    found = plan_of(Config(), Sharding(60_000, 128, True), "cuda", build_network())
    assert (found.mode.name, found.job.precision) == ("captured", "no")
    assert "The launcher asked for bf16" in found.describe()


def test_the_plans_network_stays_where_kernels_can_describe_it():
    """The run moves its own to the device, in place."""
    network = build_network()
    found = plan_of(Config(step="eager"), Sharding(60_000, 128, True), network=network)
    TrainState(found.job.config, network, torch.device("meta"))
    assert all(p.device.type == "cpu" for p in found.job.network.parameters())


def test_a_cpu_run_on_a_machine_with_a_gpu_trains_natively(monkeypatch, in_process):
    """Mode and precision follow the run's device, not what torch sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runtime = Runtime(Config())
    assert runtime.device.type == "cpu"
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler (g++)")
    found = steps.plan(Config(), build_network(), runtime, Sharding(60_000, 128, True))
    assert (found.mode.name, found.job.precision) == ("native", "no")


# Compiled


def moved(network, start):
    """How far the parameters, and apart from them the statistics, moved from those of `start`."""
    pairs = (
        (network.parameters(), start.parameters()),
        (network.buffers(), start.buffers()),
    )
    return [
        torch.cat([(a - b).detach().flatten() for a, b in zip(new, old, strict=True)])
        for new, old in pairs
    ]


@pytest.mark.timeout(480)
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)")
def test_compiled_is_eager_within_rounding(runtime, feed):
    """And warming up, which compiles, changes nothing that training depends on.

    Over five small steps: at a larger rate, what rounding decides at a ReLU grows tenfold a step.
    """
    config = dataclasses.replace(AUGMENTED, ema_decay=0.5, nesterov=True)
    eager = new_step(config, runtime)
    compiled = new_step(dataclasses.replace(config, step="compiled"), runtime)
    assert (eager.mode, compiled.mode) == ("eager", "compiled")
    start = copy.deepcopy(compiled.network)

    before, random = compiled.state(), torch.get_rng_state()
    compiled.start_epoch(0)
    compiled.warm_up(feed.example())
    for name, tensor in compiled.state().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    assert compiled.totals.tolist() == [0, 0, 0]

    for step in (eager, compiled):
        train_epoch(step, feed, slower=100)
    for one, other in ((eager.network, compiled.network), (eager.averaged, compiled.averaged)):
        for theirs, ours in zip(moved(one, start), moved(other, start), strict=True):
            assert 0 < (ours - theirs).norm() / theirs.norm() < 1e-2
    assert math.isclose(compiled.totals[0].item(), eager.totals[0].item(), rel_tol=1e-5)
    assert compiled.totals[2].item() == eager.totals[2].item() == 300
