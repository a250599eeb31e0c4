"""Real launches, as users type them: several processes, exit statuses, messages, what is left."""

import json
import os
import re
import shlex
import signal
import socket
import sys
import time

import helpers
import pytest
import torch
import yaml
from distributed_checks import all_checks
from helpers import (
    QUICK,
    RECORD_KEYS,
    ROOT,
    SUMMARY_KEYS,
    error_lines,
    read_records,
    read_summary,
    train_script,
)
from safetensors.torch import load_file
from slurm_cluster import free_ports

from mnist_fast import loop
from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.runtime import Runtime

# Several processes: the same checks in 2 and 3 processes and in this one


@pytest.fixture(scope="module")
def alone(small_betons):
    """What one process sees."""
    with helpers.single_process():
        return all_checks(small_betons, Runtime(Config(precision="no", threads=1)))


@pytest.fixture(scope="module")
def together(small_betons, tmp_path_factory):
    """What N processes see, and how the launch ended; each N is launched once."""
    launched = {}

    def launch(processes):
        if processes not in launched:
            out = tmp_path_factory.mktemp(f"of-{processes}")
            script = ROOT / "tests" / "distributed_checks.py"
            done = helpers.torchrun(processes, script, small_betons, out, cwd=out)
            assert (out / "results.pt").exists(), done.stderr
            launched[processes] = (torch.load(out / "results.pt", weights_only=False), done, out)
        return launched[processes]

    return launch


# One launch takes 15 seconds on two idle cores; the first test of each number waits for it.
pytestmark = pytest.mark.timeout(400)
several = pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])


@several
def test_global_batches_are_those_of_one_process(alone, together, processes):
    """Images, labels and augmented inputs of every step, from both feeds, in two epochs."""
    batches = together(processes)[0]["batches"]
    assert batches == alone["batches"]
    assert batches["resident", 0] == batches["stream", 0]
    assert batches["resident", 0] != batches["resident", 2]
    assert all(len(steps) == 15 for steps in batches.values())


@several
@pytest.mark.parametrize("reduction", ["ddp", "flat"])
def test_gradients_are_those_of_one_process(alone, together, processes, reduction):
    """Also in the last batch, whose 93 images two processes cannot share evenly."""
    gradients, totals = together(processes)[0][reduction]
    expected, expected_totals = alone[reduction]
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(totals, expected_totals, rtol=1e-5, atol=0)
    assert totals[2] == 1_437


@several
def test_every_image_is_evaluated_once(alone, together, processes):
    """Also a number that no number of processes divides, and fewer images than processes."""
    for count, result in together(processes)[0]["evaluations"].items():
        assert result.images == count
        assert result.accuracy == alone["evaluations"][count].accuracy
        assert result.loss == pytest.approx(alone["evaluations"][count].loss, rel=1e-6)


@several
def test_the_processes_agree(together, processes):
    agreed = together(processes)[0]["agreements"]
    assert agreed["gather"] == list(range(processes))
    assert agreed["broadcast"] == [("from", 0)] * processes
    assert agreed["on_main"] == [0] * processes
    assert agreed["refused"] == [("only the main process looked", True)] * processes
    last = processes - 1
    assert agreed["on_each"] == list(range(processes))
    told = f"on process {last}: only the last process looked"
    assert agreed["refused by last"] == [(told, True)] * processes
    (told,) = set(agreed["other data"])
    assert told.endswith("holds different data on different machines: copy one folder to all")
    (answers,) = {tuple(answers) for answers in agreed["stop"]}
    assert True in answers  # the same answer everywhere, and in time


@several
def test_a_batch_they_cannot_share_is_refused_in_one_line(together, processes):
    results, done, _ = together(processes)
    assert results["refused"] == [2] * processes
    lines = [line for line in error_lines(done.stderr) if "divisible" in line]
    assert len(lines) == 1
    assert f"batch_size 125 is not divisible by {processes} processes" in lines[0]


SLOW_MAIN = """
import sys, time
from data_prep import betons
from mnist_fast.cli import load
from mnist_fast.errors import InputError, leave, run_main
from mnist_fast.loop import train
from mnist_fast.runtime import Runtime

gather, check = Runtime.gather, betons.check

def gather_slowly(self, value):
    found = gather(self, value)
    time.sleep(0 if self.rank else 0.4)
    return found

def find_damage(folder):
    raise InputError("train.beton is damaged")

Runtime.gather = gather_slowly
betons.check = find_damage
leave(run_main(lambda: train(load(sys.argv[1:])), "train.py"))
"""


@pytest.mark.slow
def test_the_reason_is_told_also_where_the_main_process_is_the_slower_one(small_betons, tmp_path):
    """A launcher ends it as soon as the other one has left."""
    script = tmp_path / "slow_main.py"
    script.write_text(SLOW_MAIN)
    options = (*QUICK, "--data_dir", small_betons, "--batch_size", 96)
    done = helpers.torchrun(2, script, *options, cwd=tmp_path)
    (line,) = error_lines(done.stderr)
    assert "train.beton is damaged" in line


def test_a_loss_that_is_not_finite_stops_both_processes_with_one_line(together):
    _, done, out = together(2)
    assert done.returncode == 1
    lines = [line for line in error_lines(done.stderr) if "the loss is" in line]
    assert len(lines) == 1
    assert "lower --learning_rate" in lines[0]
    assert "mnist_fast/" not in done.stderr  # the launcher's traceback is not one of ours
    assert "Warning: `" not in done.stderr
    assert not (out / "run" / "summary.json").exists()


@pytest.mark.slow
def test_held_out_images_are_counted_on_three_processes(together):
    _, done, out = together(3)
    assert done.returncode == 0, done.stderr
    summary = read_summary(out / "run")
    assert (summary["world_size"], summary["validation_images"]) == (3, 353)
    assert len(read_records(out / "run")) == 1


# accelerate launch


def assert_complete(folder, epochs):
    """A run left all that it should."""
    records = read_records(folder)
    assert [record["epoch"] for record in records] == list(range(1, epochs + 1))
    assert all(record.keys() >= RECORD_KEYS for record in records)
    assert read_summary(folder).keys() >= SUMMARY_KEYS
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == epochs
    assert list((folder / "checkpoints").glob("step-*"))
    assert sum(tensor.numel() for tensor in load_file(folder / "weights.safetensors").values())


def run_of(launched):
    """The folder of the one run that was launched."""
    folder, done = launched
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run


def test_accelerate_launch_without_a_configuration_file(launched_run):
    """One process on a machine without GPUs, W&B offline."""
    run = run_of(launched_run)
    assert_complete(run, epochs=2)
    summary = read_summary(run)
    assert (summary["feed"], summary["test_images"]) == ("stream", 360)
    assert summary["world_size"] == max(1, torch.cuda.device_count())
    stdout = launched_run[1].stdout
    assert stdout.count("\nepoch ") == 2
    assert "W&B is offline; upload later: wandb sync" in stdout


def test_auto_trains_on_the_digits_and_says_so_everywhere(launched_run):
    """Where there is no MNIST and no network; the data is prepared by the run itself."""
    run = run_of(launched_run)
    assert re.search(r"WARNING.* NOT MNIST", launched_run[1].stderr)
    assert "-digits-" in run.name
    assert read_summary(run)["dataset"] == "digits"
    assert [record["dataset"] for record in read_records(run)] == ["digits", "digits"]
    assert (launched_run[0] / "data" / "betons" / "digits" / "manifest.json").exists()


@pytest.mark.slow
def test_accelerate_launch_with_the_configuration_file(small_betons, tmp_path):
    """One process per GPU, or per CPU on a small machine without one; bf16."""
    cpus = len(os.sched_getaffinity(0))
    few = [] if cpus <= 2 or torch.cuda.is_available() else ["--num_processes", "2"]
    done = helpers.accelerate_launch(
        *("--config_file", "accelerate_config.yaml", *few, "train.py"),
        *("--dataset", "digits", "--data_dir", small_betons, "--run_dir", tmp_path / "run"),
        *("--epochs", "1", "--step", "eager", "--wandb", "disabled"),
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "run", epochs=1)
    summary = read_summary(tmp_path / "run")
    assert summary["world_size"] == (torch.cuda.device_count() or min(2, cpus))
    assert summary["precision"] == "bf16"
    assert summary["test_images"] == 360
    assert not list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "first", "LOCAL_RANK": "0"}, "first"),
    ],
)
def test_half_an_environment_of_a_launcher_is_one_line(tmp_path, small_betons, given, named):
    choices = ("--data_dir", small_betons, "--wandb", "disabled")
    done = train_script(*choices, cwd=tmp_path, timeout=60, environment=given)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert named in line
    assert "unset WORLD_SIZE" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(90)
@pytest.mark.parametrize("place", ["runs", "--run_dir", "file"])
def test_a_link_to_nothing_in_a_folders_place_is_one_line(tmp_path, small_betons, place):
    """Counting up names for a new folder beside it would never end."""
    words = ["--data_dir", small_betons, *QUICK]
    if place == "file":
        (tmp_path / "runs").write_text("mine")
    else:
        (tmp_path / "runs").symlink_to(tmp_path / "nothing")
        words += ["--run_dir", tmp_path / "runs"] if place == "--run_dir" else []
    done = train_script(*words, cwd=tmp_path, timeout=80)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert ("a file" if place == "file" else "a link to nothing") in line


@pytest.mark.timeout(90)
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_nothing(tmp_path, small_betons, closed):
    words = [sys.executable, helpers.TRAIN, *QUICK, "--data_dir", small_betons, "--epochs", "1"]
    command = shlex.join(map(str, [*words, "--run_dir", tmp_path / "run"]))
    done = helpers.launch("bash", "-c", f"{command} {closed}", cwd=tmp_path, timeout=80)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert_complete(tmp_path / "run", epochs=1)
    for path in (tmp_path / "run").rglob("*.json*"):  # no message went into a file
        assert "epoch  1/1" not in path.read_text()


@pytest.mark.timeout(90)
def test_a_rank_that_another_job_has_left_hides_no_message(tmp_path, small_betons):
    """Only a process of a real group leaves the word to the first one."""
    words = ("--data_dir", small_betons, *QUICK, "--batch_size", "100000")
    for left in ({"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}):
        done = train_script(*words, cwd=tmp_path, timeout=80, environment=left)
        assert done.returncode == 2
        (line,) = error_lines(done.stderr)
        assert "RANK" in line


@pytest.mark.timeout(90)
def test_a_log_that_takes_nothing_does_not_stop_the_training(tmp_path, small_betons):
    """Both streams go to one place, as in a job's log."""
    words = [sys.executable, helpers.TRAIN, *QUICK, "--data_dir", small_betons, "--epochs", "1"]
    command = shlex.join(map(str, [*words, "--run_dir", tmp_path / "run"]))
    done = helpers.launch("bash", "-c", f"{command} >/dev/full 2>&1", cwd=tmp_path, timeout=80)
    assert done.returncode == 0
    assert_complete(tmp_path / "run", epochs=1)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_its_peers_can_be_stopped(tmp_path, small_betons, number):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_ports(1)[0])}
    words = (sys.executable, helpers.TRAIN, *QUICK, "--data_dir", small_betons)
    process = helpers.start(*words, cwd=tmp_path, environment=environment)
    try:
        port = int(environment["MASTER_PORT"])
        limit = time.monotonic() + 60
        while not is_open(port) and time.monotonic() < limit:
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=15)
        assert process.returncode
    finally:
        helpers.end(process)


def is_open(port):
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.mark.timeout(90)
def test_without_mnist_one_message_names_files_and_alternatives(tmp_path, monkeypatch):
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    started = time.monotonic()
    choices = ("--wandb", "disabled")
    done = train_script(*choices, cwd=tmp_path, timeout=60, environment=helpers.NO_NETWORK)
    assert time.monotonic() - started < 60
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        assert f"{name}-idx" in line
    for alternative in ("MNIST_ROOT", "--dataset digits", "--dataset auto"):
        assert alternative in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_process_of_torchrun_warns_of_nothing(small_betons, tmp_path):
    options = (*helpers.QUICK, "--epochs", "1", "--data_dir", small_betons)
    done = helpers.launch(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
        *(helpers.TRAIN, *options, "--run_dir", tmp_path / "run"),
        cwd=tmp_path,
        timeout=150,
        environment={"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stderr) == (0, "")


# Stopping


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(small_betons, tmp_path):
    """SIGTERM to a real process; then the same choices again, and the same weights in the end."""

    def choices(name):
        fixed = [*helpers.QUICK, "--recipe", "notebook", "--epochs", "30", "--threads", "1"]
        return [*fixed, "--data_dir", str(small_betons), "--run_dir", str(tmp_path / name)]

    program = [sys.executable, helpers.TRAIN, *choices("stopped")]
    process = helpers.start(*program, cwd=tmp_path)
    try:
        metrics, limit = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        helpers.end(process)
    assert process.returncode == 1
    (line,) = error_lines(stderr)
    assert "stopped on request at step" in line
    assert str(tmp_path / "stopped") in line
    assert 1 <= len(read_records(tmp_path / "stopped")) < 30
    assert not (tmp_path / "stopped" / "summary.json").exists()

    for name in ("stopped", "through"):
        with helpers.single_process():
            loop.train(load(choices(name)))
    records = {name: read_records(tmp_path / name) for name in ("stopped", "through")}
    assert len(records["stopped"]) == 30
    for one, other in zip(*records.values(), strict=True):
        for key in RECORD_KEYS - {"epoch_seconds", "images_per_second"}:
            assert one[key] == other[key], key
    stopped, through = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("stopped", "through")
    )
    for name, tensor in through.items():
        assert torch.equal(stopped[name], tensor), name


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_run_does_not_outlive_accelerate_launch(small_betons, tmp_path, number):
    """Which ends at once and hands no signal on: the run then stops as if it had got it."""
    run = tmp_path / "run"
    choices = [*helpers.QUICK, "--epochs", "1000", "--data_dir", small_betons, "--run_dir", run]
    launcher = helpers.start(
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *(helpers.TRAIN, *choices),
        cwd=tmp_path,
    )
    try:
        limit = time.monotonic() + 120
        metrics = run / "metrics.jsonl"  # is made before the first step, and written after an epoch
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.02)
        launcher.send_signal(number)
        _, stderr = launcher.communicate(timeout=60)  # until nobody holds the pipe any more
    finally:
        helpers.end(launcher)
    assert "stopped on request at step" in stderr
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
