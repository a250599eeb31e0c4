"""Seconds from the shell to the end of the first step, and to the end of a whole short run.

    python benchmarks/startup.py --rounds 3

Launches `accelerate launch train.py --epochs 1`, once to fill caches and then a few times that
count. The first step's end is the start of train.py's process, as the kernel tells it, plus
`startup_seconds` of `summary.json`. Writes startup.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

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
    raise subprocess.CalledProcessError(launcher.returncode or 1, launcher.args)


def measure(choices: list[str]) -> dict[str, float]:
    """Launches one run; its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "accelerate.commands.launch", TRAIN, *choices]
        command += ["--run_dir", str(run)]
        begun = time.time()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as launcher:
            process = started_at(launcher)
            launcher.wait()
        ended = time.time()
        if launcher.returncode:
            raise subprocess.CalledProcessError(launcher.returncode, command)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "launcher_seconds": process - begun,
        "startup_seconds": summary["startup_seconds"],
        "first_step_seconds": process - begun + summary["startup_seconds"],
        "whole_seconds": ended - begun,
        "train_seconds": summary["train_seconds"],
    }


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs that count (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options, choices = parser.parse_known_args()
    choices = choices or ["--epochs", "1", "--wandb", "offline"]
    measure(choices)
    runs: list[dict[str, float]] = []
    for _ in range(options.rounds):
        runs.append(measure(choices))
        print(*(f"{value:.2f} {name}" for name, value in runs[-1].items()), flush=True)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "n": options.rounds,
        "runs": runs,
        "medians": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "load_average_after": os.getloadavg()[0],
    }
    first = record["medians"]["first_step_seconds"]
    print(f"shell to the end of the first step: {first:.1f} s (median of {options.rounds})")
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (options.out / "startup.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
