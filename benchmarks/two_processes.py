"""Images per second of two processes, on one core each, against one process on one core.

    python benchmarks/two_processes.py --rounds 3

Launches train.py in turns, one epoch each, and takes the speed from `summary.json`: one process;
two at once that know nothing of each other, with half the batch, which is what the machine can
give; and two gloo ranks under torchrun that share the batch. Writes two_processes.json.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import records

ROOT = Path(__file__).resolve().parent.parent

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def train(
    at_once: int, ranks: int, batch_size: int, choices: list[str], timeout: float
) -> tuple[float, dict[str, Any]]:
    """Trains in so many runs at once.

    Returns:
        Images per second of all runs together, and one run's `summary.json`.

    Raises:
        CalledProcessError: a run failed; it has told why.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(at_once)]
        command = [sys.executable, *(TORCHRUN if ranks == 2 else ()), str(ROOT / "train.py")]
        command += ["--wandb", "disabled", "--threads", "1", "--batch_size", str(batch_size)]
        commands = [[*command, "--run_dir", str(run), *choices] for run in runs]
        with records.time_limit(timeout), contextlib.ExitStack() as stack:
            launched = [stack.enter_context(records.launch(w, environment)) for w in commands]
            for process in launched:
                check(process)
        summaries = [json.loads((run / "summary.json").read_text("utf-8")) for run in runs]
    return sum(summary["images_per_second"] for summary in summaries), summaries[0]


def check(launched: "subprocess.Popen[bytes]") -> None:
    """Waits for a run; raises `CalledProcessError` where it failed."""
    if code := launched.wait():
        raise subprocess.CalledProcessError(code, launched.args)


def main() -> int:
    """Measures, prints, writes; options it does not know are handed on to train.py."""
    parser = records.build_parser(__doc__, rounds=3)
    parser.add_argument(
        "--batch_size", type=records.count, default=512, help="global (default: 512)"
    )
    options, choices = records.parse(parser)
    choices = ["--epochs", "1", *choices]
    half = options.batch_size // 2
    kinds = {
        "one": (1, 1, options.batch_size),
        "two_alone": (2, 1, half),
        "two_ranks": (1, 2, options.batch_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, kind in kinds.items():
            speed, summary = train(*kind, choices, options.run_timeout)
            speeds[name].append(speed)
            print(f"{name}: {speed:,.0f} images/s", flush=True)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratios = {name: median / medians["one"] for name, median in medians.items()}
    print(
        f"two processes: {ratios['two_ranks']:.2f} times as fast as one; without each other "
        f"{ratios['two_alone']:.2f} times (medians of {options.rounds})"
    )
    results = {"images_per_second": speeds, "ratios_of_medians": ratios}
    records.write("two_processes", options, summary, results)
    return 0


if __name__ == "__main__":
    sys.exit(records.run(main, "benchmarks/two_processes.py"))
