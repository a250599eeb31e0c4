"""Seconds of training to a mean last-epoch test accuracy, with the shortest schedule that has it.

    python benchmarks/time_to_accuracy.py --target 99.0 99.4 --seeds 10

Schedules are tried from the shortest on, with three seeds, without a twelfth of the training images
(MNIST's last 5,000) and evaluated on it. Where that mean reaches the lowest open target, the
schedule is trained on all of them and tested with every seed; should the test fall short, the next
longer schedule is tried. A test's first run compiles, captures and warms up, and is discarded. A
run's clock starts before the first shuffle and stops when the device has done the last step (device
events on a GPU); evaluation is timed apart. Weights, statistics and momentum are set anew for every
seed, in place. time_to_accuracy-DEVICE-TARGETS.json is written anew after each schedule.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.in_turn import Trainer
from benchmarks.records import add_out, count, duration, sd
from benchmarks.throughput import RAW, hardware, load_images, synchronise
from data_prep import betons
from mnist_fast.cli import load
from mnist_fast.config import Config
from mnist_fast.data import read_all
from mnist_fast.errors import Parser, run_main
from mnist_fast.files import write_atomically
from mnist_fast.provenance import versions
from mnist_fast.run_folder import make_writable
from mnist_fast.runtime import Runtime
from mnist_fast.steps import check_name

ROOT = Path(__file__).resolve().parent.parent

SEARCH_SEEDS = range(11, 14)  # of the runs on held-out images
# epochs, batch size, peak learning rate
SGD = [
    *((2, 256, 0.2), (2, 128, 0.15), (3, 512, 0.3), (3, 256, 0.2), (3, 128, 0.15)),
    *((4, 512, 0.3), (4, 256, 0.2), (4, 128, 0.15), (5, 256, 0.2), (6, 256, 0.2)),
    *((6, 128, 0.15), (8, 256, 0.2), (8, 128, 0.1), (10, 256, 0.2), (10, 128, 0.1)),
    *((12, 256, 0.2), (12, 128, 0.1), (15, 256, 0.2), (15, 128, 0.1), (20, 128, 0.1)),
]
MUON = [(4, 128, 0.1), (5, 128, 0.1), (6, 128, 0.1), (8, 128, 0.1), (10, 128, 0.05)]
# with their optimiser, by rising number of images, then of steps
SCHEDULES = sorted(
    [*((*s, "sgd") for s in SGD), *((*s, "muon") for s in MUON)], key=lambda s: (s[0], -s[1])
)


@dataclasses.dataclass
class Result:
    """One schedule: percent of the held-out images by seed, and what its test gave by seed."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    held_out: list[float] = dataclasses.field(default_factory=list)
    setup_seconds: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    evaluation_seconds: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)


def timed_run(trainer: Trainer, seed: int) -> float:
    """Seconds of training with a seed."""
    trainer.start(seed)
    clock = Clock(trainer.runtime.device)
    for epoch in range(trainer.config.epochs):
        trainer.take_steps(epoch)
    return clock.stop()


class Clock:
    """Seconds between its making and `stop`, by device events on a GPU."""

    def __init__(self, device: torch.device):
        synchronise(device)
        self.device, self.started = device, time.perf_counter()
        if device.type == "cuda":
            self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.first.record()

    def stop(self) -> float:
        """Waits for the device; the seconds."""
        if self.device.type == "cuda":
            self.last.record()
        synchronise(self.device)
        if self.device.type == "cuda":
            return self.first.elapsed_time(self.last) / 1000
        return time.perf_counter() - self.started


def try_schedule(
    schedule: tuple[int, int, float, str],
    options: argparse.Namespace,
    runtime: Runtime,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> Result:
    """Measures a schedule on held-out images; where that reaches an open target, tests it."""
    epochs, size, peak, optimizer = schedule
    arguments = {"recipe": options.recipe, "step": options.step}
    arguments |= {"epochs": epochs, "batch_size": size, "learning_rate": peak}
    arguments |= {"optimizer": optimizer}
    config = load([part for k, v in arguments.items() for part in (f"--{k}", str(v))])

    result = Result(*schedule)
    kept = len(train[1]) - len(train[1]) // 12
    search = Trainer(config, runtime, (train[0][:kept], train[1][:kept]))
    for seed in SEARCH_SEEDS:
        timed_run(search, seed)
        result.held_out.append(search.evaluate(train[0][kept:], train[1][kept:]).accuracy)
    if statistics.fmean(result.held_out) < min(options.open):
        return result
    started = time.perf_counter()
    trainer = Trainer(config, runtime, train)
    timed_run(trainer, seed=0)  # discarded
    result.setup_seconds = time.perf_counter() - started
    for seed in range(1, options.seeds + 1):
        result.seconds.append(timed_run(trainer, seed))
        clock = Clock(runtime.device)
        result.accuracies.append(trainer.evaluate(*test).accuracy)
        result.evaluation_seconds.append(clock.stop())
    return result


def summarise(result: Result) -> dict[str, Any]:
    """A schedule's numbers with means and spreads, None where they are not known."""

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    return dataclasses.asdict(result) | {
        "n": len(result.seconds),
        "mean_held_out": mean(result.held_out),
        "mean_accuracy": mean(result.accuracies),
        "sd_accuracy": sd(result.accuracies),
        "mean_seconds": mean(result.seconds),
        "sd_seconds": sd(result.seconds),
    }


def format_line(row: dict[str, Any]) -> str:
    """A schedule's numbers in words."""
    words = (
        f"{row['epochs']:>2} epochs of {row['optimizer']}, batch {row['batch_size']}, "
        f"peak {row['learning_rate']:g}: {row['mean_held_out']:.3f} % of held-out images"
    )
    if not row["n"]:
        return words
    return words + (
        f", {row['mean_accuracy']:.3f} % of test images in {row['mean_seconds']:.3f} s, "
        f"n = {row['n']}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=RAW)
    parser.add_argument(
        "--target", type=duration, nargs="+", default=[99.0, 99.4], help="percent (default: both)"
    )
    parser.add_argument("--seeds", type=count, default=10, help="runs per test (default: 10)")
    parser.add_argument(
        "--recipe", default="fast", help="what the schedules change (default: fast)"
    )
    parser.add_argument("--step", default="auto", help="step mode (default: auto)")
    parser.add_argument(
        "--minutes", type=duration, default=20.0, help="start no schedule after this (default: 20)"
    )
    parser.add_argument(
        "--from_epochs",
        type=count,
        default=1,
        help="leave out schedules with fewer epochs (default: 1)",
    )
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/betons/mnist")
    parser.add_argument(
        "--batch_sizes", type=count, nargs="+", help="of the schedules to try (default: all)"
    )
    add_out(parser)
    parser.add_argument("--quick", action="store_true", help="one schedule, for tests")
    options = parser.parse_args(arguments)
    options.schedules = [
        schedule
        for schedule in SCHEDULES
        if schedule[0] >= options.from_epochs
        and (not options.batch_sizes or schedule[1] in options.batch_sizes)
    ]
    check_name(options.step)
    if not options.schedules:
        parser.error("no schedule has that --batch_sizes and --from_epochs")
    make_writable(options.out, "--out")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Searches the schedules, prints and writes what reached the targets."""
    options = parse(arguments)
    started = time.monotonic()
    runtime = Runtime(Config(step=options.step))
    facts = hardware(runtime.device)
    images, labels = load_images(options.data_dir)
    train = (images.to(runtime.device), labels.to(runtime.device))
    manifest = betons.check(options.data_dir)
    rows = range(manifest.test.samples)
    test = read_all(options.data_dir / manifest.test.file, rows, runtime.device)
    options.open = sorted(options.target)
    command = ["python", "benchmarks/time_to_accuracy.py", *(arguments or sys.argv[1:])]
    tried: list[dict[str, Any]] = []
    reached: dict[str, dict[str, Any]] = {}
    record = {
        "command": " ".join(command),
        "hardware": facts,
        "versions": versions(),
        "dataset": manifest.dataset,
        "precision": runtime.precision,
        "tried": tried,
        "reached": reached,
    }
    kind = "gpu" if runtime.device.type == "cuda" else "cpu"
    targets = "-".join(map(str, options.open))
    path = options.out / f"time_to_accuracy-{kind}-{targets}.json"
    for schedule in options.schedules[:1] if options.quick else options.schedules:
        if not options.open or time.monotonic() - started > 60 * options.minutes:
            break
        row = summarise(try_schedule(schedule, options, runtime, train, test))
        tried.append(row)
        print(format_line(row), flush=True)
        while options.open and row["n"] and row["mean_accuracy"] >= options.open[0]:
            reached[str(options.open.pop(0))] = row
        write_atomically(path, json.dumps(record, indent=1) + "\n")
    for target in sorted(options.target):
        found = reached.get(str(target))
        print(f"{target} %: {format_line(found) if found else 'not reached'}")
    runtime.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, "benchmarks/time_to_accuracy.py"))
