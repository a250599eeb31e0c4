"""All step modes compute the same training; capture's own logic, with a graph for any device."""

import dataclasses
from types import SimpleNamespace

import helpers
import pytest
import torch
from stepping import Trained, plan_of

from mnist_fast.config import Config
from mnist_fast.data import Batch, ResidentFeed, Sharding
from mnist_fast.errors import InputError
from mnist_fast.kernels import build
from mnist_fast.model import build_network
from mnist_fast.steps import captured as captured_module
from mnist_fast.steps.captured import CapturedStep
from mnist_fast.steps.eager import EagerStep
from mnist_fast.steps.native import NativeStep

SHARDING = Sharding(76, 16, drop_last=False)  # 4 batches of 16 and one of 12
MNIST = Sharding(60_000, 128, drop_last=True)
LONG = Config(epochs=15, step="auto")
CONFIG = Config(
    epochs=3,
    batch_size=16,
    step="captured",
    plain_epochs=1,
    dropout=0.1,
    ema_decay=0.5,
    nesterov=True,
    weight_decay=1e-3,
    label_smoothing=0.1,
    rotation=15,
    translate=0.1,
    elastic=1.0,
    brightness=0.3,
)


MODES = {mode.name: mode for mode in (CapturedStep, EagerStep, NativeStep)}


class Rerun:
    """What `CudaGraph` is to the GPU: runs the work as often before, and again in each replay."""

    made = 0

    def __init__(self, work):
        Rerun.made += 1
        self.replay = work
        for _ in range(captured_module.WARM_UPS + 1):
            work()


@pytest.fixture
def rerun(monkeypatch):
    """Lets CPUs capture, with uncompiled kernels: then the modes agree to the last bit."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(CapturedStep, "graph_type", Rerun)
    monkeypatch.setattr(Rerun, "made", 0)


@pytest.fixture
def pool():
    torch.manual_seed(3)
    return torch.randint(0, 256, (76, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (76,))


class CopyingFeed(ResidentFeed):
    """Batches as the stream feed has them: whole tensors at new addresses."""

    def example(self):
        images, labels = super().example().gather()
        return Batch(torch.zeros_like(images), torch.zeros_like(labels), None, 0, 16)

    def epoch(self, epoch, first_step=0):
        for batch in super().epoch(epoch, first_step):
            yield Batch(*batch.gather(), None, batch.position, batch.global_size)


def train(config, runtime, feed, epochs=3):
    """Trains; returns the step, and each epoch's totals and gradient norm."""
    torch.manual_seed(0)
    network = build_network("notebook", config.dropout)
    step = Trained(config, network, runtime, feed.sharding, MODES[config.step])
    step.warm_up(feed.example())
    seen = []
    for epoch in range(epochs):
        step.start_epoch(epoch)
        for number, batch in enumerate(feed.epoch(epoch)):
            step(batch, 0.01 * (1 + number + epoch))
        seen.append((*step.totals.tolist(), step.gradient_norm()))
    return step, seen


@pytest.mark.parametrize("feed_type", [ResidentFeed, CopyingFeed])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"momentum": 0.0, "nesterov": False, "ema_decay": 0.0},
        {"optimizer": "adamw", "nesterov": False},
        {"optimizer": "muon", "weight_decay": 0.01},
    ],
)
def test_captured_trains_as_eager_does_to_the_last_bit(rerun, runtime, pool, feed_type, choices):
    config = dataclasses.replace(CONFIG, **choices)
    feed = feed_type(*pool, SHARDING, 1)
    captured, ours = train(config, runtime, feed)
    eager, theirs = train(dataclasses.replace(config, step="eager"), runtime, feed)
    assert Rerun.made == 2  # with and without augmentation
    assert ours == theirs
    assert captured.state().keys() == eager.state().keys()
    for name, tensor in captured.state().items():
        assert torch.equal(tensor, eager.state()[name]), name


def test_without_a_smaller_batch_every_step_is_a_replay(rerun, runtime, pool, monkeypatch):
    whole = Sharding(76, 16, drop_last=True)
    feed = ResidentFeed(*pool, whole, 1)
    torch.manual_seed(0)
    step = Trained(CONFIG, build_network("notebook", 0.1), runtime, whole, CapturedStep)
    step.warm_up(feed.example())
    monkeypatch.setattr(step.step, "body", None)  # what steps outside the graph call
    step.start_epoch(0)
    recording = step.step._recordings[True]
    replays = []
    monkeypatch.setattr(recording.graph, "replay", lambda: replays.append(recording.batch.rows[0]))
    for batch in feed.epoch(0):
        step(batch, 0.1)
    assert len(replays) == whole.steps == 4


def test_warming_up_changes_nothing(rerun, runtime, pool):
    feed = ResidentFeed(*pool, SHARDING, 1)
    step, _ = train(CONFIG, runtime, feed, epochs=1)
    before, generator, totals = step.state(), torch.get_rng_state(), step.totals.tolist()
    step.step._recordings.clear()
    step.warm_up(feed.example())
    assert torch.equal(torch.get_rng_state(), generator)
    assert step.totals.tolist() == totals
    for name, tensor in step.state().items():
        assert torch.equal(tensor, before[name]), name
    assert step.gradient_norm() is None


def test_a_loaded_state_lies_where_the_graph_reads(rerun, runtime, pool):
    feed = ResidentFeed(*pool, SHARDING, 1)
    trained, _ = train(CONFIG, runtime, feed, epochs=1)
    step = Trained(CONFIG, build_network("notebook", 0.1), runtime, SHARDING, CapturedStep)
    step.warm_up(feed.example())

    def addresses():
        momenta = [kept["momentum_buffer"] for kept in step.step.optimizer_state]
        tensors = [*step.network.state_dict().values(), *step.averaged.state_dict().values()]
        return [tensor.data_ptr() for tensor in (*momenta, *tensors, step.totals)]

    before = addresses()
    step.load_state(trained.state())
    step.reset_totals()
    assert addresses() == before
    for name, tensor in step.state().items():
        assert torch.equal(tensor, trained.state()[name]), name


def test_graphs_are_given_back(rerun, runtime, pool, monkeypatch):
    """Before the process group goes: NCCL waits for graphs that hold its communicator."""
    closed = []
    monkeypatch.setattr(Rerun, "close", lambda graph: closed.append(graph), raising=False)
    step, _ = train(CONFIG, runtime, ResidentFeed(*pool, SHARDING, 1), epochs=1)
    step.step.close()
    assert len(closed) == 2
    assert not step.step._recordings


def test_a_part_that_is_whole_in_a_smaller_batch_is_no_replay(rerun, runtime, pool):
    """15 of 16 images are 7 and 8 on two processes: the graph holds the weight of 16."""
    sharding = Sharding(76, 16, False, rank=1, world_size=2)
    config = dataclasses.replace(CONFIG, plain_epochs=0, ema_decay=0.0)
    step = Trained(config, build_network("notebook", 0.1), runtime, sharding, CapturedStep)
    step.warm_up(ResidentFeed(*pool, sharding, 1).example())
    taken = []
    step.step.body = taken.append
    rows = torch.arange(8)
    step(Batch(*pool, rows, 8, 16), 0.0)
    assert not taken
    step(Batch(*pool, rows, 7, 15), 0.0)
    assert len(taken) == 1


def test_captured_needs_a_gpu():
    with pytest.raises(InputError, match="--step captured: it needs a GPU: use --step auto"):
        plan_of(dataclasses.replace(LONG, step="captured"), MNIST)


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU without fused steps, with all that Inductor needs."""
    gpu = SimpleNamespace(multi_processor_count=40, shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(build, "why_no_inductor", lambda _: None)


@pytest.mark.parametrize(
    ("choices", "precision", "mode"),
    [
        ({}, "bf16", "captured"),
        ({"epochs": 1}, "bf16", "eager"),  # too short
        ({"step": "captured", "epochs": 1}, "bf16", "captured"),
        ({"step": "compiled"}, "no", "compiled"),
        ({}, "fp16", "eager"),
        ({"optimizer": "adamw"}, "bf16", "captured"),
    ],
)
def test_modes_on_a_gpu(small_gpu, choices, precision, mode):
    config = dataclasses.replace(LONG, precision=precision, **choices)
    assert plan_of(config, MNIST, "cuda", build_network()).mode.name == mode


def test_fp16_cannot_be_captured(small_gpu):
    config = dataclasses.replace(LONG, precision="fp16")
    line = plan_of(config, MNIST, "cuda", build_network()).describe()
    assert line.startswith("step: eager in fp16. Passed over: ")
    assert "captured and compiled, because it does not support fp16" in line
    with pytest.raises(InputError, match="--step captured: it does not support fp16"):
        plan_of(dataclasses.replace(config, step="captured"), MNIST, "cuda", build_network())


@pytest.mark.parametrize("missing", ["no C compiler", "no Triton"])
def test_without_what_triton_needs_it_falls_back_in_one_line(small_gpu, monkeypatch, missing):
    monkeypatch.setattr(build, "why_no_inductor", lambda _: f"there is {missing}")
    found = plan_of(dataclasses.replace(LONG, precision="bf16"), MNIST, "cuda", build_network())
    assert found.mode.name == "eager"
    assert f"captured and compiled, because there is {missing}" in found.describe()


@pytest.mark.parametrize("value, reason", [("1", "TORCHDYNAMO_DISABLE is set"), ("0", None)])
def test_a_variable_that_keeps_torch_from_compiling_is_told(monkeypatch, value, reason):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
    monkeypatch.setattr(build, "cpp_compiler", lambda: ["g++"])
    assert build.why_no_inductor("cpu") == reason


PROCESSES = """
import sys
import torch
from torch import distributed
import test_steps_captured as t
from mnist_fast.errors import leave
from mnist_fast.runtime import Runtime

torch.compile = lambda function, **_: function
t.CapturedStep.graph_type = t.Rerun
runtime = Runtime(t.Config(precision="no", threads=1))
torch.manual_seed(3)
images, labels = torch.randint(0, 256, (76, 1, 28, 28), dtype=torch.uint8), torch.arange(76) % 10
sharding = t.Sharding(76, 16, False, runtime.rank, runtime.world_size)
feed = t.ResidentFeed(images, labels, sharding, 1)
states = []
for mode in (sys.argv[1], "eager"):
    # nothing is moved: native code may round the middle between two pixels to the other one
    still = dict(rotation=0.0, translate=0.0, elastic=0.0, dropout=0.0)
    config = t.dataclasses.replace(t.CONFIG, step=mode, **still)
    states.append(t.train(config, runtime, feed, int(sys.argv[2]))[0].state())
worst = max((states[0][k].double() - states[1][k].double()).abs().max().item() for k in states[0])
if runtime.is_main:
    print("worst", runtime.world_size, worst)
runtime.close()
leave(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "epochs", "tolerance"), [("captured", 3, 1e-5), ("native", 1, 5e-2)]
)
def test_a_mode_trains_as_ddp_does_on_two_processes(tmp_path, mode, epochs, tolerance):
    """The flat reduction of that mode's step against DDP around the eager one.

    What native code rounds differently grows from step to step; a wrong reduction would differ by
    the size of the values, up to 1.
    """
    program = tmp_path / "program.py"
    program.write_text(PROCESSES)
    done = helpers.torchrun(
        *(2, program, mode, epochs),
        cwd=helpers.ROOT,
        timeout=250,
        environment=helpers.TESTS_ON_PATH,
    )
    assert done.returncode == 0, done.stderr
    _, processes, worst = done.stdout.split()[-3:]
    assert processes == "2"
    assert float(worst) < tolerance
