"""Native code for CPUs against torch, and what happens where it cannot be had."""

import copy
import dataclasses
import os
import platform
import shutil
import subprocess
import sys

import helpers
import pytest
import torch
from stepping import Trained, plan_of
from torch import nn

from mnist_fast import augment
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding
from mnist_fast.errors import InputError
from mnist_fast.kernels import abi, build, cpu
from mnist_fast.model import NETWORKS, Network, build_network
from mnist_fast.optim import FlatSGD
from mnist_fast.steps.base import sum_of_losses

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)"),
]
BATCH = 48


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(BATCH, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def built(name, dropout=0.0):
    """A network whose BatchNorms differ from the identity."""
    torch.manual_seed(3)
    network = build_network(name, dropout)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.train()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_statistics_and_counts_are_torchs(name, smoothing, batch):
    network = built(name)
    reference = copy.deepcopy(network).double()
    found = cpu.NativeNetwork(network).backpropagate(*batch, 1 / BATCH, smoothing, 1, 0)

    scores = reference.layers(batch[0].double()).flatten(1).log_softmax(1)
    loss = sum_of_losses(scores, batch[1], smoothing)
    (loss / BATCH).backward()
    assert found[0] == pytest.approx(loss.item(), rel=1e-5)
    assert found[1] == (scores.argmax(1) == batch[1]).sum()
    largest = max(parameter.grad.abs().max() for parameter in reference.parameters())
    for (label, ours), theirs in zip(
        network.named_parameters(), reference.parameters(), strict=True
    ):
        error = (ours.grad - theirs.grad).norm()
        assert error < 1e-4 * theirs.grad.norm() + 1e-6 * largest, label
    for (label, ours), theirs in zip(network.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5, msg=label)


@pytest.mark.parametrize("count", [1, 13, BATCH])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_torchs_for_any_number_of_images(name, count, batch):
    network = built(name, dropout=0.3)
    logits = cpu.NativeNetwork(network).eval().logits(batch[0][:count])
    with torch.inference_mode():
        expected = network.eval().logits(batch[0][:count])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_changes_no_bit(batch):
    kept = []
    for threads in (1, 2, 5):
        network = built("notebook", dropout=0.1)
        code = cpu.NativeNetwork(network, threads)
        totals = code.backpropagate(*batch, 1.0, 0.0, 5, 128)
        kept.append((totals, [p.grad for p in network.parameters()], list(network.buffers())))
    for totals, gradients, buffers in kept[1:]:
        assert totals == kept[0][0]
        for ours, first in zip([*gradients, *buffers], [*kept[0][1], *kept[0][2]], strict=True):
            assert torch.equal(ours, first)


def test_a_loss_that_is_not_a_number_stays_one(batch):
    network = built("notebook")
    with torch.no_grad():
        network.layers[0].weight[0] = float("nan")
    loss, _ = cpu.NativeNetwork(network).backpropagate(*batch, 1.0, 0.0, 1, 0)
    assert loss != loss


# Dropout


def test_dropout_drops_the_expected_share():
    """Seen through means of 196 units, each 0 or 1 / (1 - p)."""
    p = 0.25
    layers = [nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Dropout(p), nn.AvgPool2d(14)]
    layers += [nn.Conv2d(8, 10, 1, bias=False), nn.BatchNorm2d(10), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(10, 10, 1, bias=False)]
    nn.init.zeros_(layers[1].weight)
    nn.init.ones_(layers[1].bias)
    network = Network(layers).train()
    inputs, labels = torch.zeros(480, 1, 28, 28), torch.zeros(480, dtype=torch.int64)
    cpu.NativeNetwork(network).backpropagate(inputs, labels, 1.0, 0.0, 9, 0)
    weight, statistics = layers[4].weight.detach().flatten(1), layers[5]
    mean = statistics.running_mean / statistics.momentum
    torch.testing.assert_close(mean, weight.sum(1), rtol=0, atol=0.01)
    variance = (statistics.running_var - (1 - statistics.momentum)) / statistics.momentum
    expected = (weight**2).sum(1) * p / (1 - p) / 196
    torch.testing.assert_close(variance, expected, rtol=0.2, atol=1e-5)


def dropped_gradients(batch, position, key=5):
    network = built("notebook", dropout=0.2)
    loss, _ = cpu.NativeNetwork(network).backpropagate(*batch, 1.0, 0.0, key, position)
    return loss, torch.cat([p.grad.flatten() for p in network.parameters()])


def test_dropout_depends_on_key_and_position_and_on_nothing_else(batch):
    loss, gradients = dropped_gradients(batch, 0)
    again = dropped_gradients(batch, 0)
    assert loss == again[0]
    assert torch.equal(gradients, again[1])
    for other in (dropped_gradients(batch, BATCH), dropped_gradients(batch, 0, key=6)):
        assert loss != other[0]


def test_the_backward_pass_has_the_masks_of_the_forward_pass(batch):
    """The gradient predicts how the loss changes, with dropout that draws the same again."""
    network = built("notebook", dropout=0.2)
    code = cpu.NativeNetwork(network)
    code.backpropagate(*batch, 1.0, 0.0, 5, 0)
    direction = [p.grad / p.grad.norm() for p in network.parameters() if p.dim() == 1][-2:]
    last = [p for p in network.parameters() if p.dim() == 1][-2:]
    slope = sum((p.grad * d).sum() for p, d in zip(last, direction, strict=True)).item()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, step in zip(last, direction, strict=True):
                parameter.add_(step, alpha=sign * 1e-2)
        losses.append(code.backpropagate(*batch, 1.0, 0.0, 5, 0)[0])
        with torch.no_grad():
            for parameter, step in zip(last, direction, strict=True):
                parameter.sub_(step, alpha=sign * 1e-2)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=1e-2)


# Augmentation


AUGMENTED = {
    "map": {"affine_rotation": 10, "shear": 10, "translate": 0.1, "scale_min": 0.8, "fill": 64},
    "elastic": {"rotation": 5, "elastic": 2.0},
    "jitter": {"translate": 0.1, "brightness": 0.4, "contrast": 0.4},
}


@pytest.mark.parametrize("changes", AUGMENTED.values(), ids=AUGMENTED)
def test_augmentation_is_torchs_but_for_rounding_at_the_middle_between_two_pixels(changes):
    generator = torch.Generator().manual_seed(2)
    pool = torch.randint(0, 256, (200, 1, 28, 28), generator=generator, dtype=torch.uint8)
    rows = torch.randperm(200, generator=generator)[:64]
    config, key = Config(**changes), augment.derive_key(1, 3, "augment")
    positions = torch.arange(640, 704)
    expected = augment.augment(config, pool[rows], positions, torch.tensor(key))
    found = [cpu.NativeAugmentation(config, t)(pool, rows, 640, key) for t in (1, 3, 4_096)]
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert ((found[0] - expected).abs() > 1e-5).float().mean() < 1e-3
    whole = cpu.NativeAugmentation(config)(pool[rows].contiguous(), None, 640, key)
    assert torch.equal(whole, found[0])
    assert not torch.equal(cpu.NativeAugmentation(config)(pool, rows, 641, key), whole)


def test_other_resampling_is_not_in_native_code():
    with pytest.raises(ValueError, match="does not support bilinear resampling"):
        cpu.NativeAugmentation(Config(resampling="bilinear"))


# As a step of training


def trained(config, runtime, samples=100):
    """A step after an epoch of batches of 32 and a last one of 4, which no vector holds."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (samples, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    feed = ResidentFeed(images, labels, Sharding(samples, 32, False), 1)
    torch.manual_seed(0)
    network = build_network("notebook", config.dropout)
    step = Trained(config, network, runtime, feed.sharding)
    step.warm_up(feed.example())
    step.start_epoch(0)
    for batch in feed.epoch(0):
        step(batch, 1e-3)
    return step


@pytest.mark.parametrize("resampling", ["nearest", "bilinear"])
def test_native_is_eager_within_rounding(resampling, runtime):
    config = Config(precision="no", dropout=0.0, affine_rotation=7, nesterov=True, ema_decay=0.5)
    config = dataclasses.replace(config, resampling=resampling)
    ours = trained(dataclasses.replace(config, step="native"), runtime)
    eager = trained(dataclasses.replace(config, step="eager"), runtime)
    assert (ours.mode, eager.mode) == ("native", "eager")
    assert ours.totals.tolist() == pytest.approx(eager.totals.tolist(), rel=1e-5)
    assert ours.gradient_norm() == pytest.approx(eager.gradient_norm(), rel=1e-2)
    for name, tensor in ours.state().items():
        difference = (tensor - eager.state()[name]).float().norm()
        assert difference <= 1e-2 * eager.state()[name].float().norm() + 1e-4, name


@pytest.mark.parametrize(
    "choices", [{"momentum": 0.0}, {"momentum": 0.8}, {"nesterov": True, "weight_decay": 0.1}]
)
def test_flat_sgd_is_torchs(choices):
    plain, config, rate = built("notebook"), Config(**choices), torch.tensor(0.0)
    network = cpu.NativeNetwork(copy.deepcopy(plain))
    ours = FlatSGD(config, network.weights, network.gradient, rate)
    theirs = torch.optim.SGD(
        plain.parameters(),
        *(1.0, config.momentum),
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    for value in (0.1, 0.3, 0.2):
        gradients = abi.views(network.gradient.normal_(), [*plain.parameters()])
        for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        theirs.param_groups[0]["lr"] = value
        theirs.step()
        rate.fill_(value)
        ours.step()
    pairs = zip(network.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)


TRAIN_A_BIT = """
import sys, torch
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding
from mnist_fast.model import build_network
from mnist_fast.runtime import Runtime
from stepping import Trained

config, sharding = Config(precision="no", step="native"), Sharding(20, 16, False)
images, labels = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.zeros(20, dtype=torch.long)
step = Trained(config, build_network("notebook"), Runtime(config), sharding)
for batch in ResidentFeed(images, labels, sharding, 1).epoch(0):
    step(batch, 0.1)
sys.exit(step.mode != "native" or "torch._dynamo" in sys.modules)
"""


def test_torchs_compiler_is_not_imported():
    """It takes 2 s; torch's own optimisers import it."""
    done = helpers.launch(
        *(sys.executable, "-c", TRAIN_A_BIT),
        cwd=helpers.ROOT,
        timeout=120,
        environment=helpers.TESTS_ON_PATH,
    )
    assert done.returncode == 0, done.stderr


def test_a_second_step_has_as_many_threads_as_the_first(runtime, monkeypatch):
    """The first one leaves torch a single thread."""
    monkeypatch.setattr(runtime, "threads", 2)
    config = Config(precision="no", step="native", ema_decay=0.5)
    steps = [trained(config, runtime) for _ in range(2)]
    assert torch.get_num_threads() == 1
    assert [n.threads for s in steps for n in (s.network, s.averaged)] == [2] * 4


# Where it cannot be had


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 8, 5, bias=False)],
        [nn.Conv2d(1, 8, 3)],
        [nn.Conv2d(1, 8, 3, stride=2, bias=False)],
        [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(3)],
        [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid()],
        [nn.BatchNorm2d(1)],
    ],
)
def test_networks_that_it_does_not_know_are_refused(layers):
    with pytest.raises(abi.UnsupportedNetwork, match="unsupported"):
        cpu.NativeNetwork(Network(layers))


def test_bf16_odd_batches_and_machines_without_a_compiler_are_refused_in_one_line(monkeypatch):
    network, config, mnist = build_network(), Config(step="native"), Sharding(60_000, 128, True)
    with pytest.raises(InputError, match="--step native: it does not support bf16"):
        plan_of(dataclasses.replace(config, precision="bf16"), mnist, network=network)
    halved = Sharding(60_000, 100, True, world_size=2)
    with pytest.raises(InputError, match="not 50 per process: use --step auto"):
        plan_of(config, halved, network=network)
    monkeypatch.setattr(cpu, "try_library", lambda: (None, "there is no C++ compiler"))
    with pytest.raises(InputError, match="--step native: there is no C"):
        plan_of(config, mnist, network=network)
    monkeypatch.setattr(build, "cpp_compiler", lambda: None)
    assert plan_of(Config(), mnist, network=network).mode.name == "eager"


def test_auto_passes_over_native_steps_for_a_network_with_an_unknown_layer():
    layers = [nn.Conv2d(1, 10, 3, bias=False), nn.BatchNorm2d(10), nn.SiLU(), nn.AvgPool2d(26)]
    found = plan_of(Config(epochs=15), Sharding(60_000, 128, True), network=Network(layers))
    assert found.mode.name == "compiled"
    assert "native, because the network has an unsupported layer SiLU()" in found.describe()


def test_code_that_does_not_compile_is_told_in_a_line(monkeypatch, tmp_path):
    source = tmp_path / "native.cpp"
    source.write_text('#warning "first"\nthis is not C++\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError) as caught:
        build.load_cpp(source, [])
    assert ": error: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86-64")
@pytest.mark.parametrize(
    "processor", [pytest.param("x86-64", marks=pytest.mark.slow), "x86-64-v3", "x86-64-v4"]
)
def test_it_compiles_for_processors_with_and_without_avx(processor):
    """Code is generated, as some errors are found no earlier."""
    options = [o for o in build.CPP_OPTIONS if not o.startswith("-march")]
    command = ["g++", *options, f"-march={processor}", "-o", os.devnull, cpu.SOURCE]
    subprocess.run(command, check=True, timeout=120)


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_cpp(cpu.SOURCE, [cpu.SHARED])
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    made = path.stat().st_mtime_ns
    monkeypatch.setattr(build.subprocess, "run", None)
    build.load_cpp(cpu.SOURCE, [cpu.SHARED])
    assert path.stat().st_mtime_ns == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]
