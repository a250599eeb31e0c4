"""The examples run as their users start them, and learn what train.py learns."""

import ast
import re

import helpers
import pytest
import wandb_file
from helpers import QUICK, ROOT, error_lines, read_summary, train_script

LOOP = ROOT / "examples" / "plain_loop.py"

# The package may not be installed here; threads that wait leave the CPU to others.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}


def accuracies(done, images):
    """The accuracy after each epoch, from what a finished example printed."""
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^epoch (\d+): ([\d.]+) % of ([\d,]+) test images$", done.stdout, re.M)
    assert [int(epoch) for epoch, _, _ in lines] == [*range(1, len(lines) + 1)]
    assert {count for _, _, count in lines} == {f"{images:,}"}
    return [float(accuracy) for _, accuracy, _ in lines]


def one_process(*arguments, cwd, timeout):
    """`accelerate launch examples/plain_loop.py ...`."""
    command = ("--num_processes", "1", "--mixed_precision", "no", LOOP, *arguments)
    return helpers.accelerate_launch(*command, cwd=cwd, timeout=timeout, environment=ENVIRONMENT)


def two_processes(*arguments, cwd, timeout):
    """`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/plain_loop.py ...`."""
    return helpers.torchrun(2, LOOP, *arguments, cwd=cwd, timeout=timeout, environment=ENVIRONMENT)


def train_py(*arguments, cwd, timeout):
    """The accuracy of `train.py --step eager`."""
    done = train_script(*QUICK, *arguments, "--run_dir", cwd / "run", cwd=cwd, timeout=timeout)
    assert done.returncode == 0, error_lines(done.stderr)
    return read_summary(cwd / "run")["test_accuracy"]


def test_the_loop_is_short_and_needs_little_of_ours():
    text = LOOP.read_text()
    assert len(text.splitlines()) <= 90
    ours = {
        node.module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mnist_fast")
    }
    names = ("augment", "config", "errors", "model", "schedule")
    assert ours == {f"mnist_fast.{name}" for name in names}


@pytest.mark.timeout(300)
def test_the_loop_learns_the_digits_and_tells_wandb(small_betons, tmp_path):
    options = ("--data_dir", small_betons, "--epochs", "5")
    found = accuracies(one_process(*options, cwd=tmp_path, timeout=250), images=360)
    assert len(found) == 5
    assert found[-1] > 80
    rows = [
        wandb_file.plain(record.history.item)
        for record in wandb_file.read_records(wandb_file.find(tmp_path))
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["test_accuracy"] for row in rows] == pytest.approx(found, abs=0.01)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


# Read by each Python at its start. What is posted here is done while the process ends.
BUSY_GROUP = """
import torch
from torch import distributed

destroy = distributed.destroy_process_group

def destroy_later(*arguments):
    for _ in range(3000):
        distributed.all_reduce(torch.ones(1), async_op=True)
    destroy(*arguments)

distributed.destroy_process_group = destroy_later
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [LOOP, helpers.TRAIN], ids=["plain_loop", "train"])
def test_work_of_the_group_does_not_abort_a_finished_process(small_betons, tmp_path, program):
    """gloo's thread asks for the interpreter after each exchange, also while Python ends."""
    (tmp_path / "sitecustomize.py").write_text(BUSY_GROUP)
    options = ("--data_dir", small_betons, "--epochs", "1", "--wandb", "disabled")
    if program is helpers.TRAIN:
        options += (*QUICK, "--run_dir", tmp_path / "run")
    on_path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = helpers.torchrun(2, program, *options, cwd=tmp_path, environment=on_path, timeout=250)
    assert done.returncode == 0, done.stderr
    assert re.search("^epoch +1[:/]", done.stdout, re.M)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_loop_learns_the_digits_as_train_py_does(small_betons, tmp_path):
    options = ("--data_dir", small_betons, "--epochs", "8", "--wandb", "disabled")
    expected = train_py(*options, cwd=tmp_path, timeout=200)
    for launch in (one_process, two_processes):
        found = accuracies(launch(*options, cwd=tmp_path, timeout=250), images=360)
        assert found[-1] == pytest.approx(expected, abs=4)


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.timeout(1500)
def test_the_loop_learns_mnist_as_train_py_does(mnist_betons, tmp_path):
    options = ("--data_dir", mnist_betons, "--epochs", "1", "--wandb", "disabled")
    expected = train_py("--dataset", "mnist", *options, cwd=tmp_path, timeout=500)
    assert expected > 98
    for launch in (one_process, two_processes):
        (found,) = accuracies(launch(*options, cwd=tmp_path, timeout=500), images=10_000)
        assert found == pytest.approx(expected, abs=0.5)
