"""Seconds from the shell to the end of the first step, and to the end of a whole short run.

    python benchmarks/startup.py --rounds 3

Launches `accelerate launch train.py --epochs 1`, once to fill caches and then a few times that
count. The first step's end is the start of train.py's process, as the kernel tells it, plus
`startup_seconds` of `summary.json`. Writes startup.json.
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

ROOT = Path(__file__).resolve().parent.parent

TRAIN = str(ROOT / "train.py")


def started_at(launcher: subprocess.Popen[bytes]) -> float:
    """When train.py's own process began, in seconds since 1970; waits for it.

    Raises:
        CalledProcessError: the launcher ended without starting it.
    """
    while launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            try:
                if TRAIN in child.cmdline():
                    return child.create_time()
            except psutil.Error:  # it has just ended
                continue
        time.sleep(0.02)
    raise subprocess.CalledProcessError(launcher.returncode, launcher.args)


def measure(choices: list[str], timeout: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Launches one run; its seconds and its `summary.json`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "accelerate.commands.launch", TRAIN, *choices]
        command += ["--run_dir", str(run)]
        begun = time.time()
        with records.time_limit(timeout), records.launch(command) as launcher:
            process = started_at(launcher)
            launcher.wait()
        ended = time.time()
        if launcher.returncode:
            raise subprocess.CalledProcessError(launcher.returncode, command)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    seconds = {
        "launcher_seconds": process - begun,
        "startup_seconds": summary["startup_seconds"],
        "first_step_seconds": process - begun + summary["startup_seconds"],
        "whole_seconds": ended - begun,
        "train_seconds": summary["train_seconds"],
    }
    return seconds, summary


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    options, choices = records.parse(records.build_parser(__doc__, rounds=3))
    choices = ["--epochs", "1", "--wandb", "offline", *choices]
    _, summary = measure(choices, options.run_timeout)
    runs: list[dict[str, float]] = []
    for _ in range(options.rounds):
        seconds, summary = measure(choices, options.run_timeout)
        runs.append(seconds)
        print(*(f"{value:.2f} {name}" for name, value in runs[-1].items()), flush=True)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    first = medians["first_step_seconds"]
    print(f"shell to the end of the first step: {first:.1f} s (median of {options.rounds})")
    records.write("startup", options, summary, {"runs": runs, "medians": medians})
    return 0


if __name__ == "__main__":
    sys.exit(records.run(main, "benchmarks/startup.py"))
