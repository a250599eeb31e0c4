"""Where the seconds of a short run go, from the shell to the prompt, beside the least they can be.

    python benchmarks/startup.py --rounds 5

In each round two launches take turns: one that only imports torch and accelerate, the floor, and
`accelerate launch train.py --epochs 1` with W&B offline and all figures drawn. The overhead is the
time of the second less its training. One round before fills caches and does not count. Prints the
medians and the run's own table of parts; writes startup.json, or startup-gpu.json with a GPU.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import records
from benchmarks.records import ROOT
from benchmarks.seeds import count_gpus
from mnist_fast.cli import load
from mnist_fast.timing import PARTS, seconds_since_start

TRAIN = str(ROOT / "train.py")
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")


def measure_floor(timeout: float) -> float:
    """Seconds of a launch that only imports torch and accelerate."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "floor.py"
        script.write_text("import torch, accelerate\n")
        begun = time.perf_counter()
        with records.time_limit(timeout), records.launch([*LAUNCH, str(script)]) as launcher:
            launcher.wait()
        if launcher.returncode:
            raise subprocess.CalledProcessError(launcher.returncode, launcher.args)
        return time.perf_counter() - begun


def wait_for_start(launcher: subprocess.Popen[bytes]) -> float:
    """Seconds since train.py's own process was started, as soon as it is there.

    Raises:
        CalledProcessError: the launcher ended without starting it.
    """
    while launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if TRAIN in child.cmdline():
                    return seconds_since_start(child.pid)
            except (psutil.Error, OSError):  # it has just ended
                continue
        time.sleep(0.02)
    raise subprocess.CalledProcessError(launcher.returncode, launcher.args)


def measure(choices: list[str], timeout: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Launches one run; its seconds and its `summary.json`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*LAUNCH, TRAIN, *choices, "--run_dir", str(run)]
        begun = time.perf_counter()
        with records.time_limit(timeout), records.launch(command) as launcher:
            since = wait_for_start(launcher)
            launching = time.perf_counter() - begun - since
            launcher.wait()
        whole = time.perf_counter() - begun
        if launcher.returncode:
            raise subprocess.CalledProcessError(launcher.returncode, command)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    seconds = {
        "whole": whole,
        "overhead": whole - summary["train_seconds"],
        "first_step": launching + summary["startup_seconds"],
        "launcher": whole - sum(summary["seconds"].values()),
        **summary["seconds"],
    }
    return seconds, summary


def format_table(medians: dict[str, float]) -> str:
    """The medians, the parts of the run indented."""
    rows = [f"{'seconds, medians':<20}"]
    for name, value in medians.items():
        indent = "  " if name in PARTS or name == "launcher" else ""
        rows.append(f"{indent + name:<20}{value:>8.2f}")
    ratio = medians["overhead"] / medians["floor"]
    return "\n".join([*rows, f"overhead: {ratio:.2f} times the floor"])


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    options, choices = records.parse(records.build_parser(__doc__, rounds=3))
    choices = ["--epochs", "1", "--wandb", "offline", *choices]
    load(choices)  # a mistake in them is told before anything is measured
    runs: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        floor = measure_floor(options.run_timeout)
        seconds, summary = measure(choices, options.run_timeout)
        if number:
            runs.append({"floor": floor, **seconds})
            print(*(f"{value:.2f} {name}" for name, value in runs[-1].items()), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(format_table(medians))
    ratio = medians["overhead"] / medians["floor"]
    record = {"runs": runs, "medians": medians, "overhead_by_floor": ratio}
    name = "startup-gpu" if count_gpus() else "startup"
    records.write(name, options, summary, record)
    return 0


if __name__ == "__main__":
    sys.exit(records.run(main, "benchmarks/startup.py"))
