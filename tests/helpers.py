"""What several test files share: launching programs, and reading what a run leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
TESTS_ON_PATH = {"PYTHONPATH": str(ROOT / "tests")}  # for programs that use `stepping`

# The digits, quickly: 11 steps per epoch, nothing compiled, no W&B.
QUICK = ("--dataset", "digits", "--step", "eager", "--wandb", "disabled", "--precision", "no")

# What checks outside the repository rely on.
RECORD_KEYS = {
    *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("learning_rate", "epoch_seconds", "images_per_second"),
}
SUMMARY_KEYS = {
    *("recipe", "dataset", "parameters", "seed", "epochs", "world_size", "device", "precision"),
    *("feed", "test_accuracy", "best_test_accuracy", "best_epoch", "test_images"),
    *("train_seconds", "startup_seconds", "images_per_second", "git_commit", "data_sha256"),
    "versions",
}

# Nobody listens there: the network is cut off in the same way on every machine.
NO_NETWORK = {
    name: "http://127.0.0.1:9"
    for proxy in ("http_proxy", "https_proxy", "all_proxy")
    for name in (proxy, proxy.upper())
}

_FOREIGN = ("WANDB_", "ACCELERATE_", "TORCHELASTIC_", "MLFLOW_", "COMET_")
_FOREIGN_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def is_foreign(name):
    """Whether an environment variable could steer a run from outside."""
    return name in _FOREIGN_NAMES or name.startswith(_FOREIGN)


def private_folders(home):
    """Environment variables that keep W&B and accelerate out of the user's folders."""
    return {
        "NETRC": home / "netrc",
        "WANDB_CONFIG_DIR": home / "wandb-config",
        "WANDB_CACHE_DIR": home / "wandb-cache",
        "WANDB_DATA_DIR": home / "wandb-data",
        "HF_HOME": home / "huggingface",
    }


def launch(*command, cwd, timeout, environment=None):
    """Runs a program to its end; kills its whole process group when the time is over.

    Returns the completed process with its text, standard error apart.
    """
    process = start(*command, cwd=cwd, environment=environment)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start(*command, cwd, environment=None):
    """Starts a program in its own process group, without a terminal."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process):
    """Kills what is left of a started program's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def in_signal_mask(pid, mask, number):
    """Whether a signal is among those that a process catches (`SigCgt`) or ignores (`SigIgn`)."""
    text = Path(f"/proc/{pid}/status").read_text()
    (found,) = (line.split()[1] for line in text.splitlines() if line.startswith(mask))
    return int(found, 16) >> (number - 1) & 1


def train_script(*arguments, cwd, timeout=100, environment=None):
    """`python train.py ...`."""
    return launch(
        sys.executable, TRAIN, *arguments, cwd=cwd, timeout=timeout, environment=environment
    )


def accelerate_launch(*arguments, cwd, timeout=150, environment=None):
    """`accelerate launch ...`, with the program of this environment."""
    program = Path(sys.executable).with_name("accelerate")
    return launch(program, "launch", *arguments, cwd=cwd, timeout=timeout, environment=environment)


def torchrun(processes, *arguments, cwd, timeout=300, environment=None):
    """`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N ...` with gloo."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    on_cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = launch(
            *program,
            f"--nproc_per_node={processes}",
            *arguments,
            cwd=cwd,
            timeout=timeout,
            environment=on_cpu | (environment or {}),
        )
        if "RendezvousConnectionError" not in done.stderr:  # its own store; nothing was started
            break
    return done


def error_lines(stderr, program="train.py"):
    """The lines with which a program said that it failed."""
    return [line for line in stderr.splitlines() if line.startswith(f"{program}: error: ")]


def read_records(folder):
    """The records of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_summary(folder):
    """A run's `summary.json`."""
    return json.loads((folder / "summary.json").read_text())


@contextlib.contextmanager
def single_process(figures=False):
    """Forgets accelerate's state, torch's random state and requests to stop, before and after.

    Runs draw no figures unless told: that takes longer than their training.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from mnist_fast import figures as pictures
    from mnist_fast import signals

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        signals.forget()

    forget()
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(pictures, "draw_samples", lambda *_: None)
            patch.setattr(pictures, "draw_results", lambda *_: None)
        yield
    forget()
