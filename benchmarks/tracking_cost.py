"""What W&B costs a run: the same training with `--wandb offline` and with `--wandb disabled`.

    python benchmarks/tracking_cost.py --rounds 5
    python benchmarks/tracking_cost.py --rounds 2 --dataset digits --epochs 2 --out /tmp/trial

Launches train.py in turns, in the order offline, disabled, disabled, offline, ..., after one run
that is not counted. Processor time is that of all its processes, W&B's own among them, and not
disturbed by other programs as much as wall time is. The first step's time is that from the start
of train.py's process. Writes tracking_cost.json.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import records

ROOT = Path(__file__).resolve().parent.parent

MODES = ("offline", "disabled")
MEASURED = ("processor_seconds", "wall_seconds")
QUANTITIES = (*MEASURED, "first_step_seconds")
PR_SET_CHILD_SUBREAPER = 36  # prctl(2): W&B's process may outlive the training, and counts too


def wait(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Waits for a program and everything it left behind; seconds that it all took.

    Raises:
        CalledProcessError: the program failed.
    """
    started, wall, processor = time.perf_counter(), 0.0, 0.0
    while True:
        try:
            found, status, usage = os.wait4(-1, 0)
        except ChildProcessError:  # none is left
            break
        processor += usage.ru_utime + usage.ru_stime
        if found == process.pid:
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return dict(zip(MEASURED, (processor, wall), strict=True))


def measure(
    mode: str, choices: list[str], timeout: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains once; returns its seconds and its `summary.json`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *choices]
        command += ["--wandb", mode, "--run_dir", str(run)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        with records.time_limit(timeout), records.launch(command, environment) as process:
            seconds = wait(process)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return seconds | {"first_step_seconds": summary["startup_seconds"]}, summary


def describe(runs: dict[str, list[dict[str, float]]], quantity: str) -> dict[str, Any]:
    """Mean and sd of a quantity per mode, and what offline takes more than disabled.

    The sd of the difference is that over the rounds, each of which holds one run of both.
    """
    values = {mode: [run[quantity] for run in runs[mode]] for mode in MODES}
    more = [a - b for a, b in zip(values["offline"], values["disabled"], strict=True)]
    means = {mode: statistics.fmean(values[mode]) for mode in MODES}
    each = {
        mode: {"mean": means[mode], "sd": records.sd(values[mode]), "values": values[mode]}
        for mode in MODES
    }
    difference = {"mean": statistics.fmean(more), "sd": records.sd(more)}
    return each | {"difference": difference, "ratio": means["offline"] / means["disabled"]}


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    options, choices = records.parse(records.build_parser(__doc__, rounds=5))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _, summary = measure("offline", choices, options.run_timeout)  # fills caches
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for index in range(options.rounds):
        for mode in MODES if index % 2 == 0 else MODES[::-1]:
            seconds, summary = measure(mode, choices, options.run_timeout)
            runs[mode].append(seconds)
            print(mode, *(f"{seconds[name]:.2f} {name}" for name in QUANTITIES), flush=True)
    results = {quantity: describe(runs, quantity) for quantity in QUANTITIES}
    for quantity, found in results.items():
        percent = 100 * (found["ratio"] - 1)
        print(f"{quantity}: offline takes {found['difference']['mean']:.2f} more, {percent:.1f} %")
    records.write("tracking_cost", options, summary, results)
    return 0


if __name__ == "__main__":
    sys.exit(records.run(main, "benchmarks/tracking_cost.py"))
