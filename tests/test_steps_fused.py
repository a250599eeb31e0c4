"""The fused step against torch. hopper_emulated.cpp runs the GPU's threads as the system's."""

import copy
import ctypes
import dataclasses
import functools
import shutil
import subprocess

import pytest
import torch
from helpers import ROOT
from stepping import Trained, plan_of
from torch import nn

from mnist_fast import augment
from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.data import Batch, ResidentFeed, Sharding
from mnist_fast.errors import InputError
from mnist_fast.kernels import abi, build, hopper
from mnist_fast.model import NETWORKS, Dropout, build_network
from mnist_fast.optim import Muon
from mnist_fast.runtime import Runtime
from mnist_fast.steps import Job, Settings, TrainState
from mnist_fast.steps.base import sum_of_losses
from mnist_fast.steps.eager import EagerStep
from mnist_fast.steps.fused import FusedStep

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler (g++)"),
]
BATCH = 8
RULES = {"sgd": torch.optim.SGD, "muon": Muon}


class Emulated:
    """Stands for `hopper.Kernel` on CPUs, with 3 threads per block."""

    def __init__(self, network, images, folder):
        self.images = images
        (folder / "prelude.h").write_text(hopper.prelude(network, images, threads=3))
        library = folder / "hopper.so"
        command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread"]
        command += ["-include", folder / "prelude.h", "-o", library]
        subprocess.run([*command, ROOT / "tests/hopper_emulated.cpp"], check=True, timeout=120)
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
        folder = tmp_path_factory.mktemp("hopper")
        return Emulated(build_network(name, dropout), images, folder)

    return loaded


@pytest.fixture
def emulated(monkeypatch, load_kernel):
    """Fused steps can be had, on CPUs, with the network `record`."""
    monkeypatch.setattr(hopper, "unsupported_gpu", lambda *_: None)
    monkeypatch.setattr(FusedStep, "devices", frozenset({"cpu"}))
    kernel = load_kernel("record", 0.0, BATCH)
    monkeypatch.setattr(hopper, "try_kernel", lambda *_: (kernel, ""))
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


def step_of(config, network, images=BATCH, device="cpu"):
    """A fused step of a network, and its state."""
    sharding = Sharding(60_000, images, True)
    job = Job(config, copy.deepcopy(network).cpu(), torch.device(device), "no", sharding)
    state = TrainState(config, network, torch.device(device))
    return FusedStep(job, state, None), state


def take_step(monkeypatch, config, network, kernel, batch, key=5, position=0):
    """One step on inputs as they are; totals."""
    monkeypatch.setattr(hopper, "try_kernel", lambda *_: (kernel, ""))
    step, state = step_of(config, network)
    inputs, labels = batch
    given = Batch(torch.empty(0, dtype=torch.uint8), labels, None, position, len(labels))
    step.launch(given, inputs, Settings(config.learning_rate, 1, key, augmented=False))
    return state.totals.tolist()


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
def test_a_step_is_torchs(name, smoothing, optimizer, batch, load_kernel, monkeypatch):
    network = built(name)
    reference = copy.deepcopy(network).double()
    config = Config(
        label_smoothing=smoothing,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=0.01,
        nesterov=smoothing > 0,
    )
    kernel = load_kernel(name, 0.0, BATCH)
    totals = take_step(monkeypatch, config, network, kernel, batch)

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
    """What hopper.cu's `dropout` gives for a layer's units (channels, size, size)."""
    mask = 0xFFFFFFFF

    def mix(value):
        return augment._mix(torch.as_tensor(value)) & mask

    seed = mix(mix((key & mask) ^ mix(key >> 32)) ^ mix(position))
    places = torch.arange(shape.numel()) * 0x9E3779B9 & mask
    draws = mix(mix(seed + index & mask) ^ places)
    return ((draws >= int(probability * 2**32)) / (1 - probability)).view(shape)


def test_dropout_drops_as_the_hash_says_forward_and_backward(batch, load_kernel, monkeypatch):
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
    config = Config(learning_rate=0.0)
    take_step(monkeypatch, config, network, kernel, batch, 99 << 33 | 7, 40)

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
    modes = {"fused": FusedStep, "eager": EagerStep}
    step = Trained(config, build_network(config.network), runtime, sharding, modes[mode])
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
    monkeypatch.setattr(hopper, "_has_bindings", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(build, "why_no_inductor", lambda _: None)
    monkeypatch.setattr(hopper, "try_kernel", lambda *_: ("kernel", ""))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def reason_against(config, images, processes=1):
    sharding = Sharding(60_000, images * processes, True, world_size=processes)
    job = Job(config, build_network(), torch.device("cuda"), "no", sharding)
    return FusedStep.unsupported_reason(job)


def test_what_stands_against_it_is_said(large_gpu, monkeypatch):
    assert reason_against(Config(), 128) is None
    assert "132 multiprocessors for 256" in reason_against(Config(), 256)
    assert "one process" in reason_against(Config(), 64, 2)
    assert reason_against(Config(optimizer="muon"), 128) is None
    assert "does not average weights" in reason_against(Config(ema_decay=0.9), 64)
    assert "SGD and Muon, not adamw" in reason_against(Config(optimizer="adamw"), 64)
    monkeypatch.setattr(Gpu, "shared_memory_per_block_optin", 99 * 1024)
    assert "too little shared memory" in reason_against(Config(), 128)
    monkeypatch.setattr(hopper, "_has_bindings", lambda: False)
    assert "cuda-bindings" in reason_against(Config(), 128)


@pytest.mark.parametrize(
    ("choices", "size", "mode", "precision"),
    [
        ({}, 128, "fused", "no"),
        ({"epochs": 1}, 128, "fused", "no"),
        ({"precision": "bf16"}, 128, "captured", "bf16"),
        ({}, 512, "captured", "bf16"),
        ({"ema_decay": 0.99}, 128, "captured", "bf16"),
        ({"step": "captured"}, 128, "captured", "bf16"),
        ({"step": "captured", "precision": "no"}, 128, "captured", "no"),
    ],
)
def test_auto_fuses_where_it_can_and_takes_bf16_elsewhere(
    large_gpu, choices, size, mode, precision
):
    config = dataclasses.replace(Config(batch_size=size), **choices)
    found = plan_of(config, Sharding(60_000, size, True), "cuda", build_network())
    assert (found.mode.name, found.job.precision) == (mode, precision)


def test_the_launchers_precision_comes_before_auto(large_gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = plan_of(Config(), Sharding(60_000, 128, True), "cuda", build_network())
    assert (found.mode.name, found.job.precision) == ("captured", "bf16")
    assert "fused, because it does not support bf16" in found.describe()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="is fp8, from the launcher: use --mixed_precision bf16"):
        plan_of(Config(), Sharding(60_000, 128, True), "cuda", build_network())


@pytest.mark.parametrize(
    ("choices", "size", "words"),
    [
        ({"precision": "bf16"}, 128, "it does not support bf16"),
        ({}, 256, "this GPU has 132 multiprocessors for 256"),
    ],
)
def test_it_is_refused_in_one_line(large_gpu, choices, size, words):
    config = Config(step="fused", batch_size=size, **choices)
    with pytest.raises(InputError, match=f"--step fused: {words}.*: use --step auto"):
        plan_of(config, Sharding(60_000, size, True), "cuda", build_network())


def test_a_kernel_that_does_not_compile_is_passed_over(large_gpu, monkeypatch):
    monkeypatch.setattr(hopper, "try_kernel", lambda *_: (None, "the kernel cannot be compiled"))
    found = plan_of(Config(), Sharding(60_000, 128, True), "cuda", build_network())
    assert found.mode.name == "captured"
    assert "fused, because the kernel cannot be compiled" in found.describe()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_is_refused_and_not_compiled():
    with pytest.raises(InputError, match="--step fused: it needs a GPU: use --step auto"):
        plan_of(Config(step="fused"), Sharding(60_000, 128, True))
    hopper._load.cache_clear()
    kernel, reason = hopper.try_kernel(build_network(), 128)
    assert kernel is None
    assert reason.startswith("the kernel cannot be compiled: ")


def test_networks_that_it_does_not_know_are_refused():
    from mnist_fast.model import Network, conv

    with pytest.raises(abi.UnsupportedNetwork, match="only the network's last layer"):
        hopper.prelude(Network([conv(1, 8, 3), nn.ReLU(), conv(8, 10, 1)]), 8)
    wide = Network([conv(1, 65, 3), nn.BatchNorm2d(65), conv(65, 10, 1)])
    with pytest.raises(abi.UnsupportedNetwork, match="more than 64 channels"):
        hopper.prelude(wide, 8)


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    """The compiler for GPUs, which needs none, with an empty cache."""
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_compiles_for_gpus_once(nvrtc, monkeypatch, name):
    text = hopper.prelude(build_network(name, 0.1), 128) + hopper.SOURCE.read_text()
    code = build.compile_cuda(text)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(build, "_compile_cuda", lambda *_: pytest.fail("compiled again"))
    assert build.compile_cuda(text) == code
    monkeypatch.setattr(build, "_compile_cuda", lambda *_: b"new")
    assert build.compile_cuda(text, force=True) == build.compile_cuda(text) == b"new"


def test_without_a_cache_it_is_compiled_each_time(nvrtc, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way of the folder")
    monkeypatch.setattr(build, "_compile_cuda", lambda *_: b"code")
    assert build.compile_cuda("text") == b"code"


def test_code_that_does_not_compile_is_told(nvrtc):
    with pytest.raises(build.BuildError, match="error"):
        build.compile_cuda("this is no program")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def set_up_on_gpu(name, batch, config):
    """Network and step on the GPU, the network's copy in float64 on the CPU, batch and inputs."""
    if reason := hopper.unsupported_gpu(torch.device("cuda"), BATCH, 0):
        pytest.skip(reason)
    network = built(name)
    reference = copy.deepcopy(network).double()
    inputs, labels = (tensor.cuda() for tensor in batch)
    step, state = step_of(config, network, device="cuda")
    given = Batch(torch.empty(0, dtype=torch.uint8), labels, None, 0, BATCH)
    return state.network, step, reference, given, inputs


def backpropagate(reference, batch):
    """The mean loss's gradients by torch."""
    scores = reference.layers(batch[0].double()).flatten(1).log_softmax(1)
    (sum_of_losses(scores, batch[1], 0.0) / BATCH).backward()


@needs_gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_on_a_gpu_is_torchs(name, batch):
    network, step, reference, given, inputs = set_up_on_gpu(name, batch, Config())
    step.launch(given, inputs, Settings(0.0, 1, 5, augmented=False))
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
        step.launch(given, inputs, Settings(0.01, 1, 5, augmented=False))
        theirs.zero_grad()
        backpropagate(reference, batch)
        theirs.step()
    for ours, other in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu().double(), other, rtol=1e-3, atol=3e-4)
