"""What only a GPU can tell: `make test-gpu`. Elsewhere all of it is skipped, with the reason."""

import dataclasses
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import helpers
import pytest
import torch
from stepping import Trained

from mnist_fast import steps
from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.data import ResidentFeed, Sharding, StreamFeed, read_all
from mnist_fast.evaluate import evaluate
from mnist_fast.kernels import build
from mnist_fast.model import build_network
from mnist_fast.runtime import Runtime
from mnist_fast.steps.captured import CapturedStep
from mnist_fast.steps.compiled import CompiledStep
from mnist_fast.steps.eager import EagerStep
from mnist_fast.steps.fused import FusedStep

GPUS = torch.cuda.device_count()
HAS_BF16 = GPUS > 0 and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not GPUS, reason="needs a GPU"),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
needs_triton = pytest.mark.skipif(
    bool(GPUS and build.why_no_inductor("cuda")), reason="needs Triton and a C compiler"
)
PRECISIONS = ["no", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="no bf16"))]
POOL, BATCH = 300, 64  # 4 whole batches and one of 44


@pytest.fixture
def gpu_runtime(in_process):
    """The one process of a run on the GPU."""
    runtime = Runtime(Config())
    assert runtime.device.type == "cuda"
    return runtime


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Torch gives up on a function that was compiled too often, and runs it eagerly."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def pool():
    """Images and labels on the GPU."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (POOL, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return images.cuda(), torch.randint(0, 10, (POOL,), generator=generator).cuda()


def trained(config, runtime, pool, mode, epochs=2, state=None):
    """A step after some epochs, with its smaller last batches."""
    sharding = Sharding(POOL, BATCH, False)
    runtime.seed(1)
    network = build_network(config.network, config.dropout)
    runtime.seed_process(1)
    step = Trained(config, network, runtime, sharding, mode)
    feed = ResidentFeed(*pool, sharding, 1)
    step.warm_up(feed.example())
    if state is not None:
        step.load_state(state)
    for epoch in range(epochs):
        step.start_epoch(epoch)
        for batch in feed.epoch(epoch):
            step(batch, 0.01)
    torch.cuda.synchronize()
    return step


def flat(step):
    """Weights and statistics in one vector."""
    state = step.state().items()
    return torch.cat([t.flatten().double() for k, t in state if k[:7] == "network" and t.dim()])


@needs_triton
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", [CompiledStep, CapturedStep])
@pytest.mark.parametrize(
    "words",
    [
        ("--recipe", "fast"),
        ("--recipe", "notebook", "--dropout", "0"),
        ("--recipe", "record"),
        ("--optimizer", "adamw", "--nesterov", "false", "--ema_decay", "0.9"),
        ("--optimizer", "muon", "--ema_decay", "0.9", "--plain_epochs", "1"),
    ],
    ids=" ".join,
)
def test_modes_train_as_eager_does(gpu_runtime, pool, words, mode, precision):
    config = dataclasses.replace(load(list(words)), precision=precision, epochs=2)
    ours = trained(config, gpu_runtime, pool, mode)
    eager = trained(config, gpu_runtime, pool, EagerStep)
    # the loss: AdamW turns the rounding of gradients of zero into whole steps of weights
    assert ours.totals[0].item() == pytest.approx(eager.totals[0].item(), rel=0.03)
    assert ours.totals[2] == eager.totals[2] == 2 * POOL


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_fused_steps_are_planned_built_and_train(gpu_runtime, pool, optimizer):
    config = dataclasses.replace(load([]), step="fused", optimizer=optimizer, batch_size=64)
    sharding = Sharding(POOL, BATCH, True)
    if reason := reason_against_fused(config, gpu_runtime, sharding):
        pytest.skip(reason)
    ours = trained(config, gpu_runtime, pool, None)
    eager = trained(dataclasses.replace(config, step="eager"), gpu_runtime, pool, EagerStep)
    assert ours.mode == "fused"
    assert ours.totals[0].item() == pytest.approx(eager.totals[0].item(), rel=0.03)


def reason_against_fused(config, runtime, sharding):
    job = steps.Job(config, build_network(), runtime.device, "no", sharding)
    return steps.unsupported_reason(FusedStep, job)


@needs_triton
def test_dropout_draws_anew_in_each_replay(gpu_runtime, pool):
    config = Config(dropout=0.5, precision="no", learning_rate=0.0)
    step = trained(config, gpu_runtime, pool, CapturedStep, epochs=0)
    batch = next(iter(ResidentFeed(*pool, step.sharding, 1).epoch(0)))
    losses = set()
    for _ in range(4):
        step.reset_totals()
        step(batch, 0.0)
        losses.add(step.totals[0].item())
    assert len(losses) == 4


@needs_triton
@pytest.mark.parametrize("mode", [EagerStep, CompiledStep, CapturedStep])
def test_a_loaded_state_goes_on_bit_by_bit(gpu_runtime, pool, mode):
    """cuDNN and Inductor are told to be deterministic."""
    config = dataclasses.replace(load([]), precision="no", epochs=2)
    whole = trained(config, gpu_runtime, pool, mode, epochs=2)
    first = trained(config, gpu_runtime, pool, mode, epochs=1).state()
    again = trained(config, gpu_runtime, pool, mode, epochs=0, state=first)
    feed = ResidentFeed(*pool, again.sharding, 1)
    again.start_epoch(1)
    for batch in feed.epoch(1):
        again(batch, 0.01)
    assert torch.equal(flat(whole), flat(again))


def test_fp16_survives_an_overflow_and_keeps_its_scale(gpu_runtime, pool):
    config = dataclasses.replace(load([]), precision="fp16", epochs=2)
    step = trained(config, gpu_runtime, pool, EagerStep, epochs=1)
    scaler = gpu_runtime.accelerator.scaler
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    scale = scaler.get_scale()
    scaler._scale.fill_(2.0**40)  # the next gradients overflow
    batch = next(iter(ResidentFeed(*pool, step.sharding, 1).epoch(1)))
    step(batch, 0.01)
    after = [parameter.detach().clone() for parameter in step.network.parameters()]
    assert all(map(torch.equal, before, after))  # the step was left out
    assert scaler.get_scale() < 2.0**40
    kept = gpu_runtime.scaler_state()
    scaler._scale.fill_(1.0)
    gpu_runtime.load_scaler_state(kept)
    assert scaler.get_scale() == kept["scale"] != scale


def test_both_feeds_have_the_same_batches_on_a_busy_gpu(gpu_runtime, small_betons):
    """The stream's buffers are used again: a slow GPU must not see another batch's images."""
    sharding, path = Sharding(1_437, 32, False), small_betons / "train.beton"
    resident = ResidentFeed(*read_all(path, range(1_437), gpu_runtime.device), sharding, 1)
    stream = StreamFeed(path, sharding, 1, gpu_runtime.device)
    load_on_gpu = torch.randn(4_096, 4_096, device="cuda")
    sums = []
    for ours, theirs in zip(stream.epoch(0), resident.epoch(0), strict=True):
        load_on_gpu = (load_on_gpu @ load_on_gpu).clamp(-1, 1)  # the copies wait behind it
        images, labels = theirs.gather()
        sums.append((ours.images != images).sum() + (ours.labels != labels).sum())
    assert torch.stack(sums).sum().item() == 0


def test_evaluation_on_the_gpu_is_exact(gpu_runtime, small_betons):
    images, labels = read_all(small_betons / "test.beton", range(360), gpu_runtime.device)
    torch.manual_seed(0)
    network = build_network().eval()
    gpu = evaluate(network.cuda(), images, labels, gpu_runtime, 360)
    cpu = evaluate(
        network.cpu(), images.cpu(), labels.cpu(), SimpleNamespace(sum=lambda values: values), 360
    )
    assert gpu.images == cpu.images == 360
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
    assert abs(gpu.accuracy - cpu.accuracy) < 0.3


# Whole runs


def run_dir_of(tmp_path, name, betons, *options, environment=None, timeout=250):
    """A launch of train.py on the digits; the folder that it leaves."""
    folder = tmp_path / name
    words = ("--dataset", "digits", "--data_dir", betons, "--run_dir", folder)
    done = helpers.accelerate_launch(
        *(helpers.TRAIN, *words, "--wandb", "disabled", *options),
        cwd=tmp_path,
        timeout=timeout,
        environment=environment,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return folder


@needs_triton
@pytest.mark.parametrize("step", ["eager", "captured"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_every_optimiser_trains(tmp_path, small_betons, step, optimizer):
    options = ("--step", step, "--optimizer", optimizer, "--epochs", "6", "--batch_size", "64")
    if optimizer == "adamw":
        options += ("--nesterov", "false", "--learning_rate", "0.02")
    if optimizer == "muon":
        options += ("--learning_rate", "0.05")
    summary = helpers.read_summary(run_dir_of(tmp_path, "run", small_betons, *options))
    assert summary["step"] == step
    assert summary["test_accuracy"] > 75


@pytest.mark.skipif(not HAS_BF16, reason="this GPU does not support bf16")
def test_the_launch_configuration_trains_in_bf16(tmp_path, small_betons):
    folder = tmp_path / "run"
    done = helpers.accelerate_launch(
        *("--config_file", helpers.ROOT / "accelerate_config.yaml", "--num_processes", "1"),
        *(helpers.TRAIN, "--dataset", "digits", "--data_dir", small_betons),
        *("--run_dir", folder, "--wandb", "disabled", "--epochs", "2"),
        cwd=tmp_path,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert helpers.read_summary(folder)["precision"] == "bf16"


def test_a_run_told_to_use_the_cpu_leaves_the_gpu_alone(tmp_path, small_betons):
    folder = tmp_path / "run"  # not by accelerate launch, which sets the variable itself
    done = helpers.train_script(
        *("--dataset", "digits", "--data_dir", small_betons, "--run_dir", folder),
        *("--wandb", "disabled", "--epochs", "1"),
        cwd=tmp_path,
        timeout=250,
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    summary = helpers.read_summary(folder)
    assert summary["precision"] == "no"
    assert summary["device"] != torch.cuda.get_device_name()


def test_two_ranks_share_one_gpu_over_gloo(tmp_path, small_betons):
    """As far as several processes can be tried on one GPU: each computes on it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "from accelerate import PartialState\n"
        "PartialState(backend='gloo')\n"
        "from mnist_fast.cli import load\n"
        "from mnist_fast.errors import leave\n"
        "from mnist_fast.loop import train\n"
        "train(load(sys.argv[1:]))\n"
        "leave(0)\n"
    )
    folder = tmp_path / "run"
    done = helpers.launch(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(program, "--dataset", "digits", "--data_dir", small_betons, "--run_dir", folder),
        *("--wandb", "disabled", "--epochs", "2", "--step", "eager", "--precision", "no"),
        cwd=tmp_path,
        timeout=250,
        environment={"ACCELERATE_BYPASS_DEVICE_MAP": "true"},  # DDP takes the rank for the GPU
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert helpers.read_summary(folder)["world_size"] == 2


# Two GPUs


@two_gpus
@needs_triton
@pytest.mark.parametrize("step", ["eager", "captured"])
def test_two_gpus_train_as_one_does(tmp_path, small_betons, step):
    """The same global batches over NCCL, exact counts, and an end."""
    options = ("--step", step, "--epochs", "3", "--precision", "no", "--dropout", "0")
    one = run_dir_of(
        tmp_path, "one", small_betons, *options, environment={"CUDA_VISIBLE_DEVICES": "0"}
    )
    two = run_dir_of(
        tmp_path, "two", small_betons, *options, environment={"CUDA_VISIBLE_DEVICES": "0,1"}
    )
    summaries = [helpers.read_summary(folder) for folder in (one, two)]
    assert [summary["world_size"] for summary in summaries] == [1, 2]
    assert [summary["test_images"] for summary in summaries] == [360, 360]
    first, second = (helpers.read_records(folder)[0] for folder in (one, two))
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=0.05)


@two_gpus
def test_a_lost_rank_ends_the_others_in_time(tmp_path, small_betons):
    process = helpers.start(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(helpers.TRAIN, "--dataset", "digits", "--data_dir", small_betons),
        *("--run_dir", tmp_path / "run", "--wandb", "disabled", "--epochs", "2000"),
        *("--process_timeout", "20"),
        cwd=tmp_path,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        pid = json.loads((tmp_path / "run" / "status.json").read_text())["pid"]
        os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=90)
        assert process.returncode
    finally:
        helpers.end(process)
