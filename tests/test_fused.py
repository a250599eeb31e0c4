"""The fused step against torch. fused_emulated.cpp runs the GPU's threads as the system's."""

import copy
import ctypes
import dataclasses
import functools
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT
from torch import nn

from mnist_fast import augment, fused
from mnist_fast.config import Config, load
from mnist_fast.data import Batch, ResidentFeed, Sharding
from mnist_fast.errors import InputError
from mnist_fast.model import NETWORKS, Dropout, build_network
from mnist_fast.muon import Muon
from mnist_fast.runtime import Runtime
from mnist_fast.step import TrainingStep, resolve_mode, sum_of_losses

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)"),
]
BATCH = 8
RULES = {"sgd": torch.optim.SGD, "muon": Muon}


class Emulated:
    """Stands for `fused.Kernel` on CPUs, with 3 threads per block."""

    def __init__(self, network, images, folder):
        self.images = images
        (folder / "prelude.h").write_text(fused.prelude(network, images, threads=3))
        library = folder / "fused.so"
        command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread"]
        command += ["-include", folder / "prelude.h", "-o", library]
        subprocess.run([*command, ROOT / "tests/fused_emulated.cpp"], check=True, timeout=120)
        self._library = ctypes.CDLL(str(library))
        self.packed = self._library.count_packed()

    def train(self, pointers, images):
        self._library.launch_train(ctypes.c_void_p(pointers[0]), images)

    def pack(self, pointers):
        self._library.launch_pack(ctypes.c_void_p(pointers[0]))


@pytest.fixture(scope="module")
def load_kernel(tmp_path_factory):
    @functools.cache
    def loaded(name, dropout, images):
        folder = tmp_path_factory.mktemp("fused")
        return Emulated(build_network(name, dropout), images, folder)

    return loaded


@pytest.fixture
def emulated(monkeypatch, load_kernel):
    """Fused steps can be had, on CPUs."""
    monkeypatch.setattr(fused, "obstacle", lambda *_: "")
    monkeypatch.setattr(fused, "load_kernel", load_kernel)
    return load_kernel


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(BATCH, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def built(name):
    """A network whose BatchNorms differ from the identity."""
    torch.manual_seed(3)
    network = build_network(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network.train()


def take_step(config, network, kernel, batch, key=5, position=0):
    """One step on inputs as they are; totals and the step."""
    totals = torch.zeros(3, dtype=torch.float64)
    step = fused.FusedStep(config, network, kernel, totals)
    inputs, labels = batch
    given = Batch(torch.empty(0, dtype=torch.uint8), labels, None, position, len(labels))
    step(given, inputs, config.learning_rate, (1, key), False)
    return totals.tolist()


def assert_near(network, reference, largest_gradient):
    """Gradients and statistics."""
    pairs = zip(network.named_parameters(), reference.parameters(), strict=True)
    for (label, ours), theirs in pairs:
        error = (ours.grad - theirs.grad).norm()
        assert error < 1e-4 * theirs.grad.norm() + 1e-5 * largest_gradient, label
    for (label, ours), theirs in zip(network.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5, msg=label)


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_torchs(name, smoothing, optimizer, batch, load_kernel):
    network = built(name)
    reference = copy.deepcopy(network).double()
    config = Config(
        label_smoothing=smoothing,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=0.01,
        nesterov=smoothing > 0,
    )
    totals = take_step(config, network, load_kernel(name, 0.0, BATCH), batch)

    scores = reference.layers(batch[0].double()).flatten(1).log_softmax(1)
    loss = sum_of_losses(scores, batch[1], smoothing)
    (loss / BATCH).backward()
    hits = int((scores.argmax(1) == batch[1]).sum())
    assert totals == [pytest.approx(loss.item(), rel=1e-5), hits, BATCH]
    assert_near(network, reference, max(p.grad.abs().max() for p in reference.parameters()))
    settings = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": smoothing > 0}
    RULES[optimizer](reference.parameters(), lr=0.1, **settings).step()
    error = {"sgd": 1e-4, "muon": 5e-4}[optimizer]  # 8 images' gradients have not full rank
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=error)


class Fixed(nn.Module):
    """Multiplies by factors that are given."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, units):
        return units * self.factors


def factors_of(index, shape, probability, key, position):
    """What fused.cu's `dropout` gives for a layer's units (channels, size, size)."""
    mask = 0xFFFFFFFF

    def mix(value):
        return augment._mix(torch.as_tensor(value)) & mask

    seed = mix(mix((key & mask) ^ mix(key >> 32)) ^ mix(position))
    places = torch.arange(shape.numel()) * 0x9E3779B9 & mask
    draws = mix(mix(seed + index & mask) ^ places)
    return ((draws >= int(probability * 2**32)) / (1 - probability)).view(shape)


def test_dropout_drops_as_the_hash_says_forward_and_backward(batch, load_kernel):
    probability = 0.25
    network = built("record")
    dropped = copy.deepcopy(network).double()
    units, shares, index = batch[0], [], 0
    for place, layer in enumerate(network.layers):
        units = layer(units)
        index += isinstance(layer, nn.Conv2d)
        if isinstance(layer, Dropout):
            size = (index - 1, units.shape[1:], probability, 99 << 33 | 7)
            factors = torch.stack([factors_of(*size, 40 + n) for n in range(BATCH)]).double()
            shares.append(float((factors == 0).double().mean()))
            dropped.layers[place] = Fixed(factors)
    network = built("record")
    kernel = load_kernel("record", probability, BATCH)
    take_step(Config(learning_rate=0.0), network, kernel, batch, 99 << 33 | 7, 40)

    assert all(abs(share - probability) < 0.01 for share in shares), shares
    scores = dropped.layers(batch[0].double()).flatten(1).log_softmax(1)
    (sum_of_losses(scores, batch[1], 0.0) / BATCH).backward()
    assert_near(network, dropped, max(p.grad.abs().max() for p in dropped.parameters()))


POOL = 20


@pytest.fixture
def pool():
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (POOL, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (POOL,), generator=generator)


def trained(options, pool, mode="fused", epochs=(0, 1), state=None):
    """A step after some epochs of 20 images in batches of 8, 8 and 4."""
    plain = ["--optimizer", "sgd", "--elastic", "0", "--batch_size", "8", "--drop_last", "false"]
    config = load(["--recipe", "record", *plain, *options])
    config = dataclasses.replace(config, step=mode, epochs=2)
    runtime = Runtime(config)
    sharding = Sharding(POOL, BATCH, False)
    feed = ResidentFeed(*pool, sharding, 1)
    runtime.seed(1)
    step = TrainingStep(config, build_network(config.network), runtime, sharding)
    assert step.mode == mode
    if state is not None:
        step.load_state(state)
    step.warm_up(feed.example())
    for epoch in epochs:
        step.start_epoch(epoch)
        for batch in feed.epoch(epoch):
            step(batch, 0.01)
    return step


def flatten(state):
    """Weights and statistics."""
    named = state.items()
    return torch.cat([t.flatten() for name, t in named if name[:7] == "network" and t.dim()])


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--brightness", "0.4", "--contrast", "0.4", "--rotation", "7", "--fill", "1"),
        ("--plain_epochs", "1", "--weight_decay", "0.01", "--nesterov", "false"),
        ("--resampling", "bilinear", "--momentum", "0", "--nesterov", "false"),
        ("--elastic", "0.9"),
        ("--optimizer", "muon"),
        ("--optimizer", "muon", "--weight_decay", "0.1", "--momentum", "0", "--nesterov", "false"),
    ],
)
def test_fused_trains_as_eager_does(emulated, pool, options):
    """But for pixels in the middle between two, and maxima that rounding decides: 0.6 % at most of
    how far the weights move with SGD, and 1.5 % with Muon, over five seeds of the images."""
    ours, eager = trained(options, pool), trained(options, pool, "eager")
    start = trained(options, pool, "eager", epochs=())
    mine, theirs, before = (flatten(step.state()) for step in (ours, eager, start))
    assert (mine - theirs).norm() < 0.02 * (theirs - before).norm()
    assert ours.state().keys() == eager.state().keys()
    for name, tensor in ours.state().items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, eager.state()[name]), name
    assert ours.totals.tolist() == pytest.approx(eager.totals.tolist(), rel=1e-2)
    assert ours.gradient_norm() == pytest.approx(eager.gradient_norm(), rel=5e-2)


def test_the_same_bits_again_also_from_a_loaded_state(emulated, pool):
    once, again = trained((), pool).state(), trained((), pool).state()
    first = trained((), pool, epochs=(0,)).state()
    resumed = trained((), pool, epochs=(1,), state=first).state()
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, resumed[name]), name


def test_starting_over_is_a_fresh_step(emulated, pool):
    step = trained((), pool)
    step.start_over(1)
    feed = ResidentFeed(*pool, step.sharding, 1)
    for epoch in (0, 1):
        step.start_epoch(epoch)
        for batch in feed.epoch(epoch):
            step(batch, 0.01)
    for name, tensor in trained((), pool).state().items():
        assert torch.equal(tensor, step.state()[name]), name


def test_both_feeds_train_alike(emulated, pool):
    """A streamed batch is the whole pool, and lies elsewhere each time."""
    reference = trained((), pool, epochs=(0,))
    step = trained((), pool, epochs=())
    step.start_epoch(0)
    for batch in ResidentFeed(*pool, step.sharding, 1).epoch(0):
        images, labels = batch.gather()
        step(dataclasses.replace(batch, images=images, labels=labels, rows=None), 0.01)
    for name, tensor in reference.state().items():
        assert torch.equal(tensor, step.state()[name]), name


class Gpu:
    multi_processor_count = 132
    shared_memory_per_block_optin = 227 * 1024


@pytest.fixture
def large_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(fused, "_has_bindings", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)


def test_what_stands_against_it_is_said(large_gpu, monkeypatch):
    assert fused.obstacle(Config(), 128, 1) == ""
    assert "132 multiprocessors for 256" in fused.obstacle(Config(), 256, 1)
    assert "one process" in fused.obstacle(Config(), 64, 2)
    assert fused.obstacle(Config(optimizer="muon"), 128, 1) == ""
    assert "SGD and Muon alone" in fused.obstacle(Config(ema_decay=0.9), 64, 1)
    assert "SGD and Muon alone" in fused.obstacle(Config(optimizer="adamw"), 64, 1)
    monkeypatch.setattr(Gpu, "shared_memory_per_block_optin", 99 * 1024)
    assert "too little shared memory" in fused.obstacle(Config(), 128, 1)
    monkeypatch.setattr(fused, "_has_bindings", lambda: False)
    assert "cuda-bindings" in fused.obstacle(Config(), 128, 1)


@pytest.mark.parametrize(("told", "fuses"), [("False", True), ("0", True), ("True", False)])
def test_a_launcher_may_ask_for_the_cpu(large_gpu, monkeypatch, told, fuses):
    """`accelerate launch` says False where nobody asked."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    assert fused.obstacle(Config(), 128, 1) == ("" if fuses else "it needs a GPU")


def test_what_rules_it_out_is_told_before_the_precision(large_gpu):
    with pytest.raises(InputError, match="--step fused: this GPU has 132 multiprocessors for 256"):
        resolve_mode(Config(step="fused"), "bf16", Sharding(60_000, 256, True))


@pytest.mark.parametrize(
    ("choices", "precision", "size", "mode"),
    [
        ({}, "no", 128, "fused"),
        ({"epochs": 1}, "no", 128, "fused"),
        ({}, "bf16", 128, "captured"),
        ({}, "no", 512, "captured"),
        ({"ema_decay": 0.99}, "no", 128, "captured"),
        ({"step": "captured"}, "no", 128, "captured"),
    ],
)
def test_auto_fuses_where_it_can(large_gpu, monkeypatch, choices, precision, size, mode):
    monkeypatch.setattr(fused, "load_kernel", lambda *_: "kernel")
    config = dataclasses.replace(Config(batch_size=size), **choices)
    assert resolve_mode(config, precision, Sharding(60_000, size, True)) == mode


def test_auto_precision_is_float32_where_steps_are_fused(large_gpu, monkeypatch):
    from mnist_fast.runtime import resolve_precision

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert resolve_precision("auto", fuses=True) == "no"
    assert resolve_precision("auto", fuses=False) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("auto", fuses=True) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="is fp8, from the launcher: use --mixed_precision bf16"):
        resolve_precision("auto")


@pytest.mark.parametrize(("told", "fuses"), [("1", True), ("0", True), ("2", False)])
def test_the_number_of_processes_is_read_carefully(large_gpu, monkeypatch, told, fuses):
    from mnist_fast.runtime import may_fuse

    monkeypatch.setenv("WORLD_SIZE", told)
    assert may_fuse(Config()) == fuses
    assert not may_fuse(Config(precision="bf16"))
    assert not may_fuse(Config(step="eager"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE is many: set it"):
        may_fuse(Config())


@pytest.mark.parametrize(
    ("precision", "loads", "words"),
    [("bf16", True, "it computes in float32"), ("no", False, "the kernel cannot be compiled here")],
)
def test_it_is_refused_in_one_line(large_gpu, monkeypatch, precision, loads, words):
    monkeypatch.setattr(fused, "load_kernel", lambda *_: loads)
    with pytest.raises(InputError, match=f"--step fused: {words}.*: use captured, eager or auto"):
        resolve_mode(Config(step="fused"), precision, Sharding(60_000, 128, True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_is_refused_or_left_out(capsys):
    sharding = Sharding(60_000, 128, True)
    with pytest.raises(InputError, match="--step fused: it needs a GPU: use native, eager or auto"):
        resolve_mode(Config(step="fused"), "no", sharding)
    fused.load_kernel.cache_clear()
    assert fused.load_kernel("notebook", 0.0, 128) is None
    assert "step: no fused kernel on this machine: " in capsys.readouterr().out


def test_networks_that_it_does_not_know_are_refused():
    from mnist_fast.model import Network, conv

    with pytest.raises(ValueError, match="all layers but the last one need a BatchNorm"):
        fused.prelude(Network([conv(1, 8, 3), nn.ReLU(), conv(8, 10, 1)]), 8)
    wide = Network([conv(1, 65, 3), nn.BatchNorm2d(65), conv(65, 10, 1)])
    with pytest.raises(ValueError, match="more than 64 channels"):
        fused.prelude(wide, 8)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """The compiler for GPUs, which needs none, with an empty cache."""
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_compiles_for_gpus_once(hopper, monkeypatch, name):
    text = fused.prelude(build_network(name, 0.1), 128) + fused.SOURCE.read_text()
    code = fused.compile_source(text)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(fused, "_compile", lambda *_: pytest.fail("compiled again"))
    assert fused.compile_source(text) == code
    monkeypatch.setattr(fused, "_compile", lambda *_: b"new")
    assert fused.compile_source(text, anew=True) == fused.compile_source(text) == b"new"


def test_without_a_cache_it_is_compiled_each_time(hopper, monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("in the way of the folder")
    monkeypatch.setattr(fused, "_compile", lambda *_: b"code")
    assert fused.compile_source("text") == b"code"


def test_code_that_does_not_compile_is_told(hopper):
    with pytest.raises(RuntimeError, match="error"):
        fused.compile_source("this is no program")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def set_up_on_gpu(name, batch, config):
    """Network and step on the GPU, the network's copy in float64 on the CPU, batch and inputs."""
    if fused.obstacle(config, BATCH, 1):
        pytest.skip(fused.obstacle(config, BATCH, 1))
    network = built(name)
    reference = copy.deepcopy(network).double()
    inputs, labels = (tensor.cuda() for tensor in batch)
    totals = torch.zeros(3, dtype=torch.float64, device="cuda")
    kernel = fused.load_kernel(name, 0.0, BATCH)
    step = fused.FusedStep(config, network.cuda(), kernel, totals)
    given = Batch(torch.empty(0, dtype=torch.uint8), labels, None, 0, BATCH)
    return network, step, reference, given, inputs


def backpropagate(reference, batch):
    """The mean loss's gradients by torch."""
    scores = reference.layers(batch[0].double()).flatten(1).log_softmax(1)
    (sum_of_losses(scores, batch[1], 0.0) / BATCH).backward()


@needs_gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_on_a_gpu_is_torchs(name, batch):
    network, step, reference, given, inputs = set_up_on_gpu(name, batch, Config())
    step(given, inputs, 0.0, (1, 5), False)
    backpropagate(reference, batch)
    largest = max(p.grad.abs().max() for p in reference.parameters())
    gradients = [parameter.grad.cpu() for parameter in network.parameters()]
    for parameter, gradient in zip(network.cpu().parameters(), gradients, strict=True):
        parameter.grad = gradient
    assert_near(network, reference, largest)


@needs_gpu
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_two_steps_on_a_gpu_are_torchs(name, optimizer, batch):
    """The second one reads the weights that the first one packed."""
    config = Config(optimizer=optimizer)
    network, step, reference, given, inputs = set_up_on_gpu(name, batch, config)
    theirs = RULES[optimizer](reference.parameters(), lr=0.01, momentum=0.9, nesterov=False)
    for _ in range(2):
        step(given, inputs, 0.01, (1, 5), False)
        theirs.zero_grad()
        backpropagate(reference, batch)
        theirs.step()
    for ours, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu().double(), other, rtol=1e-3, atol=3e-4)
